"""Tests of preparation with Apache Beam, which `.ci/beam` installs before it runs them."""

import json

import pytest
import standins

from xclip_jax import prepare
from xclip_jax.cli import InputError
from xclip_jax.data import builder
from xclip_jax.workers import parse_beam_flags

pytest.importorskip("apache_beam", reason="Apache Beam is not installed: see .ci/beam")


def files(folder):
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.mark.parametrize("name", standins.STANDINS)
def test_beam_writes_the_same_bytes_as_a_single_machine(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(builder, "SHARD_BYTES", 1)  # a shard each
    standins.STANDINS[name](tmp_path)
    (tmp_path / "videos" / "unused.mp4").touch()
    common = [f"--dataset={name}", f"--videos={tmp_path}/videos", "--image_size=32"]
    common += [f"--annotations={tmp_path}/annotations", "--max_failures=0.2"]
    if name == "didemo":
        common += ["--max_seconds=3"]
    prepare.main([*common, f"--output={tmp_path}/here"])
    here = capsys.readouterr().out
    prepare.main([*common, f"--output={tmp_path}/beam", "--beam_runner=DirectRunner"])
    beam = capsys.readouterr().out
    assert beam == here.replace(f"{tmp_path}/here", f"{tmp_path}/beam")
    assert files(tmp_path / "beam") == files(tmp_path / "here")
    counts = builder.Dataset(tmp_path / "beam").captions_per_clip
    assert len(counts["train"]) == (14 if name == "msrvtt" else 11)
    shards = list(builder.dataset_folder(tmp_path / "beam").glob("*-train.*-of-*"))
    assert len(shards) > 10
    failures = (tmp_path / "beam" / "failures.jsonl").read_text().splitlines()
    assert not any(json.loads(line)["kept"] for line in failures)


def test_unknown_runner_is_an_error():
    with pytest.raises(InputError, match=r"^--beam_runner=Nope: .*DirectRunner"):
        parse_beam_flags("Nope", "")
