"""Prepared data sets: ArrayRecord files with the metadata of TensorFlow Datasets (TFDS).

One record is one clip: its id, its captions, its frames as JPEG bytes and their times. Frames are
stored once however many captions a clip has. Neither writing nor reading needs TensorFlow.
"""

import contextlib
import dataclasses
import hashlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import tensorflow_datasets as tfds

from xclip_jax import integrity
from xclip_jax.buckets import BucketPath, Location, new_file, new_folder, remove_tree
from xclip_jax.cli import MOUNT, InputError, PathLike, check_local, first_line
from xclip_jax.data.benchmarks import DATASETS
from xclip_jax.data.preprocess import FrameFormat
from xclip_jax.workers import BeamRunner, map_on_beam, run_jobs

NAME, VERSION = "xclip_clips", "1.1.0"
SHARD_BYTES = 64 << 20
FORMAT = tfds.core.FileFormat.ARRAY_RECORD
LAST_FILE = "dataset_info.json"  # written after all others, in a bucket, which cannot rename


def dataset_folder(path: PathLike) -> Path:
    """Returns the folder of the TFDS files in `path`, which exists only if they are complete."""
    return Path(path) / NAME / VERSION


def is_complete(path: Location) -> bool:
    """Returns True if `path` holds a complete data set."""
    if isinstance(path, BucketPath):
        return (path / NAME / VERSION / LAST_FILE).is_file()
    return dataset_folder(path).is_dir()


def check_dataset_path(path: PathLike) -> Path:
    """Returns the path of a prepared data set, or raises InputError if it is a URI."""
    commands = {"s3": "aws s3 sync", "gs": "gcloud storage cp -r"}
    command = commands.get(str(path).partition("://")[0])
    copy = f"copy it ({command} {path} FOLDER), or " if command else ""
    return check_local("config.data.path", path, copy + MOUNT)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatasetSettings:
    """The settings a data set was prepared with, stored in its metadata."""

    dataset: str = "captions"  # prepare's --dataset
    variant: str = ""  # its --split, if it has any
    image_size: int = 224  # S, side of the stored frames in pixels
    # As in FrameFormat. Not in the metadata where these three are the default.
    resize: Literal["crop", "squash"] = "crop"
    interpolation: Literal["bicubic", "bilinear", "lanczos"] = "bicubic"
    spread: int = 0
    paragraphs: bool = False  # True if all captions of a video were joined into one text
    max_seconds: float | None = None  # the last second read of each clip; None: all were read
    # {split: expected number of clips}, the paper's for a benchmark; None: the number of records.
    expected: dict[str, int] | None = None

    @property
    def format(self) -> FrameFormat:
        """The format of the stored frames."""
        return FrameFormat(self.image_size, self.resize, self.interpolation, self.spread)


@dataclasses.dataclass(frozen=True)
class PendingRecord:
    """A record to be written.

    `make` returns {"id": str, "captions": [str], "frames": [JPEG bytes], "times": [seconds after
    the file's first frame]}.
    """

    make: Callable[[], dict[str, Any]]
    num_captions: int
    digest: str  # differs between different records
    size: int = 0  # approximate number of bytes


def write_dataset(
    path: PathLike | BucketPath,
    records: Mapping[str, Sequence[PendingRecord]],  # of each split, in order
    settings: DatasetSettings,
    beam_runner: BeamRunner | None = None,
) -> None:
    """Writes the data set of `records` under `path`, atomically, on this machine or on Beam."""
    if isinstance(path, BucketPath):
        return _write_to_bucket(path, records, settings, beam_runner)
    folder = dataset_folder(path)
    for incomplete in folder.parent.glob("incomplete.*"):  # of a killed run
        shutil.rmtree(incomplete)
    work = folder.with_name(f"incomplete.{uuid.uuid4().hex[:6]}_{VERSION}")
    work.mkdir(parents=True)
    shared = Path(path) / "work"
    shards = [_write_split(work, split, r, shared, beam_runner) for split, r in records.items()]
    _write_metadata(work, records, settings, shards)
    work.rename(folder)


def _write_to_bucket(
    path: BucketPath,
    records: Mapping[str, Sequence[PendingRecord]],
    settings: DatasetSettings,
    beam_runner: BeamRunner | None,
) -> None:
    """Writes a data set to a bucket, LAST_FILE at the end."""
    folder, shared = path / NAME / VERSION, path / "work"
    remove_tree(folder)  # of a killed run
    shards = [_write_split(folder, split, r, shared, beam_runner) for split, r in records.items()]
    with new_folder(folder, last=LAST_FILE) as work:
        _write_metadata(work, records, settings, shards)


Shards = tuple[str, list[int], int]  # split, number of records of each shard, bytes of all


def _write_metadata(
    folder: Path,
    records: Mapping[str, Sequence[PendingRecord]],
    settings: DatasetSettings,
    shards: Sequence[Shards],
) -> None:
    """Writes the metadata files of a data set and their digests."""
    digests = ((split, record.digest) for split, r in records.items() for record in r)
    format_key, fields = settings.format.key, dataclasses.asdict(settings)
    content = repr((*format_key, *digests))
    defaults = FrameFormat._fields[len(format_key) :]
    metadata = {name: value for name, value in fields.items() if name not in defaults} | {
        "expected": settings.expected or {split: len(r) for split, r in records.items()},
        "captions_per_clip": {s: [record.num_captions for record in r] for s, r in records.items()},
        "content": hashlib.sha256(content.encode()).hexdigest(),
    }
    splits = []
    for split, lengths, size in shards:
        counts: Any = {"shard_lengths": lengths, "num_bytes": size}
        template = _template(folder, split)
        splits.append(tfds.core.SplitInfo(name=split, filename_template=template, **counts))
    identity: Any = {"name": NAME, "version": tfds.core.Version(VERSION), "module_name": __name__}
    info = tfds.core.DatasetInfo(
        builder=tfds.core.DatasetIdentity(data_dir=str(folder), **identity),
        description="Video clips, as frames, with captions.",
        features=_features(),
        metadata=tfds.core.MetadataDict(metadata),
        disable_shuffling=True,  # keeps the order, as captions_per_clip requires
        split_dict=tfds.core.SplitDict(splits),
    )
    info.set_file_format(FORMAT)
    info.write_to_directory(folder)
    integrity.write_digests(folder, skip="*.array_record*")  # records have checksums of their own


def _template(folder: PathLike, split: str) -> tfds.core.ShardedFileTemplate:
    """Returns the names of the shards of a split."""
    options: Any = {"split": split, "filetype_suffix": FORMAT.value}
    return tfds.core.ShardedFileTemplate(tfds.core.Path(folder), dataset_name=NAME, **options)


def _features() -> tfds.features.FeaturesDict:
    text = tfds.features.Text()  # any bytes, hence also JPEG
    texts = tfds.features.Sequence(text)
    times = tfds.features.Sequence(tfds.features.Scalar(np.float32))
    content = {"id": text, "captions": texts, "frames": texts, "times": times}
    return tfds.features.FeaturesDict(content)


def _write_split(
    folder: Location,
    split: str,
    records: Sequence[PendingRecord],
    shared: Location,
    beam_runner: BeamRunner | None,
) -> Shards:
    """Writes the records in shards of about SHARD_BYTES, holding one at a time in memory.

    The workers of Beam share the folder `shared`.
    """
    shards, size = [], SHARD_BYTES
    for record in records:
        if size >= SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(record.make)
        size += record.size
    names = (path.name for path in _template("", split).sharded_filepaths(len(shards)))
    jobs = [(folder / name, shard) for name, shard in zip(names, shards, strict=True)]
    if beam_runner is not None:
        sizes = map_on_beam(_write_shard, jobs, shared, beam_runner)
    elif isinstance(folder, BucketPath):  # mostly waits for the cache files
        sizes = [0] * len(jobs)
        run_jobs(_write_shard, jobs, sizes.__setitem__)
    else:
        sizes = map(_write_shard, jobs)
    return split, list(map(len, shards)), sum(sizes)


def _write_shard(job: tuple[Location, list[Callable[[], dict[str, Any]]]]) -> int:
    """Writes one shard, from (path, functions that return a record), and returns its size."""
    path, makers = job
    features = _features()
    specs: Any = features.get_serialized_info()
    serializer = tfds.core.ExampleSerializer(specs)
    examples = (serializer.get_tf_example(features.encode_example(make())) for make in makers)
    # By default, protobuf's order of the features varies by process.
    serialized = (example.SerializeToString(deterministic=True) for example in examples)
    with new_file(path) as partial:  # Beam may run a job twice at the same time
        tfds.core.ExampleWriter(FORMAT).write(partial, enumerate(serialized))
        return os.path.getsize(partial)


class Dataset:
    """A prepared data set, with attributes of DatasetSettings (`name` is its `dataset`).

    `path` is the folder that xclip_jax.prepare wrote, `captions_per_clip` is {split: int array, the
    number of captions of each clip}, and `fingerprint` differs between data sets of different
    content.
    """

    def __init__(self, path: PathLike, name: str = "", variant: str = "") -> None:
        """Opens a data set, which must be of the given `name` and `variant` unless these are ""."""
        self.path = check_dataset_path(path)
        folder = dataset_folder(path)
        if not str(path):
            raise InputError("config.data.path is empty: set it to a folder of xclip_jax.prepare")
        if not folder.is_dir():
            problem = f"no prepared data set in {path}: {folder} does not exist"
            raise InputError(f"{problem}; {_how_to_prepare(path, name, variant)}")
        if not (folder / LAST_FILE).is_file():  # copied from a bucket, or in a mounted one
            problem = f"no complete data set in {path}: {LAST_FILE} is missing in {folder}"
            raise InputError(f"{problem}; prepare it to its end, then copy all files")
        if reason := integrity.find_corruption(folder):
            raise InputError(f"{reason}; prepare the data again")
        try:
            self._builder: Any = tfds.builder_from_directory(str(folder))
            files = ("dataset_info.json", "metadata.json")
            content = b"".join((folder / name).read_bytes() for name in files)
            metadata: Any = self._builder.info.metadata
            self.name: str = metadata["dataset"]
            self.variant: str = metadata["variant"]
            self.image_size: int = metadata["image_size"]
            fields = {name: metadata[name] for name in FrameFormat._fields if name in metadata}
            self.format = FrameFormat(**fields)
            self.paragraphs: bool = metadata["paragraphs"]
            self.max_seconds: float | None = metadata["max_seconds"]
            self.expected: dict[str, int] = metadata["expected"]
            counts = metadata["captions_per_clip"]
            self.captions_per_clip = {split: np.asarray(n) for split, n in counts.items()}
        except Exception as error:  # TFDS has no one type for a corrupted data set
            raise InputError(f"{folder} is corrupted, prepare it again: {error}") from None
        if name not in ("", self.name) or variant not in ("", self.variant):
            held, required = f"{self.name} {self.variant}".strip(), f"{name} {variant}".strip()
            problem = f"{path} holds {held}, the config requires {required}"
            raise InputError(f"{problem}; {_how_to_prepare('ANOTHER_FOLDER', name, variant)}")
        self.fingerprint = hashlib.sha256(content).hexdigest()[:16]

    def clips(self, split: str) -> "Records":
        """Returns the records of a split (see PendingRecord), with bytes in place of str."""
        if split not in self.captions_per_clip:
            splits = ", ".join(self.captions_per_clip)
            raise InputError(f"{self.path} has no split {split!r}, only {splits}")
        return Records(self._builder, split, f"{self.path}, {split}")


class Records(Sequence[Mapping[str, Any]]):
    """The records of a split, which raise InputError where they are corrupted."""

    def __init__(self, builder: Any, split: str, where: str) -> None:
        self.where = where
        with self._readable():
            self.source: Any = builder.as_data_source(split)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):  # ends a loop
            raise IndexError(index)
        with self._readable():
            return self.source[index]

    @contextlib.contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # ArrayRecord raises several types
            problem = f"{self.where} is corrupted, prepare it again"
            raise InputError(f"{problem}: {first_line(error):.300}") from None


def _how_to_prepare(path: PathLike, name: str, variant: str) -> str:
    """Returns instructions for downloading and preparing a data set."""
    if not name:
        return f"run python -m xclip_jax.prepare --output={path} (see its --help)"
    command = f"python -m xclip_jax.prepare --dataset={name} --videos=... --annotations=..."
    split = f" --split={variant}" if variant else ""
    return f"{DATASETS[name].download}; then {command}{split} --output={path} (docs/data.md)"
