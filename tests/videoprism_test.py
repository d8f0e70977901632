"""Tests of VideoPrism-LvT: parity with the original, its tokenizer and AOSM on it."""

import dataclasses
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import video_files
import videoprism_files
from videoprism_files import TEXTS, arrays, checkpoint, directory

import xclip_jax
from xclip_jax.convert.importing import convert, import_model
from xclip_jax.convert.mapping import to_tensors
from xclip_jax.convert.reading import Options
from xclip_jax.convert.videoprism import read_videoprism
from xclip_jax.data.text import load_tokenizer
from xclip_jax.models import XClip, transformer
from xclip_jax.models.xclip import normalize

__all__ = ["arrays", "checkpoint", "directory"]  # fixtures
GOLDENS = Path(__file__).resolve().parents[2] / "shared" / "goldens_encoders"
NAMES = sorted(path.parent.name for path in GOLDENS.glob("videoprism_*/expected.npz"))
RELATIVE = 1e-5  # of the largest value of an array
golden = pytest.mark.parametrize(
    "name", NAMES or [pytest.param("", marks=pytest.mark.skip(f"no golden models in {GOLDENS}"))]
)


def assert_close(actual, expected, limit=RELATIVE):
    actual = np.asarray(actual, np.float64)
    assert actual.shape == expected.shape
    worst = np.abs(actual - expected).max() / np.abs(expected).max()
    assert worst <= limit, f"{worst:.1e}"


def frames_of(videos=3, frames=3, side=12, seed=0):
    return np.random.default_rng(seed).uniform(size=(videos, frames, side, side, 3)).astype("f4")


@cache
def load_golden(name):
    with np.load(GOLDENS / name / "expected.npz") as file:
        return import_model(GOLDENS / name), {key: file[key] for key in file.files}


def apply(imported, method, *inputs):
    model = XClip(imported.config)
    return jax.jit(partial(model.apply, method=method))({"params": imported.params}, *inputs)


def encode(imported, frames):
    """Returns the vectors of videos and frames before normalisation."""
    return apply(imported, "encode_frames", frames, np.ones(frames.shape[:2], bool))


@golden
def test_video_and_frame_vectors_match_the_original(name):
    imported, expected = load_golden(name)
    video, frames = encode(imported, expected["video"])
    assert_close(video, expected["video_embeddings_unnormalised"])
    assert_close(frames, expected["frame_embeddings_unnormalised"])
    video, frames = encode(imported, expected["video_other_frames"])
    assert_close(normalize(video), expected["video_embeddings_other_frames"])
    assert_close(normalize(frames), expected["frame_embeddings_other_frames"])
    video, _ = encode(imported, expected["video_larger"])
    assert_close(normalize(video), expected["video_embeddings_larger"])


@golden
def test_texts_match_the_original(name):
    imported, expected = load_golden(name)
    for prefix in ("", "strings_"):
        texts = expected["strings" if prefix else "texts"]
        ids, mask = imported.tokenizer(texts.tolist())
        np.testing.assert_array_equal(ids, expected[f"{prefix}ids"])
        np.testing.assert_array_equal(mask, expected[f"{prefix}paddings"] == 0)
        features = apply(imported, "encode_text", ids, mask)
        assert_close(features.sentence, expected[f"{prefix}text_embeddings"])
        if not prefix:
            tokens = np.asarray(normalize(expected["token_embeddings"]))
            assert_close(np.asarray(features.words)[mask], tokens[mask])
    short = load_tokenizer(GOLDENS / name / "sentencepiece.model", 16)
    ids, mask = short(expected["strings"][:12].tolist())
    np.testing.assert_array_equal(ids, expected["strings12_ids_length16"])
    np.testing.assert_array_equal(mask, expected["strings12_paddings_length16"] == 0)


def gradient_norms(gradients, path, scratch):
    """Returns the norm of the gradient of each array in a file, by its name.

    The file is converted with a number in place of the values of each array, which shows to what
    tensors each array goes.
    """
    with np.load(path) as file:
        shapes = {name: file[name].shape for name in file.files if name.startswith("params/")}
    numbered = {name: np.full(shapes[name], 10.0 * i, "f4") for i, name in enumerate(shapes)}
    np.savez(scratch, **numbered)
    tensors, _ = read_videoprism(scratch)
    squares = np.zeros(len(shapes))
    for name, gradient in to_tensors(gradients).items():
        if name != "clip.logit_scale":
            indices = tensors[name].astype(int) // 10  # scales of norms are larger by 1
            np.add.at(squares, indices.ravel(), np.square(np.float64(gradient)).ravel())
    return dict(zip(shapes, np.sqrt(squares), strict=True))


@golden
def test_gradient_norms_match_the_original(name, tmp_path):
    imported, expected = load_golden(name)
    ids, mask = imported.tokenizer(expected["texts"].tolist())
    video, model = expected["video"], XClip(imported.config)

    def loss(params):
        text = model.apply({"params": params}, ids, mask, method="encode_text")
        inputs = {"params": params}, video, np.ones(video.shape[:2], bool)
        vectors = model.apply(*inputs, method="encode_video").video
        logits = text.sentence @ vectors.T / 0.07
        both = (jnp.diagonal(jax.nn.log_softmax(logits, axis)) for axis in (0, 1))
        return -sum(map(jnp.mean, both)) / 2

    value, gradients = jax.jit(jax.value_and_grad(loss))(imported.params)
    assert_close(value, expected["loss_infonce_temperature_0_07"])
    (path,) = (GOLDENS / name).glob("flax_*.npz")
    norms = gradient_norms(jax.device_get(gradients), path, tmp_path / "numbered.npz")
    stated = {k.partition("/")[2]: float(v) for k, v in expected.items() if "grad_norm" in k}
    for key, norm in stated.items():
        assert abs(norms[key] - norm) <= 1e-3 * norm, f"{key}: {norms[key]} for {norm}"


def test_outputs_match_a_reference_in_numpy(arrays, checkpoint):
    imported, reference = import_model(checkpoint), videoprism_files.Reference(arrays)
    frames = frames_of()
    video, vectors = encode(imported, frames)
    expected, expected_frames = reference.encode_video(frames)
    assert_close(video, expected)
    assert_close(vectors, expected_frames)
    ids, mask = imported.tokenizer(TEXTS)
    sentence, words = map(normalize, reference.encode_text(ids, mask))
    features = apply(imported, "encode_text", ids, mask)
    assert_close(features.sentence, np.asarray(sentence))
    assert_close(np.asarray(features.words)[mask], np.asarray(words)[mask])


def test_mean_pooling_is_the_cosine_of_the_own_vectors(arrays, checkpoint, tmp_path):
    convert(checkpoint, tmp_path / "model")
    retriever, reference = xclip_jax.load(tmp_path / "model"), videoprism_files.Reference(arrays)
    pixels = np.random.default_rng(1).integers(0, 256, (4, 3, 12, 12, 3), np.uint8)
    logits = retriever.similarity(retriever.encode_text(TEXTS), retriever.encode_video(pixels))
    ids, mask = retriever.tokenizer(TEXTS)
    sentence, video = reference.encode_text(ids, mask)[0], reference.encode_video(pixels / 255)[0]
    unit = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (sentence, video))
    cosines = np.einsum("td,vd->tv", *unit)
    np.testing.assert_allclose(logits, 100 * cosines, atol=1e-3)  # 1e-5 of the factor


def test_attention_in_blocks_equals_that_of_all_queries(checkpoint, monkeypatch):
    imported, frames = import_model(checkpoint), frames_of()
    mask = np.array([[1, 1, 1], [1, 1, 0], [1, 0, 0]], bool)
    model = XClip(imported.config)

    def compute(params):
        features = model.apply({"params": params}, frames, mask, method="encode_video")
        return jnp.sum(features.video[:, :3]) + jnp.sum(features.frames[:, 0, 3:5]), features

    whole = jax.jit(jax.value_and_grad(compute, has_aux=True))(imported.params)
    monkeypatch.setattr(transformer, "MAX_SCORES", 3 * 2 * 27 * 5)  # blocks of 5 of 27 queries
    parts = jax.jit(jax.value_and_grad(compute, has_aux=True))(imported.params)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * max(1, np.abs(a).max()))


def test_masked_frames_change_nothing(checkpoint):
    imported, frames = import_model(checkpoint), frames_of()
    mask, others = np.array([[True, True, False]] * 3), frames.copy()
    others[:, 2] = 0.5
    first, second = (apply(imported, "encode_video", f, mask) for f in (frames, others))
    np.testing.assert_array_equal(first.video, second.video)
    np.testing.assert_array_equal(first.frames[mask], second.frames[mask])


def test_padding_of_texts_changes_nothing(checkpoint):
    imported = import_model(checkpoint)
    ids, mask = imported.tokenizer(TEXTS)
    short = mask.sum(1).max()
    long = apply(imported, "encode_text", np.where(mask, ids, 7), mask)
    cut = apply(imported, "encode_text", ids[:, :short], mask[:, :short])
    assert_close(long.sentence, np.asarray(cut.sentence))


def test_words_of_aosm_are_all_tokens_but_a_start_token(arrays, tmp_path):
    for bos, name in ((-1, "plain"), (3, "with_start")):
        imported = import_model(videoprism_files.write(tmp_path / name, arrays, bos=bos))
        ids, mask = imported.tokenizer(TEXTS)
        words = np.asarray(XClip(imported.config).aosm_words(mask))
        assert imported.config.text.start_token == (bos == 3)
        assert imported.tokenizer.special_tokens == (int(bos == 3), 0)
        expected = mask.copy()
        if bos == 3:
            assert (ids[:, 0] == 3).all()
            expected[:, 0] = False
        np.testing.assert_array_equal(words, expected)


def test_text_longer_than_the_positions_is_cut(checkpoint):
    tokenizer = load_tokenizer(checkpoint, 5)
    ids, mask = tokenizer(["red green blue grey square circle moves turns"])
    assert mask.all()
    assert ids[0].tolist() == tokenizer.encode("red green blue grey square circle moves turns")[:5]
    assert tokenizer.is_truncated("red green blue grey square circle moves turns")
    assert not tokenizer.is_truncated("red")
    assert len(tokenizer.tokens("red!")) == len(tokenizer.encode("red."))


@pytest.mark.parametrize("temporal", ["none", "transformer", "lstm"])
@pytest.mark.parametrize("preset", ["paper", "official"])
def test_four_granularities_are_those_of_their_vectors(checkpoint, preset, temporal):
    imported = import_model(checkpoint, Options(head="xclip"))
    encoder = dataclasses.replace(imported.config.temporal, type=temporal)
    changes = {"frame_features": None, "words": None, "padding": None, "matrices": None}
    config = dataclasses.replace(imported.config, preset=preset, temporal=encoder, **changes)
    model = XClip(config.resolve())
    frames, mask = frames_of(), np.ones((3, 3), bool)
    ids, text_mask = imported.tokenizer(TEXTS)
    params = jax.jit(model.init)(jax.random.key(0), ids, text_mask, frames, mask)["params"]
    params = {**params, "clip": imported.params["clip"]}

    @jax.jit
    def compute(params):
        text = model.apply({"params": params}, ids, text_mask, method="encode_text")
        video = model.apply({"params": params}, frames, mask, method="encode_video")
        return (
            text,
            video,
            model.apply({"params": params}, text, video, method="granular_similarity"),
        )

    text, video, parts = compute(params)
    assert set(parts) == {"video_sentence", "video_word", "frame_sentence", "frame_word"}
    np.testing.assert_allclose(
        parts["video_sentence"], 100 * text.sentence @ video.video.T, rtol=1e-4, atol=1e-4
    )
    own, own_frames = map(normalize, encode(imported, frames))
    if temporal == "none":  # with an encoder, the video is the mean of its output (Eq. 2)
        assert_close(video.video, np.asarray(own))
        assert_close(video.frames, np.asarray(own_frames))
    else:
        assert np.abs(video.video - own).max() > 1e-2


def test_converted_model_searches_videos_of_any_length(directory, tmp_path):
    retriever = xclip_jax.load(directory)
    paths = [
        str(video_files.write(tmp_path / f"{count}.mp4", video_files.at_rate(4, count)))
        for count in (1, 2, 30)
    ]
    features = retriever.encode_video(paths)
    assert features.mask.all()  # no padding: the frames of a short video are repeated
    assert sorted(m.index for m in retriever.search(TEXTS[0], features)) == [0, 1, 2]
    words, weights = retriever.attention(
        TEXTS[0], retriever.encode_text(TEXTS[:1]), retriever.encode_video(paths[2:])
    )
    assert len(words) == len(retriever.tokenizer.encode(TEXTS[0]))
    assert weights.shape == (len(words), 3)
    np.testing.assert_allclose(weights.sum(), 1, rtol=1e-5)
