"""Tests of presets, heads, learned matrices and Transformers over pairs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from xclip_jax.config import get_config
from xclip_jax.loss import contrastive_loss
from xclip_jax.models import XClip, read_model_config
from xclip_jax.models.config import HEADS
from xclip_jax.retriever import Retriever
from xclip_jax.similarity import TextFeatures, VideoFeatures, aosm_words, granular_similarity

WORDS, FRAMES, DIM = 5, 4, 8


def model_config(**changes):
    """Returns a tiny ModelConfig, with fields of config.model set by `changes` (__ for dots)."""
    c = get_config().model
    c.update(embed_dim=DIM, max_words=WORDS, max_frames=FRAMES)
    c.vision.update(image_size=4, patch_size=2, width=8, layers=1, heads=2)
    c.text.update(vocab_size=20, context_length=8, width=8, layers=1, heads=2)
    c.temporal.update(heads=2)
    for name, value in changes.items():
        *parents, last = name.split("__")
        group = c
        for parent in parents:
            group = group[parent]
        group[last] = value
    return read_model_config(c)


def batch(texts=3, videos=2, seed=0):
    rng = np.random.default_rng(seed)
    ids = rng.integers(1, 19, (texts, WORDS)).astype(np.int32)
    words = np.arange(WORDS) < rng.integers(3, WORDS, (texts, 1))
    ids[np.arange(texts), words.sum(1) - 1] = 19  # the end token, at the sentence's position
    frames = rng.normal(size=(videos, FRAMES, 4, 4, 3)).astype(np.float32)
    return ids * words, words, frames, np.arange(FRAMES) < rng.integers(1, FRAMES, (videos, 1))


def make(seed=0, **changes):
    model = XClip(model_config(**changes))
    fresh = tiny.make_params(model, seed)
    rng = np.random.default_rng(seed)
    return model, jax.tree.map(lambda x: x + rng.normal(0, 0.2, x.shape).astype(x.dtype), fresh)


def test_preset_determines_fields_that_are_not_set():
    paper, official = model_config(), model_config(preset="official")
    fields = ("frame_features", "words", "padding", "matrices")
    assert [getattr(paper, f) for f in fields] == ["temporal", "word_tokens", "masked", False]
    assert [getattr(official, f) for f in fields] == ["clip", "all_tokens", "competes", True]
    assert (paper.temporal.layers, official.temporal.layers) == (3, 4)
    assert (paper.temporal.residual, official.temporal.residual) == (False, True)
    mixed = model_config(preset="official", matrices=False, temporal__layers=2)
    assert (mixed.matrices, mixed.temporal.layers, mixed.padding) == (False, 2, "competes")
    unset = model_config(preset="official", temporal__residual=False)
    assert not unset.temporal.residual
    assert mixed.resolve() == mixed


@pytest.mark.parametrize(
    ("head", "preset"),
    [("xclip", "official"), *((head, "paper") for head in HEADS)]
    + [pytest.param(h, "official", marks=pytest.mark.slow) for h in HEADS if h != "xclip"],
)
def test_logits_do_not_depend_on_the_rest_of_the_batch(head, preset):
    model, params = make(head=head, preset=preset)
    inputs, others = batch(), batch(seed=1)
    for array, other, row in zip(inputs, others, (2, 2, 1, 1), strict=True):
        other[row] = array[row]
    sim_TxV, among_others = (tiny.apply(model, params, *each) for each in (inputs, others))
    assert sim_TxV.shape == (3, 2)
    np.testing.assert_allclose(among_others[2, 1], sim_TxV[2, 1], atol=1e-4)
    assert abs(among_others[0, 0] - sim_TxV[0, 0]) > 1e-3


def test_clip4clip_heads_are_cosines_of_sentence_and_video():
    for head in ("mean_pooling", "seq_lstm", "seq_transformer"):
        model, params = make(head=head, preset="official")
        ids, words, frames, mask = batch()
        text = tiny.apply(model, params, ids, words, method="encode_text")
        video = tiny.apply(model, params, frames, mask, method="encode_video")
        scale = float(jnp.exp(params["clip"]["logit_scale"]))
        expected = scale * text.sentence @ video.video.T
        sim_TxV = tiny.apply(model, params, ids, words, frames, mask)
        np.testing.assert_allclose(sim_TxV, expected, rtol=1e-4)
        assert "aggregation_matrices" not in params


def test_residual_adds_the_clip_frames():
    model, params = make(temporal__residual=True, frame_features="temporal")
    plain = XClip(model_config(temporal__residual=False))
    _, _, frames, mask = batch()

    def raw(m):
        def method(m, frames, mask):
            _, clip = m.encode_frames(frames, mask)
            return clip, m.relate_frames(clip, mask)

        return tiny.apply(m, params, frames, mask, method=method)

    (clip, added), (_, alone) = raw(model), raw(plain)
    np.testing.assert_allclose(added, alone + clip, atol=1e-5)


def features(seed=0, texts=3, videos=2):
    rng = np.random.default_rng(seed)

    def unit(*shape):
        x = rng.normal(size=(*shape, DIM)).astype(np.float32)
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    words = np.arange(WORDS) < rng.integers(3, WORDS, (texts, 1))
    frames = np.arange(FRAMES) < rng.integers(1, FRAMES, (videos, 1))
    return (
        TextFeatures(unit(texts), unit(texts, WORDS), words),
        VideoFeatures(unit(videos), unit(videos, FRAMES), frames),
    )


def test_special_tokens_and_padding_take_part_if_configured():
    mask = np.array([[True, True, True, True, False]])
    for special, padding, expected in [
        (False, False, [0, 1, 1, 0, 0]),
        (True, False, [1, 1, 1, 1, 0]),
        (False, True, [0, 1, 1, 0, 1]),
        (True, True, [1, 1, 1, 1, 1]),
    ]:
        found = aosm_words(mask, special_tokens=special, padding=padding)[0]
        assert np.asarray(found).tolist() == list(map(bool, expected))
    for padding, expected in (("competes", np.ones_like(mask)), ("masked", mask)):
        model = XClip(model_config(padding=padding))
        np.testing.assert_array_equal(model.aosm_frames(mask), expected)


def test_learned_matrices_match_loops():
    """Computes the weights as softmax(s / tau) @ M along the attended axis."""
    text, video = features()
    rng, tau = np.random.default_rng(1), 0.1
    sizes = {"video_sentence": DIM, "frame_word": DIM}
    sizes |= {"video_word": WORDS, "frame_sentence": FRAMES}
    sizes |= {f"frame_word_words{n}": WORDS for n in ("", "_2")}
    sizes |= {f"frame_word_frames{n}": FRAMES for n in ("", "_2")}
    m = {name: rng.normal(size=(n, n)) for name, n in sizes.items()}
    single = {name: x.astype(np.float32) for name, x in m.items()}
    everything = np.ones_like(text.mask), np.ones_like(video.mask)
    masks = dict(zip(("words_TxW", "frames_VxF"), everything, strict=True))
    found = granular_similarity(text, video, tau=tau, matrices=single, **masks)

    def attend(scores, matrix):
        weights = np.exp(scores / tau) / np.exp(scores / tau).sum()
        return (weights @ matrix) @ scores

    for t in range(3):
        for v in range(2):
            sentence, words = text.sentence[t].astype(float), text.words[t].astype(float)
            whole, frames = video.video[v].astype(float), video.frames[v].astype(float)
            matrix = words @ m["frame_word"] @ frames.T
            by_word = [attend(row, m["frame_word_frames"]) for row in matrix]
            by_frame = [attend(column, m["frame_word_words"]) for column in matrix.T]
            both = attend(np.array(by_word), m["frame_word_words_2"])
            both += attend(np.array(by_frame), m["frame_word_frames_2"])
            expected = {
                "video_sentence": sentence @ m["video_sentence"] @ whole,
                "video_word": attend(words @ whole, m["video_word"]),
                "frame_sentence": attend(frames @ sentence, m["frame_sentence"]),
                "frame_word": both / 2,
            }
            for name, value in expected.items():
                np.testing.assert_allclose(found[name][t, v], value, atol=1e-5, err_msg=name)


def test_identity_matrices_change_nothing():
    model, params = make(preset="official")
    identities = jax.tree.map(lambda x: np.eye(len(x)), params["aggregation_matrices"])
    params = {**params, "aggregation_matrices": identities}
    without = XClip(model_config(preset="official", matrices=False))
    plain = {name: x for name, x in params.items() if name != "aggregation_matrices"}
    inputs = batch()
    found = tiny.apply(model, params, *inputs)
    np.testing.assert_allclose(found, tiny.apply(without, plain, *inputs), atol=1e-4)
    fresh = tiny.make_params(model)["aggregation_matrices"]
    assert len(fresh) == 8
    assert all(np.array_equal(x, np.eye(len(x))) for x in fresh.values())


@pytest.mark.parametrize("options", [{"head": "tight_transformer"}, {"fusion": "transformer"}])
def test_transformers_over_pairs_ignore_padding(options):
    model, params = make(**options)
    text, video = features()
    apply = functools.partial(tiny.apply, model, params, method="similarity")
    sim_TxV = apply(text, video)
    noise = np.random.default_rng(5).normal(size=video.frames.shape).astype(np.float32)
    frames = np.where(video.mask[..., None], video.frames, noise)
    words = np.where(text.mask[..., None], text.words, 7)
    padded = apply(text.replace(words=words), video.replace(frames=frames))
    np.testing.assert_allclose(padded, sim_TxV, atol=1e-5)
    seen = apply(text, video.replace(frames=-video.frames))
    assert np.abs(seen - sim_TxV).max() > 1e-3
    blocks = Retriever({}, model, params).similarity(text, video, block_cells=1)
    np.testing.assert_allclose(blocks, sim_TxV, atol=1e-5)


def test_tight_transformer_uses_raw_features():
    model, params = make(head="tight_transformer")
    ids, words, frames, mask = batch()
    text = tiny.apply(model, params, ids, words, method="encode_text")
    video = tiny.apply(model, params, frames, mask, method="encode_video")
    assert np.abs(np.linalg.norm(text.sentence, axis=-1) - 1).max() > 0.05
    assert np.abs(np.linalg.norm(video.frames, axis=-1) - 1).max() > 0.05
    with pytest.raises(ValueError, match="has no granularities"):
        tiny.apply(model, params, text, video, method="granular_similarity")


@pytest.mark.parametrize(
    "options",
    [{"fusion": "transformer"}, {"head": "seq_lstm"}, {"head": "tight_transformer"}]
    + [
        pytest.param({"head": head}, marks=pytest.mark.slow)  # tests of training cover xclip
        for head in ("xclip", "mean_pooling", "seq_transformer")
    ],
    ids=str,
)
def test_every_head_learns_four_pairs(options):
    model, params = make(preset="official", temporal__layers=1, **options)
    ids, words, frames, mask = batch(4, 4)
    optimizer = optax.adam(1e-2)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state):
        def loss_fn(params):
            sim_TxV = tiny.apply(model, params, ids, words, frames, mask)
            return contrastive_loss(sim_TxV)

        loss, gradients = jax.value_and_grad(loss_fn)(params)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(params, updates), state, loss

    first = None
    for _ in range(60):
        params, state, loss = step(params, state)
        first = first or float(loss)
    assert float(loss) < first / 4
