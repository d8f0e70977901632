"""A program that trains the tiny model and prints its losses, started by scale_test.py.

    python tests/scale_worker.py '{"data": PATH, "devices": 8, "steps": 20, "cases": [FIELDS, ...]}'

With "coordinator", "num_processes" and "process_id" it is one of several processes. Each case sets
fields of the config; the last line of output is JSON, a list of losses per case.
"""

import json
import sys

import jax
import tiny

from xclip_jax import distributed, sharding, train


def losses(request, fields):
    """Returns the losses of the first steps of training."""
    config = tiny.make_config(request["data"], epochs=100)
    config.update_from_flattened_dict(fields)
    setup = train.Setup(config)
    state = setup.init()
    batches, found = setup.batches(0), []
    for _ in range(request["steps"]):
        batch = next(batches)
        batch.pop("truncated")
        state, metrics = setup.step(state, sharding.shard_batch(batch, setup.mesh))
        found.append(float(metrics["loss"]))
    return found


if __name__ == "__main__":
    request = json.loads(sys.argv[1])
    jax.config.update("jax_num_cpu_devices", request["devices"])
    sharding.SPLIT_SIZE = 256  # the model is tiny
    joining = (request.get(name) for name in ("coordinator", "num_processes", "process_id"))
    distributed.connect(*joining)
    print(json.dumps([losses(request, fields) for fields in request["cases"]]))
