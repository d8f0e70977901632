"""What the compiler says of a step, without data and without running it."""

import pytest
import tiny

from xclip_jax import compile_only
from xclip_jax.errors import InputError


def test_memory_work_and_communication(capsys):
    config = tiny.make_config("no data is read")
    config.train.batch_size = 64
    config.mesh.data = 1
    alone = compile_only.run(config)
    assert alone["collectives"] == "none"
    config.mesh.data = -1
    both = compile_only.run(config)
    assert "all-reduce" in both["collectives"]
    assert "all-gather" in both["collectives"]
    flops = [float(report["floating-point operations a step"]) for report in (alone, both)]
    assert flops[1] == pytest.approx(flops[0], rel=0.5)  # the whole step's, however it is split
    out = capsys.readouterr().out
    assert "1 x cpu, batch 64" in out
    assert "2 x cpu, batch 64" in out
    assert "temporary memory, a device" in out


def test_micro_batches_take_less_memory():
    config = tiny.make_config("")
    config.train.batch_size = 512
    plain = compile_only.run(config)["temporary memory, a device"]
    config.train.micro_batch = 64
    assert gib(compile_only.run(config)["temporary memory, a device"]) < 0.9 * gib(plain)


def gib(text):
    return float(text.removesuffix(" GiB"))


def test_no_such_topology():
    config = tiny.make_config("")
    with pytest.raises(InputError, match=r"^--topology=v99:2x2: .*libtpu") as error:
        compile_only.run(config, "v99:2x2")
    assert "\n" not in str(error.value)
