"""Tests that batches and blocks give the same numbers as one piece, with few compilations."""

import io

import jax
import numpy as np
import pytest
from tqdm import tqdm

from xclip_jax import comparison, inference
from xclip_jax.inference import block_shape
from xclip_jax.models.config import ModelConfig, TemporalConfig, TextConfig, VisionConfig
from xclip_jax.models.xclip import XClip
from xclip_jax.retriever import Retriever

CONFIG = ModelConfig(
    vision=VisionConfig(image_size=4, patch_size=2, width=6, layers=1, heads=2),
    text=TextConfig(vocab_size=20, context_length=6, width=6, layers=1, heads=2),
    temporal=TemporalConfig(layers=1, heads=2),
    embed_dim=6,
    max_words=6,
    max_frames=3,
)
MODEL = XClip(CONFIG.resolve())
NUM_TEXTS, NUM_VIDEOS = 11, 7
rng = np.random.default_rng(0)
TEXT_MASK = np.arange(6) < rng.integers(3, 7, NUM_TEXTS)[:, None]
IDS = np.where(TEXT_MASK, rng.integers(1, 20, (NUM_TEXTS, 6)), 0)
FRAME_MASK = np.arange(3) < rng.integers(1, 4, NUM_VIDEOS)[:, None]
FRAMES = rng.integers(0, 256, (NUM_VIDEOS, 3, 4, 4, 3), np.uint8)


@pytest.fixture(scope="module")
def params():
    inputs = IDS[:1], TEXT_MASK[:1], FRAMES[:1], FRAME_MASK[:1]
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0), *inputs)["params"]
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: 0.4 * rng.normal(size=x.shape).astype(np.float32), shapes)


@pytest.fixture(scope="module")
def direct(params):
    """Returns features and logits computed in one piece: (text, video, sim_TxV)."""

    @jax.jit
    def run(params):
        model = MODEL.bind({"params": params})
        text, video = model.encode_text(IDS, TEXT_MASK), model.encode_video(FRAMES, FRAME_MASK)
        return text, video, model.similarity(text, video)

    return jax.tree.map(np.asarray, run(params))


@pytest.fixture(scope="module")
def features(direct):
    return direct[:2]


@pytest.fixture
def compilations():
    """Returns a function that counts compilations since its last call."""
    programs = inference.apply_model, comparison.compare_blocks
    seen = sum(program._cache_size() for program in programs)

    def count():
        nonlocal seen
        before, seen = seen, sum(program._cache_size() for program in programs)
        return seen - before

    return count


def assert_same(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert isinstance(a, np.ndarray)
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, atol=2e-6)


@pytest.mark.parametrize("batch_size", [5, 64])
def test_batched_encoding_matches_one_batch(params, features, batch_size):
    text = Retriever({}, MODEL, params).encode("encode_text", (IDS, TEXT_MASK), batch_size)
    assert len(text.mask) == NUM_TEXTS
    np.testing.assert_array_equal(text.mask, TEXT_MASK)
    assert_same(text, features[0])
    video = Retriever({}, MODEL, params).encode("encode_video", (FRAMES, FRAME_MASK), batch_size)
    assert len(video.mask) == NUM_VIDEOS
    assert_same(video, features[1])


@pytest.fixture
def sizes(monkeypatch):
    """Records the lengths of the masks passed to the device."""
    seen, unwatched = [], inference.apply_model

    def watched(params, *inputs, **options):
        masks = [x for x in jax.tree.leaves(inputs) if x.dtype == bool]
        seen.append(tuple(len(mask) for mask in masks))
        return unwatched(params, *inputs, **options)

    monkeypatch.setattr(inference, "apply_model", watched)
    return seen


def test_encoding_any_number_of_texts_compiles_few_programs(params, compilations, sizes):
    batches = {}
    for count in range(1, NUM_TEXTS + 1):
        Retriever({}, MODEL, params).encode("encode_text", (IDS[:count], TEXT_MASK[:count]), 7)
        batches[count] = [size for (size,) in sizes]
        sizes.clear()
    assert compilations() <= 3  # 1, 4 and 7 texts
    assert [batches[n] for n in (1, 3, 4, 6, 7)] == [[1], [1, 1, 1], [4], [4, 1, 1], [7]]
    assert [batches[n] for n in (8, 11)] == [[7, 1], [7, 4]]


def test_nothing_to_encode_is_an_error(params):
    with pytest.raises(ValueError, match="at least one text or video"):
        Retriever({}, MODEL, params).encode("encode_text", (IDS[:0], TEXT_MASK[:0]), 64)


@pytest.mark.parametrize("pairs", [1, 12, 10**6])
def test_blocked_similarity_matches_one_piece(params, features, direct, pairs):
    """Takes primes for T and V, which no block but the smallest and the largest divides."""
    bar = tqdm(file=io.StringIO())
    compare = Retriever({}, MODEL, params).similarity
    found = compare(*features, block_cells=18 * pairs, bar=bar)
    assert found.shape == (NUM_TEXTS, NUM_VIDEOS)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, direct[2], atol=2e-5)
    assert bar.n == NUM_TEXTS * NUM_VIDEOS


def test_similarity_of_any_size_compiles_few_programs(params, features, compilations):
    text, video = features
    compare = Retriever({}, MODEL, params).similarity
    for texts in range(1, NUM_TEXTS + 1):
        few = jax.tree.map(lambda x, n=texts: x[:n], text)
        assert compare(few, video).shape == (texts, NUM_VIDEOS)
    assert 1 <= compilations() <= 3  # 1, 4, 16 texts
    for videos in range(5, NUM_VIDEOS + 1):
        few = jax.tree.map(lambda x, n=videos: x[:n], video)
        assert compare(text, few).shape == (NUM_TEXTS, videos)
    assert compilations() == 0


def test_blocks_stay_within_their_budget(params, features, monkeypatch):
    """Checks that the device never computes more word-frame cells at once than the budget."""
    seen, unwatched = [], comparison.compare_blocks

    def watched(params, text, video, count, *, size, **options):
        seen.append((size, len(video.mask)))
        return unwatched(params, text, video, count, size=size, **options)

    monkeypatch.setattr(comparison, "compare_blocks", watched)
    Retriever({}, MODEL, params).similarity(*features, block_cells=18 * 12)
    ((texts, videos),) = set(seen)  # one shape, one compilation
    assert 1 <= texts * videos <= 12


def test_device_is_given_the_next_item_before_the_last_is_taken():
    made = []
    items = inference.one_ahead(made.append(n) or n for n in range(3))
    assert [(item, len(made)) for item in items] == [(0, 2), (1, 3), (2, 3)]
    assert list(inference.one_ahead([])) == []


def test_block_shape_uses_the_budget():
    for cells_a_pair in (1, 18, 144, 384, 4096):
        for block_cells in (1, 100, 4096, 100_000, 1 << 20, 1 << 26):
            texts, videos = block_shape(cells_a_pair, block_cells)
            pairs = texts * videos
            assert pairs >= 1
            assert pairs == 1 or pairs * cells_a_pair <= block_cells
            if block_cells >= 4 * cells_a_pair:
                assert pairs * cells_a_pair >= block_cells / 2  # the budget is used
            assert videos >= texts


@pytest.mark.parametrize("size", [1, 3, 32, 64])
def test_any_number_of_rows_is_split_into_few_sizes(size):
    sizes = set()
    for total in range(1, 200):
        parts = list(inference.split_counts(total, size))
        assert [start for start, _ in parts] == np.cumsum([0, *(n for _, n in parts)])[:-1].tolist()
        assert sum(count for _, count in parts) == total
        sizes |= {count for _, count in parts}
    assert len(sizes) <= 4


def test_power_of_four_is_the_nearest():
    assert [inference.power_of_four(n, up=True) for n in (1, 2, 4, 5, 16, 17)] == [
        1,
        4,
        4,
        16,
        16,
        64,
    ]
    assert [inference.power_of_four(n, up=False) for n in (1, 3, 4, 15, 16, 63)] == [
        1,
        1,
        4,
        4,
        16,
        16,
    ]
