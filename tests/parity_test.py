"""Tests of parity with the PyTorch code: reference models are converted, run and trained.

Small reference models are in tests/data. Larger ones run under `-m slow` if a folder `shared` is
next to the project.
"""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from ml_collections import ConfigDict

import xclip_jax
from xclip_jax import train
from xclip_jax.convert import mapping
from xclip_jax.convert.importing import convert
from xclip_jax.loss import LOSS_SCALES, contrastive_loss
from xclip_jax.models import XClip
from xclip_jax.optimizer import Moments, make_optimizer, store_params

SMALL = Path(__file__).parent / "data" / "goldens_small"
LARGE = Path(__file__).resolve().parents[2] / "shared" / "goldens"


def sources(*patterns):
    """Returns the parameters of a fixture, one per reference checkpoint."""
    folders = ((SMALL, ()), (LARGE, pytest.mark.slow))
    paths = ((p, marks) for f, marks in folders for pattern in patterns for p in f.glob(pattern))
    return [pytest.param(path, id=path.stem, marks=marks) for path, marks in sorted(paths, key=str)]


def load(source, folder):
    """Returns (Retriever, golden arrays) of a reference checkpoint."""
    golden = source / "expected.npz" if source.is_dir() else source.with_suffix(".npz")
    convert(source, folder / "model")
    return xclip_jax.load(folder / "model"), dict(np.load(golden))


@pytest.fixture(scope="module", params=sources("*clip_*.bin"))
def release(request, tmp_path_factory):
    return load(request.param, tmp_path_factory.mktemp("release"))


@pytest.fixture(scope="module", params=sources("openai_*.pt", "hf_clip_*"))
def plain_clip(request, tmp_path_factory):
    return load(request.param, tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def step(release):
    retriever, golden = release
    return training_step(retriever, json.loads(str(golden["config"])))


def training_step(retriever, settings, param_dtype="float32"):
    """Returns (jitted step, initial parameters, optimizer state) with the release's optimizer."""

    def optimizer(encoder_ratio):
        options = ConfigDict()
        options.update(
            name="bert_adam",
            lr=settings["lr"],
            encoder_lr=settings["lr"] * encoder_ratio,
            weight_decay=settings["weight_decay"],
            warmup=settings["warmup"],
            b1=0.9,
            b2=0.98,
            eps=1e-6,
            clip_norm=1.0,
            freeze_layers=settings["freeze_layers"],
            layer_decay=1.0,
        )
        return make_optimizer(options, settings["total_steps"])[1]

    def loss_of(params, batch):
        return official_loss(retriever.model.apply({"params": params}, *batch))

    @jax.jit
    def step(params, state, batch, encoder_ratio=settings["coef_lr"]):
        float32 = optax.tree.cast(params, jnp.float32)
        loss, gradients = jax.value_and_grad(loss_of)(float32, batch)
        updates, state = optimizer(encoder_ratio).update(gradients, state, params)
        params = train.clamp_logit_scale(optax.apply_updates(params, updates), 100.0)
        return params, state, loss, gradients

    params = store_params(retriever.params, param_dtype)
    return step, params, optimizer(1.0).init(params)


def official_loss(sim_TxV):
    return contrastive_loss(jnp.asarray(sim_TxV), scale=LOSS_SCALES["official"])


def inputs(golden):
    """Returns the golden batch as model inputs: ids, text mask, frames V x F x S x S x 3, mask."""
    if "image" in golden:  # plain CLIP: a one-frame video under mean pooling is an image
        ids = golden["ids"].astype(np.int32)
        mask_TxW = np.arange(ids.shape[1]) <= ids.argmax(1)[:, None]
        frames = golden["image"].transpose(0, 2, 3, 1)[:, None]
        return ids, mask_TxW, frames, np.ones((len(frames), 1), bool)
    masks = [golden[name].astype(bool) for name in ("text_mask", "video_mask")]
    frames = np.moveaxis(golden["video"], -3, -1)
    return golden["input_ids"].astype(np.int32), masks[0], frames, masks[1]


def outputs(model, ids, mask_TxW, frames, mask_VxF):
    """Returns the features, similarities and inner frame vectors of a batch, by one program."""
    text, video = model.encode_text(ids, mask_TxW), model.encode_video(frames, mask_VxF)
    _, clip_VxFxD = model.encode_frames(frames, mask_VxF)
    found = {"text": text, "video": video, "similarity": model.similarity(text, video)}
    found |= {"clip": clip_VxFxD, "temporal": model.relate_frames(clip_VxFxD, mask_VxF)}
    if model.config.has_granularities:
        found["granular"] = model.granular_similarity(text, video)
    return found


def normalized(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def assert_close(actual, expected, name, atol=1e-4):
    worst = np.abs(np.asarray(actual, np.float64) - expected).max()
    assert worst <= atol, f"{name}: {worst:.1e}"


def norms(tree):
    """Returns {official name: norm of that tensor}."""
    return {name: np.linalg.norm(array) for name, array in mapping.to_tensors(tree).items()}


def assert_moved(params, start, expected):
    """Compares how far each tensor moved. Tensors that the release saves and never uses stay."""
    moved = norms(jax.tree.map(lambda a, b: np.asarray(a, np.float64) - b, params, start))
    assert expected
    for key, value in expected.items():
        assert moved.get(key, 0.0) == pytest.approx(value, rel=0.05, abs=1e-6), key


def with_prefix(golden, prefix):
    return {key.split("/")[1]: v for key, v in golden.items() if key.startswith(f"{prefix}/")}


def test_outputs_match_release(release):
    retriever, golden = release
    found = tiny.apply(retriever.model, retriever.params, *inputs(golden), method=outputs)
    text, video = found["text"], found["video"]
    assert_close(found["clip"], golden["visual_output"], "CLIP frames")
    is_tight = retriever.config["head"] == "tight_transformer"
    sentence = golden["sentence_output"][:, 0]
    assert_close(text.sentence, sentence if is_tight else normalized(sentence), "sentence")
    assert_close(found["similarity"], golden["similarity"], "similarity")
    blocks = retriever.similarity(text, video)
    assert_close(blocks, golden["similarity"], "similarity in blocks")
    assert_close(official_loss(found["similarity"]), golden["loss"], "loss")
    if is_tight:
        assert_close(video.frames, golden["visual_output"], "frames")
    if retriever.config["head"] == "xclip" or "word_output" in golden:
        assert_close(text.words, normalized(golden["word_output"]), "words")
        assert_close(text.words, golden["word_features"], "words")
        assert_close(text.sentence, golden["sentence_feature"], "sentence feature")
        assert_close(video.frames, golden["frame_features"], "frames")
        assert_close(video.video, golden["video_feature"], "video")
        assert_close(found["temporal"], golden["temporal_output"], "temporal encoder")
        for key, value in found["granular"].items():
            official = {"frame_sentence": "sentence_frame"}.get(key, key)
            assert_close(value, golden[f"logits_{official}"], key)


def test_gradients_match_release(release, step):
    _, golden = release
    train_step, params, state = step
    *_, gradients = train_step(params, state, inputs(golden))
    actual, expected = norms(gradients), with_prefix(golden, "grad_norm")
    assert expected
    for key, value in expected.items():
        assert actual[key] == pytest.approx(value, rel=1e-3, abs=1e-6), key
    assert all(actual[key] == 0 for key in actual.keys() - expected.keys())


def test_four_optimizer_steps_match_release(release, step):
    retriever, golden = release
    train_step, params, state = step
    losses, batch = [], inputs(golden)
    for _ in range(4):
        params, state, loss, _ = train_step(params, state, batch)
        losses.append(float(loss))
    assert_close(losses, golden["losses_4_steps"], "losses")
    (expected,) = {key.split("/")[0] for key in golden if key.startswith("after4")}
    assert_moved(params, retriever.params, with_prefix(golden, expected))


@pytest.fixture(scope="module")
def float16_release(tmp_path_factory):
    """Returns (Retriever, golden arrays, settings, details) of the release's own training."""
    golden = dict(np.load(SMALL / "release_fp16_training.npz"))
    settings, details = json.loads(str(golden["config"])), json.loads(str(golden["details"]))
    folder = tmp_path_factory.mktemp("float16")
    return load(SMALL / settings["weights"], folder)[0], golden, settings, details


def run_six_steps(release, run, param_dtype):
    """Runs at the rates of the release's scripts, or (`faster_`) with CLIP's ten times as high.

    Returns (losses, parameters, optimizer state).
    """
    retriever, golden, settings, _ = release
    settings = settings | (settings["faster"] if run else {})
    train_step, params, state = training_step(retriever, settings, param_dtype)
    losses = []
    for batch in zip(*inputs(golden), strict=True):
        params, state, loss, _ = train_step(params, state, batch, settings["coef_lr"])
        losses.append(float(loss))
    return losses, params, state


@pytest.mark.parametrize("run", ["", "faster_"])
def test_six_float32_steps_with_frozen_layers_match_release(float16_release, run):
    retriever, golden, _, details = float16_release
    losses, params, _ = run_six_steps(float16_release, run, "float32")
    assert_close(losses, golden[f"{run}losses_6_steps_float32"], "losses")
    assert_moved(params, retriever.params, details[f"{run}after6_update_norm_float32"])


@pytest.mark.parametrize("run", ["", "faster_"])
def test_six_float16_steps_match_release(float16_release, run):
    """Compares single small tensors only together: few of their numbers change at all."""
    retriever, golden, _, details = float16_release
    losses, params, state = run_six_steps(float16_release, run, "float16")
    assert_close(losses, golden[f"{run}losses_6_steps"], "losses", 3e-3)
    types = {name: str(array.dtype) for name, array in mapping.to_tensors(params).items()}
    assert types == details["dtypes"] | {"clip.token_embedding.weight": "float32"}
    start = store_params(retriever.params, "float16")
    moved = norms(
        jax.tree.map(lambda a, b: a.astype(np.float64) - b, *map(jax.device_get, (params, start)))
    )
    expected = with_prefix(golden, f"{run}after6_update_norm")
    half = [name for name, kind in types.items() if kind == "float16" and expected[name]]
    assert len(half) > 30
    actual, release = (np.array([tensors[name] for name in half]) for tensors in (moved, expected))
    assert np.linalg.norm(actual) == pytest.approx(np.linalg.norm(release), rel=0.01)
    assert np.median(actual / release) == pytest.approx(1, abs=0.01)
    for name in expected.keys() - set(half):
        assert moved[name] == pytest.approx(expected[name], rel=0.02, abs=1e-6), name
    squares = mapping.to_tensors(find_moments(state).square)
    for name, share in details[f"{run}after6_share_of_zero_second_moments"].items():
        assert np.mean(squares[name] == 0) == pytest.approx(share, abs=0.03), name


def find_moments(state):
    """Returns the moments in an optimizer's state."""
    leaves = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, Moments))
    return next(x for x in leaves if isinstance(x, Moments))


def test_features_and_logits_match_plain_clip(plain_clip):
    """Encodes a one-frame video, which under mean pooling is CLIP's image."""
    retriever, golden = plain_clip
    found = tiny.apply(retriever.model, retriever.params, *inputs(golden), method=outputs)
    hugging_face = "text_embeds" in golden
    assert hugging_face or retriever.config["activation"] == "quick_gelu"
    suffix = "embeds" if hugging_face else "features"  # these are not normalised
    assert_close(found["text"].sentence, normalized(golden[f"text_{suffix}"]), "text")
    assert_close(found["video"].video, normalized(golden[f"image_{suffix}"]), "image")
    logits = retriever.similarity(found["text"], found["video"])
    assert_close(logits, golden["logits_per_image"].T, "logits")


def test_hugging_face_heads_come_from_config(tmp_path):
    """Loads the tiny model, whose heads are 16 wide. CLIP's own are 64 wide."""
    retriever, _ = load(SMALL / "hf_clip_tiny", tmp_path)
    assert (retriever.config["vision"]["heads"], retriever.config["text"]["heads"]) == (3, 2)


def assert_bfloat16_near(retriever, golden):
    low = XClip(dataclasses.replace(retriever.model.config, dtype="bfloat16"))
    found = tiny.apply(retriever.model, retriever.params, *inputs(golden), method=outputs)
    exact = np.asarray(found["similarity"])
    approximate = tiny.apply(low, retriever.params, *inputs(golden))
    worst = np.abs(np.asarray(approximate) - exact).max()
    assert 0 < worst <= 5e-2 * np.abs(exact).max()


def test_bfloat16_stays_near_float32_in_release_models(release):
    assert_bfloat16_near(*release)


def test_bfloat16_stays_near_float32_in_plain_clip(plain_clip):
    assert_bfloat16_near(*plain_clip)
