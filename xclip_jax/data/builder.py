"""The data set on disk: a TFDS builder that writes ArrayRecord files, and how to read them back.

One record is one clip: its id, its captions, its frames as JPEG bytes and their times. Frames are
stored once however many captions a clip has. Neither way needs TensorFlow.
"""

import contextlib
import hashlib
import io
import os
import shutil
import tempfile
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import file_adapters

from xclip_jax.errors import InputError

NAME, VERSION = "xclip_clips", "1.0.0"
SPLITS = ("train", "val", "test")


class ClipsBuilder(tfds.core.GeneratorBasedBuilder):
    """Writes `records`: {split: list of functions, each giving one record as a dict}.

    A record holds `id` (str), `captions` (list of str), `frames` (list of JPEG bytes) and `times`
    (list of seconds after the file's first frame). TFDS writes to an `incomplete.*` folder and
    renames it when done, so a data set that is there is whole.
    """

    VERSION = tfds.core.Version(VERSION)
    name = NAME

    def __init__(self, output, records, captions_per_clip, image_size):
        self._records = records
        self._digest = hashlib.sha256()
        self._metadata = {"captions_per_clip": captions_per_clip, "image_size": image_size}
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

    def _split_generators(self, dl_manager):
        del dl_manager
        return {split: self._generate_examples(split) for split in self._records}

    def _generate_examples(self, split):
        for key, make in enumerate(self._records[split]):
            record = make()
            texts = [text.encode() for text in (record["id"], *record["captions"])]
            for part in (*texts, *record["frames"], np.float32(record["times"]).tobytes()):
                self._digest.update(len(part).to_bytes(8) + part)
            yield key, record
        self.info.metadata["content"] = self._digest.hexdigest()  # TFDS saves it after the records


def dataset_folder(path):
    """Where the TFDS files of the data set at `path` lie; there only when the data set is whole."""
    return Path(path) / NAME / VERSION


def write_dataset(path, records, captions_per_clip, image_size):
    """Writes the records of `ClipsBuilder` under `path`; captions_per_clip is {split: counts}."""
    for left_by_a_kill in (Path(path) / NAME).glob("incomplete.*"):
        shutil.rmtree(left_by_a_kill)
    tfds.disable_progress_bar()
    with tempfile.TemporaryDirectory() as downloads, contextlib.redirect_stdout(io.StringIO()):
        builder = ClipsBuilder(path, records, captions_per_clip, image_size)
        builder.download_and_prepare(download_dir=downloads)


class Dataset:
    """A prepared data set.

    Attributes:
        path: the folder that xclip_jax.prepare wrote.
        image_size: S, side of the stored frames in pixels.
        captions_per_clip: {split: int array}, how many captions each clip has.
        fingerprint: a string that differs between data sets of different content.
    """

    def __init__(self, path):
        self.path = Path(path)
        folder = dataset_folder(path)
        if not str(path):
            raise InputError("config.data.path is empty: name the folder xclip_jax.prepare wrote")
        if not folder.is_dir():
            raise InputError(
                f"no prepared data set in {path}: looked for {folder}; make one with "
                f"python -m xclip_jax.prepare --output={path}, see its --help"
            )
        try:
            self._builder = tfds.builder_from_directory(str(folder))
            described = (folder / name for name in ("dataset_info.json", "metadata.json"))
            content = b"".join(path.read_bytes() for path in described)
            metadata = self._builder.info.metadata
            self.image_size = metadata["image_size"]
            counts = {split: np.asarray(n) for split, n in metadata["captions_per_clip"].items()}
        except Exception as error:  # TFDS has no one type for a damaged data set
            raise InputError(f"{folder} is damaged, prepare it again: {error}") from None
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
