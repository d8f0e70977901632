"""The numbers of the original PyTorch code: golden models converted, run and trained.

The goldens lie beside the project where it is developed; elsewhere these tests are skipped.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

import xclip_jax
from xclip_jax import train
from xclip_jax.convert import mapping
from xclip_jax.convert.importing import convert
from xclip_jax.loss import contrastive_loss
from xclip_jax.models import build_model
from xclip_jax.optimizer import make_optimizer

GOLDENS = Path(__file__).resolve().parents[2] / "shared" / "goldens"
pytestmark = pytest.mark.skipif(not GOLDENS.is_dir(), reason="no goldens beside the project")
RELEASE = sorted(path.stem for path in GOLDENS.glob("*.bin"))
OPENAI = sorted(path.stem for path in GOLDENS.glob("openai_clip_*.pt"))
HUGGING_FACE = sorted(path.name for path in GOLDENS.glob("hf_clip_*"))


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """name -> (Retriever, golden arrays), converted once."""
    made = {}

    def get(name):
        if name not in made:
            suffix = {True: ".bin", False: ".pt"}[(GOLDENS / f"{name}.bin").exists()]
            source = GOLDENS / name if name in HUGGING_FACE else GOLDENS / f"{name}{suffix}"
            golden = source / "expected.npz" if source.is_dir() else source.with_suffix(".npz")
            folder = tmp_path_factory.mktemp("models") / name
            convert(source, folder)
            made[name] = xclip_jax.load(folder), dict(np.load(golden))
        return made[name]

    return get


def inputs(golden):
    """The golden batch as the model takes it: ids, text mask, frames V x F x S x S x 3, mask."""
    frames = golden["video"].transpose(0, 1, 3, 4, 2)
    mask_TxW, mask_VxF = golden["text_mask"].astype(bool), golden["video_mask"].astype(bool)
    return golden["input_ids"].astype(np.int32), mask_TxW, frames, mask_VxF


def apply(retriever, *args, method=None, model=None):
    return tiny.apply(model or retriever.model, retriever.params, *args, method=method)


def normalized(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def close(found, expected, name, atol=1e-4):
    worst = np.abs(np.asarray(found, np.float64) - expected).max()
    assert worst <= atol, f"{name}: {worst:.1e}"


@pytest.mark.parametrize("name", RELEASE)
def test_outputs_of_the_release(converted, name):
    retriever, golden = converted(name)
    ids, mask_TxW, frames, mask_VxF = inputs(golden)
    text = apply(retriever, ids, mask_TxW, method="encode_text")
    video = apply(retriever, frames, mask_VxF, method="encode_video")
    clip_VxFxD, temporal_VxFxD = apply(retriever, frames, mask_VxF, method=encode_frames)
    close(clip_VxFxD, golden["visual_output"], "CLIP frames")
    raw = retriever.config["head"] == "tight_transformer"
    unit = (lambda x: x) if raw else normalized
    sentence = unit(golden["sentence_output"][:, 0])
    close(text.sentence, sentence, "sentence")
    sim_TxV = apply(retriever, text, video, method="similarity")
    close(sim_TxV, golden["similarity"], "similarity")
    close(retriever.similarity(text, video), golden["similarity"], "similarity in blocks")
    close(loss_of(retriever.config, sim_TxV), golden["loss"], "loss")
    if raw:
        close(video.frames, golden["visual_output"], "frames")
    if "word_output" in golden:
        close(text.words, normalized(golden["word_output"]), "words")
        close(text.words, golden["word_features"], "words")
        close(text.sentence, golden["sentence_feature"], "sentence feature")
        close(video.frames, golden["frame_features"], "frames")
        close(video.video, golden["video_feature"], "video")
        close(temporal_VxFxD, golden["temporal_output"], "temporal encoder")
        granular = apply(retriever, text, video, method="granular_similarity")
        theirs = {"frame_sentence": "sentence_frame"}
        for key, value in granular.items():
            close(value, golden[f"logits_{theirs.get(key, key)}"], key)


def encode_frames(model, frames, mask_VxF):
    """CLIP's frame vectors and what the temporal encoder makes of them, not normalised."""
    images = frames.reshape(-1, *frames.shape[2:])
    clip_VxFxD = model.clip.encode_image(images).reshape(*mask_VxF.shape, -1)
    return clip_VxFxD, model._encode_time(clip_VxFxD, mask_VxF)


def loss_of(config, sim_TxV):
    scale = train.LOSS_SCALES[config["preset"]]
    return contrastive_loss(jnp.asarray(sim_TxV), scale=scale)


def loss_and_gradients(retriever, params, golden):
    def loss_fn(params):
        sim = retriever.model.apply({"params": params}, *inputs(golden))
        return loss_of(retriever.config, sim)

    return jax.jit(jax.value_and_grad(loss_fn))(params)


def norms(tree):
    """Official name -> norm of that tensor."""
    return {name: np.linalg.norm(array) for name, array in mapping.to_tensors(tree).items()}


@pytest.mark.parametrize("name", RELEASE)
def test_gradients_of_the_release(converted, name):
    retriever, golden = converted(name)
    _, gradients = loss_and_gradients(retriever, retriever.params, golden)
    found = norms(gradients)
    expected = {k.split("/")[1]: v for k, v in golden.items() if k.startswith("grad_norm/")}
    assert expected
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=1e-3, abs=1e-6), key
    assert all(found[key] == 0 for key in found.keys() - expected.keys())


@pytest.mark.parametrize("name", RELEASE)
def test_four_steps_of_the_release(converted, name):
    retriever, golden = converted(name)
    settings = json.loads(str(golden["config"]))
    _, optimizer = make_optimizer(
        name="bert_adam",
        lr=settings["lr"],
        total_steps=settings["total_steps"],
        encoder_ratio=settings["coef_lr"],
        weight_decay=settings["weight_decay"],
        warmup=settings["warmup"],
        b1=0.9,
        b2=0.98,
        eps=1e-6,
        clip_norm=1.0,
        freeze_layers=settings["freeze_layers"],
    )
    params = start = retriever.params
    state, losses = optimizer.init(params), []

    @jax.jit
    def step(params, state):
        loss, gradients = loss_and_gradients(retriever, params, golden)
        updates, state = optimizer.update(gradients, state, params)
        return train.clamp_logit_scale(optax.apply_updates(params, updates)), state, loss

    for _ in range(4):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    close(losses, golden["losses_4_steps"], "losses")
    moved = norms(jax.tree.map(lambda a, b: np.asarray(a, np.float64) - b, params, start))
    expected = {k.split("/")[1]: v for k, v in golden.items() if k.startswith("after4")}
    assert expected
    for key, value in expected.items():
        if key in moved:
            assert moved[key] == pytest.approx(value, rel=0.05, abs=1e-6), key
        else:
            assert value == 0, key


@pytest.mark.parametrize("name", OPENAI)
def test_openai(converted, name):
    retriever, golden = converted(name)
    assert retriever.config["activation"] == "quick_gelu"
    check_clip(
        retriever,
        golden,
        normalized(golden["text_features"]),
        normalized(golden["image_features"]),
    )


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_hugging_face(converted, name):
    retriever, golden = converted(name)
    check_clip(retriever, golden, golden["text_embeds"], golden["image_embeds"])


def check_clip(retriever, golden, text_embeds, image_embeds):
    """A one-frame video under mean pooling is CLIP's image."""
    ids = golden["ids"].astype(np.int32)
    mask_TxW = np.arange(ids.shape[1]) <= ids.argmax(1)[:, None]
    frames = golden["image"].transpose(0, 2, 3, 1)[:, None]
    text = apply(retriever, ids, mask_TxW, method="encode_text")
    video = apply(retriever, frames, np.ones((len(frames), 1), bool), method="encode_video")
    close(text.sentence, text_embeds, "text")
    close(video.video, image_embeds, "image")
    close(retriever.similarity(text, video), golden["logits_per_image"].T, "logits")


@pytest.mark.parametrize("name", [*RELEASE, *OPENAI, *HUGGING_FACE])
def test_bfloat16_stays_near(converted, name):
    retriever, golden = converted(name)
    if "video" in golden:
        batch = inputs(golden)
    else:
        ids = golden["ids"].astype(np.int32)
        frames = golden["image"].transpose(0, 2, 3, 1)[:, None]
        mask_TxW = np.arange(ids.shape[1]) <= ids.argmax(1)[:, None]
        batch = ids, mask_TxW, frames, np.ones((len(frames), 1), bool)
    low = build_model({**retriever.config, "dtype": "bfloat16"})
    exact = np.asarray(apply(retriever, *batch))
    worst = np.abs(np.asarray(apply(retriever, *batch, model=low)) - exact).max()
    assert 0 < worst <= 5e-2 * np.abs(exact).max()
