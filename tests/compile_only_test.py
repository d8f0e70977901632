"""Tests of compiling the training step without data and without running it."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest
import tiny
from collectives import reduced_bytes

from xclip_jax import compile_only, sharding
from xclip_jax.cli import InputError
from xclip_jax.fitting import Settings
from xclip_jax.models import XClip
from xclip_jax.optimizer import make_optimizer
from xclip_jax.train import configure_model, trace_with


def test_step_that_does_not_fit_names_settings_that_do(tmp_path, monkeypatch, capsys):
    real = compile_only.trace_with

    class TooLarge(NamedTuple):
        jaxpr: Any

        def lower(self):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Used 25G of 15G hbm.\nmore")

    def limited(*args):
        def trace(settings):
            fits = settings.micro_batch in (4, 8) and settings.remat == "layers"
            traced = real(*args)(settings)
            return traced if fits else TooLarge(traced.jaxpr)

        return trace

    monkeypatch.setattr(compile_only, "trace_with", limited)
    config = tiny.make_config(tmp_path, batch_size=16, micro_batch=0)
    config.model.remat = "none"
    message = r"does not fit: RESOURCE_EXHAUSTED: Used 25G of 15G hbm\.; it fits with .*"
    with pytest.raises(InputError, match=message + r"remat=layers .*micro_batch=8: 0\.\d\d GiB"):
        compile_only.compile_only(config)


def test_memory_of_this_machine_is_a_limit(tmp_path, monkeypatch):
    config = tiny.make_config(tmp_path, batch_size=128, micro_batch=0)
    config.mesh.data, config.model.remat = 1, "none"
    needed = compile_only.compile_only(config)["peak memory, a device"]
    memory = 0.9 * parse_gib(needed) * 2**30
    monkeypatch.setattr(compile_only, "device_memory", lambda _: memory)
    message = rf"does not fit: {needed} a device of 0\.\d\d GiB; (trying|it fits with .* GiB a dev)"
    with pytest.raises(InputError, match=message) as error:
        compile_only.compile_only(config)
    assert parse_gib(str(error.value).split()[-4] + " GiB") * 2**30 <= memory + 2**24


def test_report_lists_memory_flops_and_collectives(capsys):
    config = tiny.make_config("no data is read")
    config.train.batch_size = 64
    config.mesh.data = 1
    alone = compile_only.compile_only(config)
    assert alone["collectives in the program"] == "none"
    config.mesh.data = -1
    both = compile_only.compile_only(config)
    assert "all-reduce" in both["collectives in the program"]
    assert "all-gather" in both["collectives in the program"]
    flops = "matrix products, FLOP a step"
    assert alone[flops] == both[flops]  # of the step on all devices
    out = capsys.readouterr().out
    assert "1 x cpu, batch 64" in out
    assert "2 x cpu, batch 64" in out
    assert "temporary memory, a device" in out


def test_gradients_are_reduced_once_for_all_micro_batches():
    config, found, flops = tiny.make_config("no data is read"), {}, {}
    config.train.batch_size, mesh = 32, sharding.make_mesh(-1, 1)
    model = XClip(configure_model(config, 49408))
    _, optimizer = make_optimizer(config.optimizer, 9)
    trace = trace_with(model, optimizer, config, mesh)
    for micro_batch in (0, 16, 2):
        traced = trace(Settings("none", micro_batch))
        found[micro_batch] = reduced_bytes(traced.lower().compile().as_text())
        flops[micro_batch] = compile_only.matrix_flops(traced.jaxpr.jaxpr)
    outside, inside = zip(*found.values(), strict=True)
    shapes = jax.tree.leaves(tiny.param_shapes(model))
    gradients = 4 * sum(math.prod(x.shape) for x in shapes)
    assert inside == (0, 0, 0)
    assert min(outside) >= gradients
    assert max(outside) < 1.01 * min(outside)
    # The towers' forward pass runs twice, of three with the backward pass, on all devices.
    assert flops[16] == flops[2]
    assert 1.2 < flops[16] / flops[0] < 1.4


@pytest.mark.slow  # tests/loss_test.py compares the memory of a smaller batch
def test_micro_batches_take_less_memory():
    config = tiny.make_config("")
    config.train.batch_size = 512
    config.model.remat, config.train.micro_batch = "none", 0
    plain = compile_only.compile_only(config)["temporary memory, a device"]
    config.train.micro_batch = 64
    cached = compile_only.compile_only(config)["temporary memory, a device"]
    assert parse_gib(cached) < 0.9 * parse_gib(plain)


def parse_gib(text):
    return float(text.removesuffix(" GiB"))


def test_matrix_flops_count_every_layer_and_recomputation():
    def layers(x_3x4, kernels_5x4x4, flag):
        x_3x4, _ = jax.lax.scan(lambda x, kernel: (jnp.sin(x @ kernel), None), x_3x4, kernels_5x4x4)
        return jnp.sum(jax.lax.cond(flag, lambda x: x @ kernels_5x4x4[0], lambda x: x, x_3x4))

    def count(function, *args):
        return compile_only.matrix_flops(jax.make_jaxpr(function)(*args).jaxpr)

    inputs = jnp.ones((3, 4)), jnp.ones((5, 4, 4))
    a_layer = 2 * 3 * 4 * 4
    assert count(jax.jit(layers), *inputs, True) == 6 * a_layer
    both = jax.grad(lambda kernels, x: layers(x, kernels, True))
    assert count(both, *inputs[::-1]) == 3 * 6 * a_layer
    recomputed = jax.grad(jax.checkpoint(lambda kernels, x: layers(x, kernels, True)))
    assert count(recomputed, *inputs[::-1]) > 3.8 * 6 * a_layer


def test_unknown_topology_is_an_error():
    config = tiny.make_config("")
    with pytest.raises(InputError, match=r"^--topology=v99:2x2: .*libtpu") as error:
        compile_only.compile_only(config, "v99:2x2")
    assert "\n" not in str(error.value)
