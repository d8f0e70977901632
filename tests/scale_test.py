"""Tests that losses do not depend on devices, processes and memory options."""

import json
import os
import subprocess
import sys
from pathlib import Path

import kills
import pytest
import tiny

TESTS = Path(__file__).resolve().parent
ENVIRONMENT = os.environ | {
    "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
}
STEPS = 20
# A small rate: with large ones Adam amplifies differences of 1e-7 to 1e-3 in 20 steps.
FIELDS = {"train.batch_size": 16, "optimizer.lr": 1e-4, "optimizer.encoder_lr": 1e-4}
BLOCKS = {"loss.block_cells": 8 * 4 * 16}  # word-frame cells of a text with all videos of a batch
MICRO = {"train.micro_batch": 8}
CASES = [
    blocks | micro | {"mesh.fsdp": fsdp}
    for blocks in ({}, BLOCKS)
    for micro in ({}, MICRO)
    for fsdp in (1, 2)
]
ALL_ON = CASES[-1]
_BERT_ADAM = {"optimizer.name": "bert_adam", "model.param_dtype": "float16"}
_DECAY = {"optimizer.layer_decay": 0.7, "train.ema": 0.9}
SWITCHES = [
    # Fields, memory options on 8 devices, steps compared.
    ({"model.aggregation": "weighted", "loss.cdcr": 100.0}, BLOCKS, STEPS),
    ({"model.aggregation": "maxsim", **_DECAY}, BLOCKS, STEPS),
    ({"model.tau_learned": True, "loss.each_granularity": True}, BLOCKS, STEPS),
    ({"loss.kind": "sigmoid"}, BLOCKS, STEPS),
    # Blocks would change which random numbers of the dropout a pair gets.
    ({"model.head": "tight_transformer"}, {}, STEPS),
    # Later, rounding to float16 amplifies 1e-7 to 1e-2. float32's fourth loss is 0.2 away.
    ({"model.preset": "official", **_BERT_ADAM}, BLOCKS, 4),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return str(tiny.make_dataset(tmp_path_factory.mktemp("data")))


def losses(data, cases, devices, processes=1):
    """Returns the losses of each case, for each process."""
    coordinator = f"localhost:{kills.free_port()}"
    request = {"data": data, "devices": devices, "steps": STEPS}
    request["cases"] = [FIELDS | case for case in cases]
    started = []
    for number in range(processes):
        if processes > 1:
            joining = {"num_processes": processes, "process_id": number}
            request |= {"coordinator": coordinator, **joining}
        command = [sys.executable, TESTS / "scale_worker.py", json.dumps(request)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, env=ENVIRONMENT, **pipes))
    outputs = [process.communicate() for process in started]
    assert [process.returncode for process in started] == [0] * processes, outputs[0][1][-2000:]
    return [json.loads(out.splitlines()[-1]) for out, _ in outputs]


@pytest.fixture(scope="module")
def single(data):
    ((curve,),) = losses(data, [{}], devices=1)
    assert len(curve) == STEPS
    assert curve[-1] < curve[0] - 0.5  # the loss falls: equal constant losses would prove nothing
    return curve


@pytest.mark.parametrize(
    ("devices", "processes", "cases"),
    [
        (8, 1, [ALL_ON]),
        pytest.param(8, 1, CASES, marks=pytest.mark.slow),
        pytest.param(1, 2, CASES, marks=pytest.mark.slow),
    ],
)
def test_losses_do_not_depend_on_devices_and_processes(data, single, devices, processes, cases):
    for process in losses(data, cases, devices, processes):
        for curve, case in zip(process, cases, strict=True):
            assert curve == pytest.approx(single, abs=1e-5), case


@pytest.mark.slow
@pytest.mark.parametrize(("switch", "memory", "steps"), SWITCHES)
def test_losses_with_each_switch_do_not_depend_on_devices(data, switch, memory, steps):
    ((single,),) = losses(data, [switch], devices=1)
    ((split,),) = losses(data, [switch | memory | MICRO | {"mesh.fsdp": 2}], devices=8)
    assert split[:steps] == pytest.approx(single[:steps], abs=1e-5)
    assert len(set(split)) == STEPS


PMAP = """
import functools, json, sys
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_num_cpu_devices", 8)
import loss_test
from xclip_jax.loss import LossOptions, encode_batch, loss_of_features
loss_test.B = 16
model, params = loss_test.make()
batch = loss_test.make_batch()
(loss, _), gradient = loss_test.compiled(model, same_video="ignore")(params, batch)

def local_loss(params, shard):
    # Gathers the features of all devices; the loss is the step's own function.
    gather = functools.partial(jax.lax.all_gather, axis_name="i", tiled=True)
    features = jax.tree.map(gather, encode_batch(model, params, shard))
    batch = {k: gather(v) for k, v in shard.items()}
    return loss_of_features(model, params, features, batch, LossOptions(same_video="ignore"))[0]

def step(params, shard):
    value, gradient = jax.value_and_grad(local_loss)(params, shard)
    return value, jax.lax.pmean(gradient, "i")  # each device has the loss of the whole batch

shards = {k: np.asarray(v).reshape(8, -1, *v.shape[1:]) for k, v in batch.items()}
value, by_pmap = jax.pmap(step, axis_name="i", in_axes=(None, 0))(params, shards)
by_pmap = jax.tree.map(lambda x: x[0], by_pmap)
scale = max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(gradient))
far = [float(jnp.max(jnp.abs(a - b))) for a, b in zip(*map(jax.tree.leaves, (gradient, by_pmap)))]
print(json.dumps([float(loss), [float(v) for v in value], max(far) / scale]))
"""


@pytest.mark.slow
def test_pmap_gives_the_same_value_and_gradient():
    done = subprocess.run(
        [sys.executable, "-c", PMAP], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    loss, values, difference = json.loads(done.stdout.splitlines()[-1])
    assert values == pytest.approx([loss] * 8, abs=1e-5)
    assert difference < 1e-5
