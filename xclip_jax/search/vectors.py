"""Vectors of segments in memory, as float16, and the exact search for the nearest ones.

Versions of an index share the blocks of vectors that have not changed.
"""

from collections.abc import Iterable
from typing import Any

import faiss
import numpy as np
from jaxtyping import Bool, Float, Int

MAX_MERGED = 2**18  # rows of a block that is made of smaller ones
_BIAS_COLUMNS = 16  # of vectors in memory; two are used, but faiss is fast in multiples of 16
RowMask = Bool[np.ndarray, " N"]
Rows = Int[np.ndarray, " n"]


class Vectors:
    """N vectors with hubness biases, in blocks that are never changed.

    `dim` is their number of columns, `has_biases` is False if all biases are 0.
    """

    def __init__(self, dim: int, *, has_biases: bool, blocks: Iterable[Any] = ()) -> None:
        # A query is single-threaded in faiss; idle OpenMP threads would busy-wait after it and
        # slow down what follows (on two cores, reading rows by a third).
        faiss.omp_set_num_threads(1)
        self.dim, self.has_biases, self._blocks = dim, has_biases, list(blocks)
        sizes = [block.ntotal for block in self._blocks]
        self._starts = np.cumsum([0, *sizes])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def extended(self, parts: Iterable[tuple[np.ndarray, np.ndarray]], count: int) -> "Vectors":
        """Returns these vectors followed by further ones, at most `count`.

        `parts` are pairs of vectors (n x D, L2-normalised) and biases (n).
        """
        block = self._make_block(count)
        for vectors, biases in parts:
            block.add(_append(vectors, biases) if self.has_biases else vectors)
        blocks = [*self._blocks, *([block] if block.ntotal else [])]
        # Small blocks are merged, so that their number grows with the logarithm of their sizes.
        while len(blocks) > 1 and are_mergeable(blocks[-2].ntotal, blocks[-1].ntotal):
            last, before = blocks.pop(), blocks.pop()
            blocks.append(self._merge(before, last))
        return Vectors(self.dim, has_biases=self.has_biases, blocks=blocks)

    def take(self, rows: Rows) -> np.ndarray:
        """Returns the vectors of n rows, n x D, in float16."""
        taken = np.zeros((len(rows), self.dim), np.float16)
        for start, block in zip(self._starts, self._blocks, strict=False):
            inside = (rows >= start) & (rows < start + block.ntotal)
            if inside.all():  # not copied twice
                return np.take(_view(block), rows - start, axis=0)[:, : self.dim]
            taken[inside] = _view(block)[rows[inside] - start, : self.dim]
        return taken

    def search(
        self, vector_1xD: np.ndarray, count: int, allowed: RowMask | None, *, subtract_bias: bool
    ) -> tuple[Float[np.ndarray, " n"], Rows]:
        """Returns the `count` largest inner products per block, and their rows, in any order.

        Args:
            vector_1xD: the query.
            count: number of rows of each block, fewer if it has fewer.
            allowed: rows to search; None: all.
            subtract_bias: True to rank by the inner product minus the hubness bias.
        """
        query_1xE = np.zeros((1, self._width), np.float32)
        query_1xE[:, : self.dim] = vector_1xD
        if subtract_bias:
            query_1xE[:, self.dim : self.dim + 2] = -1  # of `_append`; empty without biases
        products, rows = [np.zeros(0, np.float32)], [np.zeros(0, np.int64)]
        for start, block in zip(self._starts, self._blocks, strict=False):
            options = {}
            if allowed is not None:
                bits = np.packbits(allowed[start : start + block.ntotal], bitorder="little")
                # faiss's type stubs describe the C++ constructors.
                selector = faiss.IDSelectorBitmap(bits)  # pyright: ignore[reportCallIssue]
                options["params"] = faiss.SearchParameters(sel=selector)  # pyright: ignore[reportCallIssue]
            values, found = block.search(query_1xE, min(count, block.ntotal), **options)
            is_found = found[0] >= 0
            products.append(values[0][is_found])
            rows.append(found[0][is_found] + start)
        return np.concatenate(products), np.concatenate(rows)

    @property
    def _width(self) -> int:
        return self.dim + _BIAS_COLUMNS * self.has_biases

    def _make_block(self, capacity: int) -> Any:
        kinds = faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
        block = faiss.IndexScalarQuantizer(self._width, *kinds)
        # Allocated once: growing by doubling would copy. The first `add` starts at row 0.
        block.codes.resize(capacity * block.code_size)
        return block

    def _merge(self, first: Any, second: Any) -> Any:
        block = self._make_block(first.ntotal + second.ntotal)
        for part in (first, second):
            block.add_sa_codes(_view(part).view(np.uint8))
        return block


def are_mergeable(before: int, last: int) -> bool:
    """Returns True if blocks of these sizes, one after the other, should be one block."""
    return 2 * last >= before and before + last <= MAX_MERGED


def _view(block: Any) -> np.ndarray:
    """Returns a block's numbers, n x E, without a copy."""
    codes = faiss.rev_swig_ptr(block.codes.data(), block.codes.size())
    return codes.view(np.float16).reshape(block.ntotal, -1)


def unit_vectors(vectors: Float[np.ndarray, "*rows D"]) -> Float[np.ndarray, "*rows D"]:
    """Returns float32 vectors L2-normalised along the last axis, where zeros stay zeros."""
    vectors = vectors.astype(np.float32, copy=False)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def _append(vectors_nxD: np.ndarray, biases: np.ndarray) -> Float[np.ndarray, "n E"]:
    """Returns vectors with further columns, the first two of which add up to the bias.

    In float16, one would change the bias by up to 0.0002.
    """
    high = biases.astype(np.float16).astype(np.float32)
    further = np.zeros((len(vectors_nxD), _BIAS_COLUMNS), np.float32)
    further[:, 0], further[:, 1] = high, biases - high
    return np.concatenate([vectors_nxD, further], 1)
