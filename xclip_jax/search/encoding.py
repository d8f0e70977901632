"""Reads video files and encodes their segments to rows of an index."""

import collections
import dataclasses
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from os import getpid
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import UInt8

from xclip_jax.data.extraction import CRASHED
from xclip_jax.data.preprocess import frame_format
from xclip_jax.inference import pad_rows
from xclip_jax.metrics import hubness_bias
from xclip_jax.models import ModelConfig
from xclip_jax.retriever import Retriever
from xclip_jax.search.segments import Segment, SegmentJob, load_frames, read_segments
from xclip_jax.search.store import FileStamp
from xclip_jax.workers import Function

Row = dict[str, Any]  # column -> value
JobRunner = Callable[[Function, Sequence[Any], Callable[[int, Any], Any]], None]  # see run_jobs
# Fields of a model that the first versions had in these sections, and others that they had not.
_FORMER_FIELDS = {
    "vision": ("image_size", "patch_size", "width", "layers", "heads"),
    "text": ("vocab_size", "context_length", "width", "layers", "heads"),
    "preprocess": ("image_size", "mean", "std", "resize", "interpolation"),
}
_LATER_FIELDS = ("towers", "max_scale")


@dataclasses.dataclass(frozen=True)
class FileReport:
    """The outcome of reading a file."""

    path: str
    segments: int = 0
    problem: str | None = None  # reason why there is no segment, or the file was only partly read
    retry: bool = False  # True: the reason may be temporary, so the next update reads it again


class Encoder:
    """Reads files, and encodes their segments in batches of a fixed shape.

    `about` are the settings of an index (see `Store`), `captions` its bank.
    """

    def __init__(
        self, retriever: Retriever, about: Mapping[str, Any], captions: Sequence[str]
    ) -> None:
        self.retriever, self.about = retriever, about
        self.bank = retriever.encode_text(captions) if captions else None
        self.batch_size = (4 if jax.default_backend() == "cpu" else 64) * jax.local_device_count()

    def read(
        self,
        stamps: Mapping[str, FileStamp],
        run: JobRunner,
        done: Callable[[FileReport, list[Row]], Any],
        *,
        when_read: Callable[[str], Any] = lambda path: None,
    ) -> None:
        """Calls `done` with the rows of each file once all of them are encoded.

        `run` is `workers.run_jobs` or a function like it. `when_read` gets the path of each file
        that was read, which may not be encoded.
        """
        self._stamps, self._done = stamps, done
        self._batch: list[tuple[Row, UInt8[np.ndarray, "F S S 3"]]] = []  # not encoded
        self._files: collections.deque[tuple[FileReport, list[Row]]] = collections.deque()
        names = ("max_frames", "segment_seconds", "overlap_seconds", "shots")
        options = {name: self.about[name] for name in names if name in self.about}
        options["format"] = frame_format(self.retriever.model.config)
        _remove_abandoned_folders()
        prefix = f"xclip_jax-frames-{getpid()}-"
        with tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True) as folder:
            files = (Path(folder, str(number)) for number in range(len(stamps)))
            jobs = [SegmentJob(*pair, **options) for pair in zip(stamps, files, strict=True)]

            def add(index: int, result: tuple[list[Segment], str | None, bool] | None) -> None:
                job = jobs[index]
                self._add(job, *(result or ([], CRASHED, True)))
                job.frames_file.unlink(missing_ok=True)
                when_read(job.path)

            run(read_segments, jobs, add)
            self._encode()
            self._pass_on()

    def _add(
        self, job: SegmentJob, segments: list[Segment], problem: str | None, retry: bool
    ) -> None:
        """Queues the segments of a file, and encodes full batches."""
        rows = []
        for segment, frames_FxSxSx3 in zip(segments, load_frames(job, segments), strict=False):
            rows.append(self._make_row(job, segment))
            self._batch.append((rows[-1], frames_FxSxSx3))
            if len(self._batch) == self.batch_size:
                self._encode()
        self._files.append((FileReport(job.path, len(rows), problem, retry), rows))
        self._pass_on()

    def _make_row(self, job: SegmentJob, segment: Segment) -> Row:
        """Returns the columns of a segment that do not depend on the model's features."""
        size, mtime = self._stamps[job.path]
        key = repr((job.path, size, mtime, segment.start)).encode()
        row: Row = {"id": hashlib.blake2b(key, digest_size=8).hexdigest()}
        row |= {"path": job.path, "size": size, "mtime": mtime}
        row |= {**vars(segment), "count": len(segment.times)}
        row["times"] = segment.times + [0.0] * (job.max_frames - len(segment.times))
        return row

    def _encode(self) -> None:
        """Encodes the batch, padded to a fixed shape: features must not depend on their batch."""
        if not self._batch:
            return
        retriever, about, size = self.retriever, self.about, self.batch_size
        counts = np.array([row["count"] for row, _ in self._batch])
        mask = np.arange(about["max_frames"]) < counts[:, None]
        frames = np.stack([pad_rows(frames, about["max_frames"]) for _, frames in self._batch])
        frames, mask = pad_rows((frames, mask), size)
        features = retriever.encode("encode_video", (frames, mask), size)
        dtype = np.dtype(about["precision"])
        biases = None
        if self.bank is not None:
            bank_BxV = retriever.similarity(self.bank, features) / retriever.scale
            biases = hubness_bias(bank_BxV).astype(np.float32)
        for index, (row, _) in enumerate(self._batch):
            if biases is not None:
                row["bias"] = biases[index]
            row["video"] = features.video[index].astype(dtype)
            row["frames"] = features.frames[index].reshape(-1).astype(dtype)
            if features.weights is not None:
                row["weights"] = features.weights[index].astype(dtype)
        self._batch = []

    def _pass_on(self) -> None:
        """Passes the completely encoded files on."""
        while self._files and all("video" in row for row in self._files[0][1][-1:]):
            self._done(*self._files.popleft())


def _remove_abandoned_folders() -> None:
    """Removes the frames that killed processes have left."""
    for old in Path(tempfile.gettempdir()).glob("xclip_jax-frames-*"):
        if Path("/proc/self").exists() and not Path("/proc", old.name.split("-")[2]).exists():
            shutil.rmtree(old, ignore_errors=True)


def hash_path(path: str) -> int:
    """Returns a number that is the same for a path on every machine."""
    return int.from_bytes(hashlib.blake2b(path.encode(), digest_size=8).digest())


def sort_by_hash(paths: Iterable[str]) -> list[str]:
    """Returns paths in an order that does not depend on their folders."""
    return sorted(paths, key=lambda path: (hash_path(path), path))


def fingerprint(retriever: Retriever) -> str:
    """Returns 16 hexadecimal digits computed from everything that determines a model's features.

    Fields that the first versions did not have count where they are not the default.
    """
    ignored = ("step", "selected_on", "base_model", "remat", "param_dtype")
    config = {name: value for name, value in retriever.config.items() if name not in ignored}
    defaults = dataclasses.asdict(ModelConfig())
    config = _drop_defaults(config, {name: defaults[name] for name in _LATER_FIELDS})
    for section, former in _FORMER_FIELDS.items():
        if section in config:
            later = {k: v for k, v in defaults[section].items() if k not in former}
            config[section] = _drop_defaults(config[section], later)
    digest = hashlib.blake2b(json.dumps(config, sort_keys=True).encode(), digest_size=8)
    for path, array in jax.tree_util.tree_leaves_with_path(retriever.params):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.asarray(array).tobytes())
    return digest.hexdigest()


def _drop_defaults(fields: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields that have no default, or another value."""
    return {k: v for k, v in fields.items() if k not in defaults or v != defaults[k]}
