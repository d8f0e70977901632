"""The data set on disk: a TFDS builder that writes ArrayRecord files, and how to read them back.

One record is one clip: its id, its captions, its frames as JPEG bytes and their times. Frames are
stored once however many captions a clip has. Neither way needs TensorFlow.
"""

import contextlib
import dataclasses
import functools
import hashlib
import io
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import file_adapters
from tensorflow_datasets.proto import tf_example_pb2

from xclip_jax.cli import InputError
from xclip_jax.data.benchmarks import DATASETS

NAME, VERSION = "xclip_clips", "1.1.0"
SHARD_BYTES = 64 << 20


class ClipsBuilder(tfds.core.ShardBasedBuilder):
    """Writes `shards`: {split: list of lists of functions, each giving one record as a dict}.

    A record holds `id` (str), `captions` (list of str), `frames` (list of JPEG bytes) and `times`
    (list of seconds after the file's first frame). One shard is in memory at a time. TFDS writes to
    an `incomplete.*` folder and renames it when done, so a data set that is there is whole.
    """

    VERSION = tfds.core.Version(VERSION)
    name = NAME

    def __init__(self, output, shards, metadata):
        self._shards, self._metadata = shards, metadata
        super().__init__(data_dir=output, file_format=file_adapters.FileFormat.ARRAY_RECORD)

    def _info(self):
        text = tfds.features.Text()  # any bytes: JPEG as well
        features = {
            "id": text,
            "captions": tfds.features.Sequence(text),
            "frames": tfds.features.Sequence(text),
            "times": tfds.features.Sequence(tfds.features.Scalar(np.float32)),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description="Video clips, one frame a second, with captions.",
            features=tfds.features.FeaturesDict(features),
            metadata=tfds.core.MetadataDict(self._metadata),
            disable_shuffling=True,  # record i stays record i: captions_per_clip counts on it
        )

    def _download_and_prepare(self, dl_manager, download_config=None):
        """One split at a time: on Beam, TFDS would run the first one's pipeline again for each."""
        splits = []
        for split, shards in self._shards.items():
            self._split = split
            super()._download_and_prepare(dl_manager, download_config)
            # On Beam, TFDS sorts the shards' lengths by their numbers as text: 0, 1, 10, 2.
            lengths = [len(shard) for shard in shards]
            splits.append(self.info.splits[split].replace(shard_lengths=lengths))
        self.info.set_splits(tfds.core.splits.SplitDict(splits))
        for left_by_beam in self.data_path.glob("*.shard_infos.json"):
            left_by_beam.unlink()

    def _example_writer(self):
        return _StableWriter(self.info.file_format)

    def _shard_iterators_per_split(self, dl_manager):
        del dl_manager
        shards = self._shards[self._split]
        return {self._split: [functools.partial(_examples, shard) for shard in shards]}


class _StableWriter(tfds.core.writer.ExampleWriter):
    """Writes the same bytes for the same record; TFDS's order of the features varies by process."""

    def write(self, path, examples):
        stable = ((key, _stable(example)) for key, example in examples)
        return super().write(path, stable)


def _stable(example):
    return tf_example_pb2.Example.FromString(example).SerializeToString(deterministic=True)


def _examples(shard):
    for key, make in enumerate(shard):
        yield key, make()


def dataset_folder(path):
    """Where the TFDS files of the data set at `path` lie; there only when the data set is whole."""
    return Path(path) / NAME / VERSION


@dataclasses.dataclass(frozen=True)
class Pending:
    """A record to be written: `make()` gives it.

    digest: a text that differs between different records. size: about how many bytes it has.
    """

    make: Callable[[], dict]
    num_captions: int
    digest: str
    size: int = 0


def write_dataset(
    path,
    pending,
    image_size,
    dataset="captions",
    variant="",
    paragraphs=False,
    expected=None,
    max_seconds=None,
    beam=None,
):
    """Writes a data set under `path`.

    Args:
        pending: {split: list of Pending}.
        image_size, dataset, variant, paragraphs, expected, max_seconds: see `Dataset`; `expected`
            is the number of records where it is None.
        beam: (runner, PipelineOptions) to write on Apache Beam; None: in this process.
    """
    for left_by_a_kill in (Path(path) / NAME).glob("incomplete.*"):
        shutil.rmtree(left_by_a_kill)
    tfds.disable_progress_bar()
    content = (image_size, *((split, clip.digest) for split, p in pending.items() for clip in p))
    metadata = {
        "dataset": dataset,
        "variant": variant,
        "image_size": image_size,
        "paragraphs": paragraphs,
        "max_seconds": max_seconds,
        "expected": expected or {split: len(clips) for split, clips in pending.items()},
        "captions_per_clip": {s: [clip.num_captions for clip in p] for s, p in pending.items()},
        "content": hashlib.sha256(repr(content).encode()).hexdigest(),
    }
    shards = {split: _cut(clips) for split, clips in pending.items()}
    runner, options = beam or (None, None)
    config = tfds.download.DownloadConfig(beam_runner=runner, beam_options=options)
    with tempfile.TemporaryDirectory() as downloads, contextlib.redirect_stdout(io.StringIO()):
        builder = ClipsBuilder(path, shards, metadata)
        builder.download_and_prepare(download_dir=downloads, download_config=config)


def _cut(pending):
    """Cuts a split into shards of about SHARD_BYTES: lists of functions that make a record."""
    shards, filled = [], SHARD_BYTES
    for clip in pending:
        if filled >= SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(clip.make)
        filled += clip.size
    return shards


class Dataset:
    """A prepared data set.

    Attributes:
        path: the folder that xclip_jax.prepare wrote.
        image_size: S, side of the stored frames in pixels.
        captions_per_clip: {split: int array}, how many captions each clip has.
        name: prepare's --dataset.
        variant: its --split; "" where there is none.
        paragraphs: whether all captions of a video were joined to one text.
        max_seconds: the last second read of each clip; None: all were.
        expected: {split: how many clips there should be}: the paper's number for a benchmark.
        fingerprint: a string that differs between data sets of different content.
    """

    def __init__(self, path, name="", variant=""):
        """`name`, `variant`: what it must be, see above; "": anything."""
        self.path = Path(path)
        folder = dataset_folder(path)
        if not str(path):
            raise InputError("config.data.path is empty: name the folder xclip_jax.prepare wrote")
        if not folder.is_dir():
            raise InputError(
                f"no prepared data set in {path}: looked for {folder}; "
                + _how_to_prepare(path, name, variant)
            )
        try:
            self._builder = tfds.builder_from_directory(str(folder))
            described = (folder / name for name in ("dataset_info.json", "metadata.json"))
            content = b"".join(path.read_bytes() for path in described)
            metadata = self._builder.info.metadata
            self.image_size = metadata["image_size"]
            self.name, self.variant = metadata["dataset"], metadata["variant"]
            self.paragraphs, self.expected = metadata["paragraphs"], metadata["expected"]
            self.max_seconds = metadata["max_seconds"]
            counts = {split: np.asarray(n) for split, n in metadata["captions_per_clip"].items()}
        except Exception as error:  # TFDS has no one type for a damaged data set
            raise InputError(f"{folder} is damaged, prepare it again: {error}") from None
        if name not in ("", self.name) or variant not in ("", self.variant):
            raise InputError(
                f"{path} holds {' '.join([self.name, self.variant]).strip()}, the config wants "
                f"{' '.join([name, variant]).strip()}; "
                + _how_to_prepare("ANOTHER_FOLDER", name, variant)
            )
        self.fingerprint = hashlib.sha256(content).hexdigest()[:16]
        self.captions_per_clip = counts

    def clips(self, split):
        """The clips of a split: a sequence of records as at `ClipsBuilder`, bytes for str.

        Raises:
            InputError: the data set has no such split.
        """
        if split not in self.captions_per_clip:
            raise InputError(
                f"{self.path} has no split {split!r}, only {', '.join(self.captions_per_clip)}"
            )
        try:
            return self._builder.as_data_source(split)
        except Exception as error:  # of ArrayRecord, on opening a file cut short
            reason = str(error).splitlines()[0]
            raise InputError(
                f"{self.path}, {split} is damaged, prepare it again: {reason}"
            ) from None


def _how_to_prepare(path, name, variant):
    """The command that makes a data set, and what to download for it."""
    if not name:
        return f"make one with python -m xclip_jax.prepare --output={path}, see its --help"
    command = f"python -m xclip_jax.prepare --dataset={name} --videos=... --annotations=..."
    split = f" --split={variant}" if variant else ""
    return f"{DATASETS[name].download}; then {command}{split} --output={path} (docs/data.md)"
