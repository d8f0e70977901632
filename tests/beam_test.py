"""Tests of preparation with Apache Beam, which `.ci/beam` installs before it runs them."""

import collections
import contextlib
import json
import os

import pytest
import standins
from preparing import files
from s3 import s3

from xclip_jax import prepare, workers
from xclip_jax.buckets import BucketFile, BucketPath, parse_location
from xclip_jax.cli import InputError
from xclip_jax.data import builder, extraction
from xclip_jax.data.annotations import Clip
from xclip_jax.data.preprocess import FrameFormat
from xclip_jax.workers import map_on_beam, parse_beam_flags

beam = pytest.importorskip("apache_beam", reason="Apache Beam is not installed: see .ci/beam")
__all__ = ["s3"]  # the fixture


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


def test_beam_reads_and_writes_a_bucket(s3, tmp_path):
    standins.lsmdc(tmp_path)
    for name in ("annotations", "videos"):
        s3.upload(tmp_path / name, name)
    common = ["--dataset=lsmdc", "--image_size=32", "--max_failures=0.2"]
    for place, options in ((tmp_path, []), (s3.uri, ["--beam_runner=DirectRunner"])):
        paths = [f"--annotations={place}/annotations", f"--videos={place}/videos"]
        prepare.main([*common, *paths, *options, f"--output={place}/out"])
    assert s3.objects("out") == files(tmp_path / "out")
    assert not s3.keys("out/work/")


def run_or_fail_once(item):
    """Returns the item's number, but fails the first time for one item in three."""
    number, folder = item
    marker = folder / f"tried-{number}"
    if number % 3 == 0 and not marker.exists():
        marker.touch()
        raise OSError(f"item {number} failed once")
    return number


@pytest.mark.parametrize("place", ["disk", "bucket"])
def test_results_are_in_order_and_complete_after_retries(place, s3, tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "CHUNK", 3)
    folder = str(tmp_path / "shared") if place == "disk" else f"{s3.uri}/shared"
    runner, items = parse_beam_flags("DirectRunner", ""), [(n, tmp_path) for n in range(10)]
    old = parse_location("folder", folder) / "beam" / "old"
    workers.write_chunks(items, old)  # of a killed run
    results = []
    while not results:  # each run that fails leaves fewer items that will
        with contextlib.suppress(InputError):
            results = map_on_beam(run_or_fail_once, items, folder, runner)
    assert results == list(range(10))
    assert len(list(tmp_path.glob("tried-*"))) == 4
    assert not s3.keys("shared/beam/") if place == "bucket" else not os.listdir(folder)
    assert map_on_beam(run_or_fail_once, [], folder, runner) == []


def test_items_of_one_chunk_are_spread_over_workers(tmp_path):
    options = "--direct_num_workers=2 --direct_running_mode=multi_processing"
    runner = parse_beam_flags("DirectRunner", options)
    items = ["__import__('os').getpid()"] * 40  # evaluated, as the workers cannot import this file
    assert len(items) < workers.CHUNK
    counts = collections.Counter(map_on_beam(eval, items, tmp_path, runner))
    assert len(counts) == 2
    assert min(counts.values()) > 5


def make_graph(count, shared):
    """Returns the serialized pipeline of jobs for this many clips, each with its own video."""
    clips = [Clip(f"{n:011x}", (f"a caption of clip {n}",)) for n in range(count)]
    videos = [BucketFile(f"s3://bucket/videos/{clip.video}.mp4", 1, 1) for clip in clips]
    pairs = zip(clips, videos, strict=True)
    jobs = [[extraction.ClipJob(clip, FrameFormat(), video)] for clip, video in pairs]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers, "write_file", lambda path, content: None)
        chunks = workers.write_chunks(jobs, shared)
    pipeline = beam.Pipeline(runner="DirectRunner")
    workers.add_stages(pipeline, extraction.extract_group, shared, chunks)
    return pipeline.to_runner_api().SerializeToString()


def test_graph_does_not_contain_the_jobs():
    shared = BucketPath("s3://bucket/folder")
    small, large = (len(make_graph(count, shared)) for count in (1_000, 100_000))
    assert large < 1e6
    assert large - small < 10_000


def test_unknown_runner_is_an_error():
    with pytest.raises(InputError, match=r"^--beam_runner=Nope: .*DirectRunner"):
        parse_beam_flags("Nope", "")
