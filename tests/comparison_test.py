"""Tests of comparing many texts with many videos in blocks."""

import functools
import io

import jax
import numpy as np
import pytest
from tqdm import tqdm

from xclip_jax import comparison
from xclip_jax.comparison import compare_all, split_by_length
from xclip_jax.models import ModelConfig, XClip
from xclip_jax.similarity import TextFeatures, VideoFeatures

DIM, WORDS, FRAMES = 16, 9, 5


def make_features(texts, videos, *, weights=False, seed=0):
    """Returns random features of random lengths; what the masks leave out is noise."""
    rng = np.random.default_rng(seed)

    def unit(*shape):
        x = rng.standard_normal((*shape, DIM)).astype(np.float32)
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    words = np.arange(WORDS) < rng.integers(3, WORDS + 1, (texts, 1))
    frames = np.arange(FRAMES) < rng.integers(1, FRAMES + 1, (videos, 1))
    logits = [
        rng.standard_normal(x.shape).astype(np.float32) if weights else None
        for x in (words, frames)
    ]
    text = TextFeatures(unit(texts), unit(texts, WORDS), words, logits[0])
    return text, VideoFeatures(unit(videos), unit(videos, FRAMES), frames, logits[1])


def make_model(**fields):
    config = ModelConfig(embed_dim=DIM, max_words=WORDS, max_frames=FRAMES, **fields)
    return XClip(config.resolve()), {"clip": {"logit_scale": np.float32(np.log(7))}}


def compare(model, params, features, method="similarities", **options):
    return compare_all(model, params, features, method=method, **options)


@pytest.fixture
def apart(monkeypatch):
    """Compares short texts and videos apart, however few there are."""
    monkeypatch.setattr(comparison, "MANY_CELLS", 0)


@pytest.mark.parametrize("block_cells", [0, 1, 500])
@pytest.mark.parametrize("fields", [{}, {"aggregation": "mean-max"}, {"aggregation": "weighted"}])
def test_blocks_of_short_and_long_equal_one_program(fields, block_cells, apart):
    model, params = make_model(**fields)
    features = make_features(23, 17, weights=bool(fields))
    found = compare(model, params, features, block_cells=block_cells)
    expected = jax.jit(functools.partial(model.apply, method="similarities"))(
        {"params": params}, *features
    )
    assert found.keys() == expected.keys() == {"all", *model.config.granularities}
    for name, sims in expected.items():
        np.testing.assert_allclose(found[name], sims, atol=3e-6, err_msg=name)


def test_short_ones_are_computed_without_their_padding(apart, monkeypatch):
    model, params = make_model()
    seen = []

    def spy(params, text, video, count, **options):
        seen.append((text.words.shape[1], video.frames.shape[1]))
        return run(params, text, video, count, **options)

    run = comparison.compare_blocks
    monkeypatch.setattr(comparison, "compare_blocks", spy)
    compare(model, params, make_features(40, 40), block_cells=4 * 4 * WORDS * FRAMES)
    assert set(seen) == {(5, 3), (5, FRAMES), (WORDS, 3), (WORDS, FRAMES)}


@pytest.mark.parametrize(
    "fields", [{"padding": "competes"}, {"fusion": "transformer"}, {"head": "tight_transformer"}]
)
def test_models_that_see_padding_or_positions_compare_whole_lengths(fields, apart, monkeypatch):
    model, _ = make_model(**fields)
    shapes = []

    def stop(params, text, video, count, **_):
        shapes.append((text.words.shape[1], video.frames.shape[1]))
        return np.zeros((len(text.mask), len(video.mask)), np.float32)

    monkeypatch.setattr(comparison, "compare_blocks", stop)
    compare(model, {"x": np.zeros(1)}, make_features(30, 30), "similarity")
    assert set(shapes) == {(WORDS, FRAMES)}


@pytest.mark.parametrize("size", [1, 4, 100])
def test_groups_hold_each_row_once_and_all_its_positions(size):
    mask = make_features(37, 1)[0].mask
    groups = split_by_length(mask, size, apart=True)
    rows = np.concatenate([rows for rows, _ in groups])
    np.testing.assert_array_equal(np.sort(rows), np.arange(37))
    for rows, length in groups:
        assert not mask[rows, length:].any()
    if size < 37:  # the short ones fill blocks
        assert [length for _, length in groups] == [5, WORDS]
        assert len(groups[0][0]) % size == 0
        assert (mask.sum(1) <= 5).sum() - len(groups[0][0]) < size
    ((everything, length),) = split_by_length(mask, size, apart=False)
    np.testing.assert_array_equal(everything, np.arange(37))
    assert length == WORDS


def test_gap_in_a_mask_does_not_shorten_it():
    mask = np.zeros((4, 8), bool)
    mask[:, [0, 7]] = True
    mask[1, 7] = False
    groups = split_by_length(mask, 1, apart=True)
    assert [(rows.tolist(), length) for rows, length in groups] == [([1], 4), ([0, 2, 3], 8)]


def test_one_text_or_none_of_a_group(apart):
    model, params = make_model()
    for texts, videos in ((1, 1), (1, 30), (30, 1)):
        found = compare(model, params, make_features(texts, videos), "similarity")["all"]
        whole = make_features(texts, videos)
        expected = model.apply({"params": params}, *whole, method="similarity")
        np.testing.assert_allclose(found, expected, atol=3e-6)


def test_progress_counts_pairs(apart):
    model, params = make_model()
    bar = tqdm(file=io.StringIO())
    compare(model, params, make_features(23, 17), block_cells=500, bar=bar)
    assert bar.n == 23 * 17
