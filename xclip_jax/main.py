"""Trains X-CLIP and evaluates it: metrics both ways, pictures of what was retrieved.

    python -m xclip_jax.main --config=configs/demo.py
    python -m xclip_jax.main --config=configs/captions.py --config.data.path=data/mine
    python -m xclip_jax.main --config=configs/msrvtt.py:vit_b16,official
    python -m xclip_jax.main --config=configs/demo.py --config.mode=eval

Any field of xclip_jax/config.py can be set as --config.a.b=value. The same command again goes on
where the last one stopped. On SIGTERM it saves and exits with status 75. Several processes train as
one: Cloud TPU, GKE and SLURM are detected, elsewhere see --coordinator.
"""

import logging

import jax
from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from xclip_jax import compile_only, evaluate, prepare, train
from xclip_jax.cli import InputError, one_line_errors, parse_flags, run_command
from xclip_jax.config import validate
from xclip_jax.distributed import (
    connect,
    is_first_process,
    report_failed_process,
    shutdown,
    stop_when_preempted,
    wait_for_all,
)

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "A file of configs/; single fields by --config.a.b=value.", lock_config=True
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where checkpoints, metrics and the report go; default runs/NAME_OF_CONFIG."
)

_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "HOST:PORT of the first process; Cloud TPU, GKE and SLURM need none."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "With --coordinator: of how many.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "With --coordinator: which, from 0.")
_COMPILE_ONLY = flags.DEFINE_bool(
    "compile_only", False, "Compile the training step, print memory, work, communication; no data."
)
_TOPOLOGY = flags.DEFINE_string(
    "topology", "", "With --compile_only: a TPU slice such as v6e:2x4 (needs the libtpu wheel)."
)


def main(argv):
    """Dispatch."""
    absl_logging.set_verbosity(absl_logging.WARNING)
    logging.captureWarnings(True)
    with one_line_errors():
        if argv[1:]:
            raise InputError(f"{' '.join(argv[1:])}: every option starts with --, see --help")
        config = _CONFIG.value
        validate(config)
        if _COMPILE_ONLY.value:
            compile_only.compile_only(config, _TOPOLOGY.value)
            return
        if _TOPOLOGY.value:
            raise InputError("--topology: only with --compile_only")
        connect(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
        if jax.process_count() == 1 or config.mode == "eval":
            stop_when_preempted()
        workdir = _WORKDIR.value or f"runs/{config.name}"
        if is_first_process():
            prepare.render_if_missing(config)
        wait_for_all("the demo's data")
        with report_failed_process():
            if config.mode == "train":
                train.train(config, workdir)
                stop_when_preempted()
            evaluate.evaluate(config, workdir)
            shutdown()


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    run_command(lambda: app.run(main, flags_parser=parse_flags))
