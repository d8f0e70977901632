"""Tests of comparing many texts with many videos in blocks."""

import functools
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tqdm import tqdm

from xclip_jax import comparison, inference
from xclip_jax.comparison import compare_all, compare_blocks, split_by_length
from xclip_jax.models import ModelConfig, XClip
from xclip_jax.similarity import TextFeatures, VideoFeatures

DIM, WORDS, FRAMES = 16, 9, 5


def make_features(texts, videos, *, weights=False, seed=0):
    """Returns random features of random lengths, with noise at masked positions."""
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
def separate(monkeypatch):
    """Compares short texts and videos separately even if there are few."""
    monkeypatch.setattr(comparison, "MANY_CELLS", 0)


# One block; blocks of a pair; several blocks of several texts in a call.
@pytest.mark.parametrize("block_cells", [0, 1, 5 * 8 * WORDS * FRAMES])
@pytest.mark.parametrize("fields", [{}, {"aggregation": "mean-max"}, {"aggregation": "weighted"}])
def test_blocks_of_short_and_long_equal_one_program(fields, block_cells, separate):
    model, params = make_model(**fields)
    features = make_features(23, 17, weights=bool(fields))
    found = compare(model, params, features, block_cells=block_cells)
    expected = jax.jit(functools.partial(model.apply, method="similarities"))(
        {"params": params}, *features
    )
    assert found.keys() == expected.keys() == {"all", *model.config.granularities}
    for name, sims in expected.items():
        np.testing.assert_allclose(found[name], sims, atol=3e-6, err_msg=name)


def test_short_ones_are_computed_without_their_padding(separate, monkeypatch):
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
    "fields",
    [
        {"padding": "competes"},
        {"fusion": "transformer"},
        {"head": "tight_transformer"},
        {"head": "mean_pooling"},  # without words or frames
    ],
)
def test_models_that_depend_on_padding_compare_full_lengths(fields, separate, monkeypatch):
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
    groups = split_by_length(mask, size)
    rows = np.concatenate([rows for rows, _ in groups])
    np.testing.assert_array_equal(np.sort(rows), np.arange(37))
    for rows, length in groups:
        assert not mask[rows, length:].any()
    if size < 37:  # the short ones fill blocks
        assert [length for _, length in groups] == [5, WORDS]
        assert len(groups[0][0]) % size == 0
        assert (mask.sum(1) <= 5).sum() - len(groups[0][0]) < size


def test_gap_in_a_mask_does_not_shorten_it():
    mask = np.zeros((4, 8), bool)
    mask[:, [0, 7]] = True
    mask[1, 7] = False
    groups = split_by_length(mask, 1)
    assert [(rows.tolist(), length) for rows, length in groups] == [([1], 4), ([0, 2, 3], 8)]


def test_a_single_text_or_video(separate):
    model, params = make_model()
    for texts, videos in ((1, 1), (1, 30), (30, 1)):
        features = make_features(texts, videos)
        found = compare(model, params, features, "similarity")["all"]
        expected = model.apply({"params": params}, *features, method="similarity")
        np.testing.assert_allclose(found, expected, atol=3e-6)


def test_blocks_after_the_given_number_are_not_computed():
    model, params = make_model()
    features = make_features(12, 6)
    options = {"model": model, "method": "similarity", "size": 3}
    whole = compare_blocks(params, *features, 4, **options)
    some = compare_blocks(params, *features, 2, **options)
    np.testing.assert_array_equal(some[:6], whole[:6])
    assert not np.any(some[6:])
    assert np.all(whole[6:] != 0)


def test_videos_are_split_over_the_devices_of_the_parameters(separate):
    model, params = make_model()
    features = make_features(23, 16)
    expected = compare(model, params, features)
    found = compare(model, inference.copy_to_local_devices(params), features)
    assert jax.local_device_count() > 1
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-6), found, expected)


def test_jax_arrays_are_compared_like_numpy_arrays(separate):
    model, params = make_model()
    features = make_features(9, 8)
    found = compare(model, params, jax.tree.map(jnp.asarray, features))
    expected = compare(model, params, features)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_progress_counts_pairs(separate):
    model, params = make_model()
    bar = tqdm(file=io.StringIO())
    compare(model, params, make_features(23, 17), block_cells=500, bar=bar)
    assert bar.n == 23 * 17
