"""Compares many texts with many videos block by block, without needless padding."""

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from tqdm import tqdm

from xclip_jax import inference
from xclip_jax.models import ModelConfig, XClip
from xclip_jax.similarity import TextFeatures, VideoFeatures

Features = TypeVar("Features", TextFeatures, VideoFeatures)
Rows = Int[np.ndarray, " _"]  # in rising order
Group = tuple[Rows, int]  # rows of features, and how many positions to keep
# Blocks of texts in one call on CPU. A call rearranges the features of the videos once.
BLOCKS = 16
# From so many word-frame cells on, short texts and videos are compared separately on CPU. This
# compiles up to four programs in place of one, 0.7 s each.
MANY_CELLS = 2**28


def compare_all(
    model: XClip,
    params: Any,
    features: tuple[TextFeatures, VideoFeatures],
    *,
    method: str,
    block_cells: int = 0,
    bar: tqdm | None = None,
) -> dict[str, Float[np.ndarray, "T V"]]:
    """Returns the T x V logits of a method of the model by name, a single one as "all".

    Arguments are those of `Retriever.similarity`.
    """
    text, video = jax.tree.map(np.asarray, features)
    (num_texts, words), (num_videos, frames) = text.mask.shape, video.mask.shape
    on_cpu = jax.default_backend() == "cpu"
    # On CPU a block that fits the cache, else one that fills the device.
    cells = block_cells or 1 << (20 if on_cpu else 26)
    shape = inference.block_shape(model.config.cells_per_pair(words, frames), cells)
    # Few sizes, so that few are compiled.
    sizes = [inference.power_of_four(size, up=True) for size in (num_texts, num_videos)]
    height, width = map(min, shape, sizes)
    blocks = min(BLOCKS, inference.power_of_four(-(-num_texts // height), up=True)) if on_cpu else 1
    is_large = on_cpu and text.mask.size * video.mask.size >= MANY_CELLS
    split = is_large and _skips_padding(model)
    texts, videos = (
        split_by_length(x.mask, size) if split else [(np.arange(len(x.mask)), x.mask.shape[1])]
        for x, size in ((text, height), (video, width))
    )
    shape = num_texts, num_videos
    sims: dict[str, np.ndarray] = defaultdict(functools.partial(np.empty, shape, np.float32))

    def compute() -> Iterator[tuple[Any, Any, Any]]:
        for columns, num_frames in _parts(videos, width):
            right = inference.pad_rows(_take(video, columns, num_frames), width)
            right = inference.split_like(right, params)
            for rows, num_words in _parts(texts, height * blocks):
                left = inference.pad_rows(_take(text, rows, num_words), height * blocks)
                count = -(-len(rows) // height)
                options: Any = {"model": model, "method": method, "size": height}
                yield rows, columns, compare_blocks(params, left, right, count, **options)

    for rows, columns, results in inference.one_ahead(compute()):
        for name, block in (results if isinstance(results, dict) else {"all": results}).items():
            _assign(sims[name], rows, columns, np.asarray(block)[: len(rows), : len(columns)])
        if bar is not None:
            bar.update(len(rows) * len(columns))
    return dict(sims)


@functools.partial(jax.jit, static_argnames=("model", "method", "size"))
def compare_blocks(
    params: Any,
    text: TextFeatures,
    video: VideoFeatures,
    count: int | Int[Array, ""],
    *,
    model: XClip,
    method: str,
    size: int,
) -> Any:
    """Returns a method's T x V results, computed for blocks of `size` texts.

    Results after the first `count` blocks are 0, unless all texts are one block.
    """

    def compute(i: Any) -> Any:
        cut = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=i * size, slice_size=size)
        return model.apply({"params": params}, jax.tree.map(cut, text), video, method=method)

    if len(text.mask) == size:
        return compute(0)

    def update(i: Any, results: Any) -> Any:
        put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=i * size, axis=0)
        return jax.tree.map(put, results, compute(i))

    shapes = jax.eval_shape(compute, 0)
    results = jax.tree.map(lambda x: jnp.zeros((len(text.mask), *x.shape[1:]), x.dtype), shapes)
    return jax.lax.fori_loop(0, count, update, results)


def split_by_length(mask: Bool[np.ndarray, "N L"], size: int) -> list[Group]:
    """Returns groups of rows of which each row is in one.

    Rows whose real positions all lie in the first half form a group of their own, as many as fill
    whole blocks of `size` rows.
    """
    count, length = mask.shape
    half = -(-length // 2)
    short = np.flatnonzero(~mask[:, half:].any(1))
    short = short[: len(short) // size * size]
    rest = np.setdiff1d(np.arange(count), short)
    return [group for group in ((short, half), (rest, length)) if len(group[0])]


def _skips_padding(model: XClip) -> bool:
    """Returns True if a similarity is one of words or frames, and their padding does not change it.

    In all other models, padding costs nothing or counts.
    """
    c: ModelConfig = model.config
    by_position = set(c.granularities) - {"video_sentence"}
    return bool(by_position) and c.has_granularities and c.padding == "masked" and not c.matrices


def _parts(groups: list[Group], size: int) -> Iterator[Group]:
    """Yields the groups in parts of at most `size` rows."""
    for rows, length in groups:
        for start in range(0, len(rows), size):
            yield rows[start : start + size], length


def _index(rows: Rows) -> slice | Rows:
    """Returns an index of rising rows: a slice, which copies nothing, if there are no gaps."""
    first, last = int(rows[0]), int(rows[-1])
    return slice(first, last + 1) if last - first + 1 == len(rows) else rows


def _take(features: Features, rows: Rows, length: int) -> Features:
    """Returns the features of some rows, cut to `length` positions."""
    index = _index(rows)
    pooled, *by_position = (getattr(features, f.name) for f in dataclasses.fields(features))
    cut: Any = [None if x is None else x[index, :length] for x in by_position]
    return type(features)(pooled[index], *cut)


def _assign(matrix: Any, rows: Rows, columns: Rows, block: Any) -> None:
    """Copies a block into some rows and columns of a matrix."""
    indices = _index(rows), _index(columns)
    if not all(isinstance(index, slice) for index in indices):
        indices = np.ix_(rows, columns)
    matrix[indices] = block
