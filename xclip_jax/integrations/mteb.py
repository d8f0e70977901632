"""Wraps a retriever as a search model of MTEB, the Massive Text Embedding Benchmark.

MTEB compares models that return one vector per text or video by cosine. A search model returns the
scores of pairs instead, here those of `Retriever.similarity`: with AOSM for an X-CLIP model. See
https://github.com/embeddings-benchmark/mteb and docs/mteb.md. Requires the extra [mteb].
"""
# pyright: reportMissingImports=false

import hashlib
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import UInt8
from tqdm import tqdm

from xclip_jax.cli import InputError
from xclip_jax.data.container import VideoError
from xclip_jax.data.preprocess import FrameFormat, frame_format
from xclip_jax.data.video import read_frames
from xclip_jax.inference import concatenate_features
from xclip_jax.retriever import Retriever
from xclip_jax.similarity import TextFeatures, VideoFeatures

try:
    import datasets
    from mteb.abstasks.task_metadata import TaskMetadata
    from mteb.models import ModelMeta
    from mteb.models.model_meta import ScoringFunction
    from mteb.types import PromptType
except ImportError as error:
    raise ImportError(f"{error}: run pip install -e '.[mteb]' (docs/mteb.md)") from error

# Columns that MTEB joins to the text of a query or of a document.
_TEXT_COLUMNS = {PromptType.query: ("text", "instruction"), PromptType.document: ("title", "text")}


class XClipSearch:
    """A search model of MTEB (`mteb.SearchProtocol`) that ranks by `Retriever.similarity`.

    It searches videos by text and texts by video. Videos are read from their files as in this
    package's own evaluation, one frame per second unless the model takes others, and not by MTEB's
    decoder torchcodec.

    Attributes:
        mteb_model_meta: what MTEB records of the model; replace it by a `model_copy(update={...})`
            to state the languages, the license or the data sets it was trained on.
    """

    _ids: list[str]
    _corpus: TextFeatures | VideoFeatures

    def __init__(self, retriever: Retriever, name: str) -> None:
        """Wraps `retriever`. MTEB stores its results by `name`, "ORGANIZATION/MODEL"."""
        if name.count("/") != 1 or not all(name.split("/")):
            raise InputError(f"name = {name!r}: must be of the form ORGANIZATION/MODEL")
        self.retriever = retriever
        self.mteb_model_meta = describe_model(retriever, name)

    def index(
        self,
        corpus: datasets.Dataset,
        *,
        task_metadata: TaskMetadata,
        encode_kwargs: Mapping[str, Any],
        **_: Any,
    ) -> None:
        """Encodes the texts or videos to be searched, see `search`."""
        self._ids = list(corpus["id"])
        self._corpus = self._encode(corpus, task_metadata, PromptType.document, encode_kwargs)

    def search(
        self,
        queries: datasets.Dataset,
        *,
        task_metadata: TaskMetadata,
        top_k: int,
        encode_kwargs: Mapping[str, Any],
        top_ranked: Mapping[str, list[str]] | None = None,
        **_: Any,
    ) -> dict[str, dict[str, float]]:
        """Returns the logits of the `top_k` best documents of each query, by query and document id.

        Args:
            queries: a column `id`, and `text` or `video`, the latter of type datasets.Video.
            task_metadata: states the modality of queries and of documents.
            top_k: number of documents per query. Of equal ones, the first of the corpus are taken.
            encode_kwargs: `batch_size`, by default 32, and `show_progress_bar`.
            top_ranked: ids of the documents to rank for each query, in reranking tasks.

        Raises:
            InputError: queries and documents are not texts and videos, a video cannot be read, or
                as in `Retriever.encode_text`.
        """
        features = self._encode(queries, task_metadata, PromptType.query, encode_kwargs)
        match features, self._corpus:
            case TextFeatures() as text, VideoFeatures() as video:
                sim_QxG = self.retriever.similarity(text, video)
            case VideoFeatures() as video, TextFeatures() as text:
                sim_QxG = self.retriever.similarity(text, video).T
            case _:
                problem = f"{task_metadata.name}: category {task_metadata.category}"
                raise InputError(f"{problem}: must compare texts with videos (t2v or v2t)")
        if not np.isfinite(sim_QxG).all():
            raise InputError(f"{task_metadata.name}: the model computes NaN or infinite logits")
        position = {id: index for index, id in enumerate(self._ids)}
        results = {}
        for query, scores_G in zip(queries["id"], sim_QxG, strict=True):
            ids = self._ids if top_ranked is None else top_ranked.get(query, [])
            scores = {id: float(scores_G[position[id]]) for id in ids}
            results[query] = dict(sorted(scores.items(), key=lambda item: -item[1])[:top_k])
        return results

    def _encode(
        self,
        rows: datasets.Dataset,
        task_metadata: TaskMetadata,
        side: PromptType,
        encode_kwargs: Mapping[str, Any],
    ) -> TextFeatures | VideoFeatures:
        """Encodes the queries or the documents of a task. A sound track is ignored."""
        modalities, size = task_metadata.get_modalities(side), encode_kwargs.get("batch_size", 32)
        problem = f"{task_metadata.name}: a {side.value}"
        if ("text" in modalities) == ("video" in modalities):
            raise InputError(f"{problem} is {' + '.join(modalities)}: must be a text or a video")
        if "text" in modalities:
            columns = [name for name in _TEXT_COLUMNS[side] if name in rows.column_names]
            parts = zip(*(rows[name] for name in columns), strict=True)
            return self.retriever.encode_text((" ".join(filter(None, p)) for p in parts), size)
        if not isinstance(kind := rows.features.get("video"), datasets.Video):
            raise InputError(f"{problem} has a column 'video' of {kind}: must be datasets.Video()")
        rows = rows.select_columns(["id", "video"])
        files = rows.cast_column("video", datasets.Video(decode=False))
        is_quiet = not encode_kwargs.get("show_progress_bar", True)
        format = frame_format(self.retriever.model.config)

        def encode_batches() -> Iterator[VideoFeatures]:
            with tqdm(total=len(rows), desc="encoding videos", disable=is_quiet) as bar:
                for start in range(0, len(rows), size):
                    batch: Any = files[start : start + size]
                    pairs = zip(batch["id"], batch["video"], strict=True)
                    yield self.retriever.encode_video([_read(*pair, format) for pair in pairs])
                    bar.update(len(batch["id"]))

        return concatenate_features(encode_batches(), len(rows))


def describe_model(retriever: Retriever, name: str) -> ModelMeta:
    """Returns what MTEB records of a model, with None where only its author knows.

    The revision is a digest of config and weights, as MTEB reuses earlier results of a revision.
    """
    config, arrays = retriever.model.config, jax.tree.leaves(retriever.params)
    digest = hashlib.sha256(repr(config).encode())
    for array in arrays:
        digest.update(np.asarray(array).tobytes())
    return ModelMeta(
        name=name,
        revision=digest.hexdigest()[:40],
        loader=None,
        release_date=None,
        languages=None,
        n_parameters=sum(array.size for array in arrays),
        n_embedding_parameters=config.text.vocab_size * config.text.width,
        memory_usage_mb=sum(array.nbytes for array in arrays) / 2**20,
        max_tokens=config.max_words,
        embed_dim=config.embed_dim,
        license=None,
        open_weights=None,
        public_training_code=None,
        public_training_data=None,
        framework=["JAX"],
        similarity_fn_name=ScoringFunction.CUSTOM,
        use_instructions=False,
        training_datasets=None,
        modalities=["text", "video"],
        model_type=["late-interaction"],
    )


def _read(
    id: str, video: Mapping[str, Any] | None, format: FrameFormat
) -> UInt8[np.ndarray, "F S S 3"]:
    """Reads the frames of an undecoded datasets.Video, {"path": path, "bytes": None or file}."""
    if not video or (video["bytes"] is None and video["path"] is None):
        raise InputError(f"video {id!r} is missing in the data set")
    with tempfile.NamedTemporaryFile() as file:
        path = Path(file.name if video["bytes"] is not None else video["path"])
        if video["bytes"] is not None:
            path.write_bytes(video["bytes"])
        try:
            return np.stack(read_frames(path, format).frames)
        except (VideoError, OSError) as error:
            raise InputError(f"video {id!r} ({video['path']}): {error}") from None
