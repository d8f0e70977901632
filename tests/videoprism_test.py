"""Tests of VideoPrism-LvT: conversion, parity, its tokenizer, AOSM and training on it."""

import dataclasses
import json
from fractions import Fraction
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import video_files
import videoprism_files

import xclip_jax
from xclip_jax import prepare, train
from xclip_jax.cli import InputError
from xclip_jax.config import get_config
from xclip_jax.convert.exporting import export
from xclip_jax.convert.importing import convert, import_model
from xclip_jax.convert.mapping import to_tensors
from xclip_jax.convert.reading import Options
from xclip_jax.convert.videoprism import read_videoprism
from xclip_jax.data.builder import Dataset
from xclip_jax.data.pipeline import choose_frames
from xclip_jax.data.preprocess import FrameFormat
from xclip_jax.data.text import load_tokenizer
from xclip_jax.data.video import VideoReader, read_frames
from xclip_jax.evaluate import check_frames
from xclip_jax.initialization import adopt_encoders
from xclip_jax.models import XClip, transformer
from xclip_jax.models.config import check_model
from xclip_jax.models.xclip import normalize
from xclip_jax.search.segments import SegmentJob, load_frames, read_segments

GOLDENS = Path(__file__).resolve().parents[2] / "shared" / "goldens_encoders"
NAMES = sorted(path.parent.name for path in GOLDENS.glob("videoprism_*/expected.npz"))
RELATIVE = 1e-5  # of the largest value of an array
TEXTS = ["the red square moves left", "Blue circle!", "a grey circle turns right, slowly"]
golden = pytest.mark.parametrize(
    "name", NAMES or [pytest.param("", marks=pytest.mark.skip(f"no golden models in {GOLDENS}"))]
)


def assert_close(actual, expected, limit=RELATIVE):
    actual = np.asarray(actual, np.float64)
    assert actual.shape == expected.shape
    worst = np.abs(actual - expected).max() / np.abs(expected).max()
    assert worst <= limit, f"{worst:.1e}"


@pytest.fixture(scope="module")
def arrays():
    return videoprism_files.draw()


@pytest.fixture(scope="module")
def checkpoint(arrays, tmp_path_factory):
    return videoprism_files.write(tmp_path_factory.mktemp("videoprism") / "small", arrays)


@pytest.fixture(scope="module")
def directory(checkpoint, tmp_path_factory):
    """Returns the converted model, with the head of X-CLIP."""
    folder = tmp_path_factory.mktemp("converted") / "model"
    convert(checkpoint, folder, Options(head="xclip"))
    return folder


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


def test_conversion_reads_sizes_and_settings(checkpoint):
    config = import_model(checkpoint).config
    assert (config.embed_dim, config.max_words, config.max_frames) == (16, 64, 3)
    v, t = config.vision, config.text
    assert (v.image_size, v.patch_size, v.mlp_width, v.heads) == (12, 4, 40, 2)
    assert (v.layers, v.temporal_layers, v.joint_layers, v.num_frames) == (2, 1, 1, 3)
    assert (t.vocab_size, t.layers, t.mlp_width, t.start_token) == (42, 2, 0, False)
    assert config.preprocess.spread
    assert config.preprocess.interpolation == "lanczos"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vision.pool", "class_token"),
        ("vision.projection", "linear"),
        ("vision.temporal_layers", 0),
        ("vision.num_frames", 0),
        ("text.causal", False),
    ],
)
def test_fields_that_the_towers_do_not_have_are_refused(checkpoint, field, value):
    section, name = field.split(".")
    config = import_model(checkpoint).config
    part = dataclasses.replace(getattr(config, section), **{name: value})
    with pytest.raises(ValueError, match="must be"):
        check_model(dataclasses.replace(config, **{section: part}))


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


@pytest.mark.parametrize(
    ("count", "spread", "expected"),
    [(16, 4, [0, 4, 8, 12]), (10, 4, [0, 2, 5, 7]), (3, 4, [0, 0, 1, 2]), (1, 3, [0, 0, 0])],
)
def test_spread_frames_start_equal_parts_of_the_video(tmp_path, count, spread, expected):
    path = video_files.write(tmp_path / "a.mp4", video_files.at_rate(25, count))
    frames = read_frames(path, FrameFormat(32, spread=spread))
    assert video_files.numbers(frames) == expected
    assert choose_frames(count, spread, spread=True).tolist() == expected
    assert frames.times == pytest.approx([number / 25 for number in expected])


def test_spread_frames_of_a_part_lie_within_it(tmp_path):
    path = video_files.write(tmp_path / "a.mp4", video_files.at_rate(25, 40))
    frames = read_frames(path, FrameFormat(32, spread=4), start=0.4, end=1.2)
    assert video_files.numbers(frames) == [10, 15, 20, 25]
    past = read_frames(path, FrameFormat(32, spread=4), start=1.28, end=60.0)
    assert video_files.numbers(past) == [32, 34, 36, 38]
    single = read_frames(path, FrameFormat(32, spread=3), start=0.4, end=0.4)
    assert video_files.numbers(single) == [10, 10, 10]


def test_times_past_the_end_show_the_last_picture(tmp_path):
    path = video_files.write(tmp_path / "a.mp4", video_files.at_rate(10, 20))
    times = [Fraction(1, 2), Fraction(1, 2), Fraction(19, 10), Fraction(9)]
    seen = [time for time, _ in VideoReader(path, times=times)]
    assert seen == pytest.approx([0.5, 0.5, 1.9, 1.9])


def test_segments_have_the_frames_that_a_model_is_given_of_their_part(tmp_path):
    path = video_files.write(tmp_path / "a.mp4", video_files.at_rate(25, 44))
    job = SegmentJob(str(path), tmp_path / "frames", FrameFormat(32, spread=4), 4, 1)
    cut, note, _ = read_segments(job)
    assert note is None
    assert [(s.start, s.end) for s in cut] == [(0, 1), (1, pytest.approx(1.76))]
    for segment, frames in zip(cut, load_frames(job, cut), strict=True):
        one = read_frames(path, job.format, start=segment.start, end=segment.end)
        np.testing.assert_array_equal(frames, one.frames)
        length = segment.end - segment.start
        starts = [segment.start + k * length / 4 for k in range(4)]
        assert segment.times == pytest.approx(starts)


BAD = {
    "no text": (lambda a: {k: v for k, v in a.items() if "text_encoder" not in k}, "text_encoder"),
    "missing": (lambda a: {k: v for k, v in a.items() if "per_dim" not in k}, "per_dim_scale"),
    "unknown": (lambda a: a | {"params/post_ln/scale": np.zeros(3, "f4")}, "post_ln/scale"),
    "other": (lambda a: {"weights": np.zeros(3)}, "found weights"),
    "NaN": (
        lambda a: a | {"params/text_encoder/cls_emb": np.full((1, 1, 16), np.nan, "f4")},
        "NaN",
    ),
    "patches": (
        lambda a: a | {"params/vision_encoder/patch_projection/linear/kernel": np.zeros((47, 16))},
        "patch_projection has 47 rows",
    ),
    "shape": (
        lambda a: a | {"params/text_encoder/unimodal_ln/scale": np.zeros(3, "f4")},
        "ln_final.weight has shape",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_file_of_another_kind_is_refused(arrays, tmp_path, case):
    change, message = BAD[case]
    folder = videoprism_files.write(tmp_path / "bad", change(arrays))
    with pytest.raises(InputError, match=message):
        import_model(folder)


def test_vocabulary_of_another_size_is_refused(arrays, tmp_path):
    folder = videoprism_files.write(tmp_path / "small", arrays)
    for content, message in (
        (videoprism_files.learn_vocabulary(39), "has 39 pieces, but the text tower has 42"),
        (b"", "the file is empty"),
    ):
        (folder / "sentencepiece.model").write_bytes(content)
        with pytest.raises(InputError, match=message):
            import_model(folder)


def test_option_that_the_model_contradicts_is_refused(checkpoint):
    with pytest.raises(InputError, match="--activation=gelu: VideoPrism-LvT has relu: omit it"):
        import_model(checkpoint, Options(activation="gelu"))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 broken", b"no archive at all"])
def test_corrupted_file_is_refused(arrays, tmp_path, content):
    folder = videoprism_files.write(tmp_path / "bad", arrays)
    next(folder.glob("*.npz")).write_bytes(content)
    with pytest.raises(InputError, match=r"not a complete \.npz file"):
        import_model(folder)
    (folder / "sentencepiece.model").write_bytes(b"nothing")
    with pytest.raises(InputError, match="no model of SentencePiece"):
        load_tokenizer(folder)


def test_pickled_arrays_are_refused(arrays, tmp_path):
    bad = arrays | {"params/text_encoder/cls_emb": np.array([print], object)}
    with pytest.raises(InputError, match=r"not a complete \.npz file"):
        import_model(videoprism_files.write(tmp_path / "bad", bad))


def test_tokenizer_of_another_family_is_refused(tmp_path):
    tiny.learn_tokenizer(TEXTS).save(tmp_path / "clip")
    larger = videoprism_files.draw(videoprism_files.Sizes(vocab=600))
    folder = videoprism_files.write(tmp_path / "large", larger, vocab_size=42)
    with pytest.raises(InputError, match="ends texts with an end token, unlike the model"):
        import_model(folder, Options(vocab=tmp_path / "clip"))


def test_export_to_transformers_is_refused(directory, tmp_path):
    with pytest.raises(InputError, match="transformers has no model with"):
        export(directory, tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


def prepare_clips(folder, directory, count=8):
    """Prepares small videos in the format of a model, returns the data set's folder."""
    names = []
    for number in range(count):
        shades = [np.full((24, 24, 3), 25 * number + 5 * k, np.uint8) for k in range(8)]
        video_files.write(folder / f"clip{number}.mp4", video_files.at_rate(4, 8), shades)
        names.append(f"clip{number}.mp4")
    captions = [
        f"the {color} circle moves {way}"
        for color in ("red", "blue", "grey")
        for way in ("left", "right", "up")
    ]
    lines = [{"video": name, "caption": captions[i]} for i, name in enumerate(names)]
    splits = {0: "val", 1: "val"} | dict.fromkeys(range(2, count + 2), "train")
    lines = [line | {"split": splits[i]} for i, line in enumerate(lines)]
    path = folder / "captions.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = ["--dataset=captions", f"--videos={folder}", f"--annotations={path}"]
    prepare.main([*arguments, f"--output={folder / 'data'}", f"--model={directory}"])
    return folder / "data"


def test_training_starts_at_the_converted_vectors_and_improves(directory, tmp_path, capsys):
    (tmp_path / "videos").mkdir()
    data = prepare_clips(tmp_path / "videos", directory)
    assert "3 spread over the whole video" in capsys.readouterr().out
    fields = {
        "model.max_words": 16,
        "model.temporal.type": "none",
        "train.batch_size": 6,
        "train.epochs": 0,
        "optimizer.lr": 1e-3,
        "optimizer.encoder_lr": 1e-3,
        "log.every": 1,
        "log.tensorboard": False,
        "report.attention_pairs": 1,
    }

    def run(name, **changes):
        config = get_config()
        config.data.path, config.init.clip = str(data), str(directory)
        config.update_from_flattened_dict(fields | changes)
        adopt_encoders(config, fields.keys() | changes.keys())
        assert config.model.max_frames == 3
        train.train(config, tmp_path / name)
        return xclip_jax.load(tmp_path / name)

    started, original = run("start"), xclip_jax.load(directory)
    jax.tree.map(np.testing.assert_array_equal, started.params["clip"], original.params["clip"])
    paths = sorted(map(str, (tmp_path / "videos").glob("*.mp4")))
    both = [retriever.encode_video(paths).video for retriever in (started, original)]
    np.testing.assert_allclose(*both, atol=1e-6)
    run("run", **{"train.epochs": 40, "optimizer.layer_decay": 0.9, "optimizer.freeze_layers": 1})
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert np.mean(losses[-3:]) < 0.8 * losses[0]
    trained = xclip_jax.load(tmp_path / "run").params["clip"]["visual"]
    before = original.params["clip"]["visual"]
    for stack, frozen in (("encoder", 1), ("temporal", 0), ("joint", 0)):
        for a, b in zip(
            jax.tree.leaves(trained[stack]), jax.tree.leaves(before[stack]), strict=True
        ):
            same = np.array([np.array_equal(x, y) for x, y in zip(a, b, strict=True)])
            assert same.tolist() == [layer < frozen for layer in range(len(same))], stack


def test_temporal_encoder_starts_from_the_text_blocks(directory, tmp_path, capsys):
    (tmp_path / "videos").mkdir()
    data = prepare_clips(tmp_path / "videos", directory)
    config = get_config()
    config.data.path, config.init.clip = str(data), str(directory)
    config.model.temporal.heads = 2
    config.train.update(batch_size=6, epochs=0)
    config.log.tensorboard = False
    adopt_encoders(config)
    train.train(config, tmp_path / "run")
    out = capsys.readouterr().out
    assert "random: CLIP's text tower has blocks of another size, or fewer" in out  # 3 of 2
    config.model.temporal.layers = 2
    train.train(config, tmp_path / "two")
    assert "the first 2 blocks of CLIP's text tower; positions random" in capsys.readouterr().out
    params = xclip_jax.load(tmp_path / "two").params
    blocks = params["clip"]["textual"]["encoder"], params["temporal_encoder"]["encoder"]
    jax.tree.map(np.testing.assert_array_equal, *blocks)


def test_number_of_frames_is_that_of_the_model_directory(checkpoint, tmp_path):
    convert(checkpoint, tmp_path / "two", Options(max_frames=2))
    config = get_config()
    config.init.clip = str(tmp_path / "two")
    config.model.temporal.type = "none"
    adopt_encoders(config)
    assert (config.model.max_frames, config.model.vision.num_frames) == (2, 3)
    config.model.max_frames = 4
    adopt_encoders(config, ["model.max_frames"])
    assert config.model.max_frames == 4


def test_data_of_another_sampling_is_refused(directory, tmp_path):
    (tmp_path / "videos").mkdir()
    data = prepare_clips(tmp_path / "videos", directory)
    dataset, model = Dataset(data), XClip(xclip_jax.load(directory).model.config).config
    check_frames(dataset, model)
    check_frames(dataset, dataclasses.replace(model, max_frames=2))  # a part of the frames is used
    with pytest.raises(InputError, match=r"model.max_frames = 5: .* with 3: .* --spread=5"):
        check_frames(dataset, dataclasses.replace(model, max_frames=5))
    every_second = dataclasses.replace(model.preprocess, spread=False)
    with pytest.raises(InputError, match=r"preprocess.spread = False: .* with True"):
        check_frames(dataset, dataclasses.replace(model, preprocess=every_second))


def test_model_without_a_vocabulary_says_where_it_is(arrays, tmp_path, capsys):
    folder = videoprism_files.write(tmp_path / "small", arrays)
    (folder / "sentencepiece.model").unlink()
    convert(folder, tmp_path / "model")
    assert "--vocab=sentencepiece.model, from https://" in capsys.readouterr().out
    assert xclip_jax.load(tmp_path / "model").tokenizer is None


def test_file_beside_the_port_of_transformers_is_used(arrays, tmp_path):
    folder = videoprism_files.write(tmp_path / "small", arrays)
    (folder / "config.json").write_text(json.dumps({"model_type": "videoprism_clip"}))
    (folder / "model.safetensors").write_bytes(b"")
    assert import_model(folder).kind == "VideoPrism-LvT npz"
