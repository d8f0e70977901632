"""Tests that data sets are read as written, without TensorFlow, and appear atomically."""

import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from xclip_jax.cli import InputError
from xclip_jax.data.builder import (
    SHARD_BYTES,
    Dataset,
    DatasetSettings,
    PendingRecord,
    dataset_folder,
    write_dataset,
)
from xclip_jax.data.preprocess import FrameFormat

ROOT = Path(__file__).resolve().parents[1]
CAPTIONS = {"train": [["a dog", "ein größer 犬 \x00"], ["b"], ["c", "d", "e"]], "test": [["f"]]}


def record(split, number, caption=None):
    """Returns a record with arbitrary bytes as JPEGs, and number + 1 frames."""
    frames = [bytes([number, 0, 255, 10, 13, 0])] * (number + 1)
    return {
        "id": f"ü/{split}{number}",
        "captions": caption or CAPTIONS[split][number],
        "frames": frames,
        "times": np.arange(len(frames)) + 0.25,
    }


def write(path, captions=CAPTIONS, image_size=32, make=record, digests=True, **settings):
    def clip(split, number):
        size, digest = SHARD_BYTES // 100, str(make(split, number)) if digests else ""
        count = len(captions[split][number])
        return PendingRecord(functools.partial(make, split, number), count, digest, size)

    pending = {s: [clip(s, n) for n in range(len(clips))] for s, clips in captions.items()}
    write_dataset(path, pending, DatasetSettings(image_size=image_size, **settings))
    return Dataset(path)


def test_records_are_read_as_written_in_order(tmp_path):
    dataset = write(tmp_path / "new" / "folder")
    assert dataset.path == tmp_path / "new" / "folder"
    assert dataset.image_size == 32
    counts = {split: list(counts) for split, counts in dataset.captions_per_clip.items()}
    assert counts == {"train": [2, 1, 3], "test": [1]}
    for split, clips in CAPTIONS.items():
        assert len(dataset.clips(split)) == len(clips)
        for number, got in enumerate(dataset.clips(split)):
            expected = record(split, number)
            assert got["id"].decode() == expected["id"]
            assert [caption.decode() for caption in got["captions"]] == expected["captions"]
            assert list(got["frames"]) == expected["frames"]
            assert list(got["times"]) == list(expected["times"])


def test_order_is_kept_over_many_shards(tmp_path):
    make = lambda s, n: record(s, n % 250, ["x"])  # noqa: E731
    dataset = write(tmp_path, {"train": [["x"]] * 1130, "val": [["x"]] * 70}, make=make)
    for split, count in (("train", 1130), ("val", 70)):
        ids = [clip["id"].decode() for clip in dataset.clips(split)]
        assert ids == [f"ü/{split}{n % 250}" for n in range(count)]
    files = sorted(path.name for path in dataset_folder(tmp_path).glob("*-of-*"))
    assert len(files) == 12 + 1


def test_missing_data_set_is_an_error(tmp_path):
    for path in (tmp_path, tmp_path / "x"):
        with pytest.raises(InputError) as error:
            Dataset(path)
        assert str(error.value) == (
            f"no prepared data set in {path}: {dataset_folder(path)} does not exist; "
            f"run python -m xclip_jax.prepare --output={path} (see its --help)"
        )
    with pytest.raises(InputError, match=r"^config.data.path is empty"):
        Dataset("")


def test_missing_split_is_an_error(tmp_path):
    with pytest.raises(InputError, match=f"^{tmp_path} has no split 'val', only train, test$"):
        write(tmp_path).clips("val")


def test_fingerprint_depends_on_content_only(tmp_path):
    def changed(field, value):
        def make(split, number):
            same = record(split, number)
            return same | {field: value} if (split, number) == ("train", 1) else same

        return make

    a = record("train", 1)
    variants = {
        "image size": write(tmp_path / "a", image_size=16),
        "resize": write(tmp_path / "h", resize="squash"),
        "interpolation": write(tmp_path / "i", interpolation="bilinear"),
        "caption": write(tmp_path / "b", make=changed("captions", ["x"])),  # as long as "b"
        "frame": write(tmp_path / "c", make=changed("frames", [b"other6", a["frames"][0]])),
        "time": write(tmp_path / "d", make=changed("times", [0.25, 1.5])),
        "id": write(tmp_path / "e", make=changed("id", "ü/trainX")),
        "split": write(tmp_path / "f", {"train": CAPTIONS["train"]}),
        "none": write(tmp_path / "g"),
    }
    fingerprints = {name: dataset.fingerprint for name, dataset in variants.items()}
    assert len(set(fingerprints.values())) == len(variants)
    assert write(tmp_path / "again").fingerprint == fingerprints["none"]
    shutil.move(tmp_path / "g", tmp_path / "moved")
    assert Dataset(tmp_path / "moved").fingerprint == fingerprints["none"]


def test_format_is_recorded_with_the_frames(tmp_path):
    dataset = write(tmp_path, resize="squash", interpolation="bilinear")
    assert dataset.format == FrameFormat(32, "squash", "bilinear")
    metadata = json.loads((dataset_folder(tmp_path) / "metadata.json").read_text())
    recorded = {name: metadata[name] for name in FrameFormat._fields if name in metadata}
    assert recorded == {"image_size": 32, "resize": "squash", "interpolation": "bilinear"}
    spread = write(tmp_path / "spread", resize="squash", interpolation="lanczos", spread=8)
    assert spread.format == FrameFormat(32, "squash", "lanczos", 8)


def test_metadata_of_the_default_format_is_that_of_earlier_versions(tmp_path):
    """Data sets of versions without `resize` and `interpolation` keep their fingerprint."""
    dataset = write(tmp_path)
    digests = [(s, str(record(s, n))) for s, clips in CAPTIONS.items() for n in range(len(clips))]
    settings = {"dataset": "captions", "variant": "", "image_size": 32, "paragraphs": False}
    assert json.loads((dataset_folder(tmp_path) / "metadata.json").read_text()) == settings | {
        "max_seconds": None,
        "expected": {"train": 3, "test": 1},
        "captions_per_clip": {"train": [2, 1, 3], "test": [1]},
        "content": hashlib.sha256(repr((32, *digests)).encode()).hexdigest(),
    }
    assert dataset.format == FrameFormat(32, "crop", "bicubic")


def test_interrupted_data_set_does_not_exist(tmp_path):
    def make(split, number):
        if (split, number) == ("train", 2):
            raise KeyboardInterrupt
        return record(split, number)

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, make=make, digests=False)
    # A kill leaves a folder like this one.
    incomplete = dataset_folder(tmp_path).parent / "incomplete.ABC123_1.1.0"
    incomplete.mkdir(parents=True)
    (incomplete / "xclip_clips-train.array_record-00000-of-00001").write_bytes(b"x" * 1000)
    with pytest.raises(InputError, match=r"^no prepared data set"):
        Dataset(tmp_path)
    assert len(write(tmp_path).clips("train")) == 3
    assert [path.name for path in incomplete.parent.iterdir()] == ["1.1.0"]


def test_tensorflow_is_not_imported(tmp_path):
    """Puts a fake TensorFlow on the path, which exits the process if imported."""
    (tmp_path / "tensorflow").mkdir()
    (tmp_path / "tensorflow" / "__init__.py").write_text("raise SystemExit('imported')")
    code = """
import sys
from xclip_jax.data.builder import Dataset, DatasetSettings, PendingRecord, write_dataset
record = {"id": "a", "captions": ["b"], "frames": [b"c"], "times": [0.0]}
records = {"train": [PendingRecord(lambda: record, 1, "")]}
write_dataset(sys.argv[1], records, DatasetSettings(image_size=8))
print(next(iter(Dataset(sys.argv[1]).clips("train")))["frames"])
print("tensorflow" in sys.modules)
"""
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-c", code, tmp_path / "data"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[b'c']\nFalse\n", "")
