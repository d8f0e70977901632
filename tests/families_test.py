"""Tests of parity with the original encoders, on small models that lie in `shared`.

Each folder holds a model in its published layout and what the original code computed with it.
Models of the same layouts that need no files are in layouts_test.
"""

import re
from functools import cache
from pathlib import Path

import families
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from xclip_jax.cli import InputError
from xclip_jax.convert.importing import import_model
from xclip_jax.convert.mapping import to_tensors
from xclip_jax.data.preprocess import frame_format, preprocess
from xclip_jax.models import XClip
from xclip_jax.models.towers import VisionTower

GOLDENS = Path(__file__).resolve().parents[2] / "shared" / "goldens_encoders"
MODEL_FILES = ("*.safetensors", "*.bin", "*.pt")
RELATIVE = 1e-5  # of the largest value of an array
PIXEL = 2.02 / 255  # Pillow and torchvision differ by up to two levels
LOSSES = ("infonce", "sigmoid")


@cache
def load_golden(name):
    """Returns the arrays of a golden model, {} if it has none."""
    path = GOLDENS / name / "expected.npz"
    return dict(np.load(path)) if path.is_file() else {}


def folders(*arrays, without=False):
    """Returns the folders of models that have one of these arrays, or no arrays at all."""
    names = [path.name for path in sorted(GOLDENS.glob("*")) if path.is_dir()]
    names = [n for n in names if any(any((GOLDENS / n).glob(f)) for f in MODEL_FILES)]
    keys = {name: load_golden(name).keys() for name in names}
    chosen = [n for n in names if (keys[n] & set(arrays) if not without else not keys[n])]
    skipped = pytest.param("", marks=pytest.mark.skip(f"no golden models in {GOLDENS}"))
    return chosen or [skipped]


PARITY = folders("image_features", "text_features")
TOKENS = ("image_tokens", "image_last_hidden_state_before_norm", "text_last_hidden_state")


def source_of(name):
    """Returns the .pt file of a folder if there is one, else the folder."""
    return next((GOLDENS / name).glob("*.pt"), GOLDENS / name)


@cache
def load(name):
    return import_model(source_of(name))


def frames_of(pixels):
    """Returns V x 3 x S x S pixels as V videos of one frame, and the mask of frames."""
    frames = np.asarray(pixels).transpose(0, 2, 3, 1)[:, None]
    return frames, np.ones((len(frames), 1), bool)


def is_norm(module, _):
    return module.name in ("ln_final", "textual")


class AllTokens(VisionTower):
    """Image tower that returns the blocks' output for all tokens."""

    @nn.compact
    def __call__(self, images):
        return self.encode_patches(images)


def run(name, pixels=None, ids=None, loss=None):
    """Returns outputs of a converted golden by the names of its arrays, by one program."""
    imported = load(name)
    model = XClip(imported.config)

    def compute(params):
        found = {}
        options = {"capture_intermediates": is_norm, "mutable": ["intermediates"]}
        if pixels is not None:
            inputs = frames_of(pixels)
            video = model.apply({"params": params}, *inputs, method="encode_video")
            _, frames = model.apply({"params": params}, *inputs, method="encode_frames")
            found |= {"image_features": frames[:, 0], "image_features_normalised": video.video}
            tower = {"params": params["clip"]["visual"]}
            blocks = AllTokens(imported.config).apply(tower, inputs[0][:, 0])
            found["image_last_hidden_state_before_norm"] = blocks
            found["image_tokens"] = normalize(blocks, tower["params"], imported.config)
        if ids is not None:
            mask = np.ones(ids.shape, bool)
            inputs = {"params": params}, ids.astype(np.int32), mask
            text, state = model.apply(*inputs, method="encode_text", **options)
            state = state["intermediates"]["clip"]["textual"]
            found["text_tokens_projected"] = words = state["__call__"][0]
            found["text_last_hidden_state"] = state["ln_final"]["__call__"][0]
            found["text_features_normalised"] = text.sentence
            # The sentence is one of the words, which tells its vector before normalisation.
            cosines = jnp.einsum("twd,td->tw", words, text.sentence)
            cosines /= jnp.linalg.norm(words, axis=-1)
            best = jnp.argmax(cosines, 1)[:, None, None]
            found["text_features"] = jnp.take_along_axis(words, best, 1)[:, 0]
        if pixels is not None and ids is not None:
            options = {"method": "similarity"}
            found["logits_per_text"] = model.apply({"params": params}, text, video, **options)
            found["logits_per_image"] = found["logits_per_text"].T
        return found

    def loss_of(params):
        return LOSS[loss](compute(params)["logits_per_text"])

    program = jax.jit(jax.value_and_grad(loss_of) if loss else compute)
    return jax.device_get(program(imported.params))


def normalize(x, visual, config):
    """Applies the image tower's last norm to all tokens, where the model needs it for one only."""
    norm = visual["ln_post"]["norm"]
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / jnp.sqrt(variance + config.vision.epsilon) * norm["scale"] + norm["bias"]


def infonce(logits):
    diagonals = (jnp.diagonal(jax.nn.log_softmax(logits, axis)) for axis in (0, 1))
    return -sum(map(jnp.mean, diagonals)) / 2


def sigmoid(logits):
    signs = 2 * jnp.eye(len(logits)) - 1
    return -jnp.sum(jax.nn.log_sigmoid(signs * logits)) / len(logits)


LOSS = {"infonce": infonce, "sigmoid": sigmoid}


def deviation(actual, expected):
    """Returns the largest deviation, as a share of the largest expected value."""
    assert actual.shape == expected.shape
    return np.abs(np.asarray(actual, np.float64) - expected).max() / np.abs(expected).max()


def assert_close(actual, expected, name, limit=RELATIVE):
    worst = deviation(actual, expected)
    assert worst <= limit, f"{name}: {worst:.1e}"


@pytest.mark.parametrize("name", PARITY)
def test_outputs_match_the_original(name):
    golden = load_golden(name)
    found = run(name, golden.get("pixel_values"), golden.get("input_ids"))
    compared = found.keys() & golden.keys()
    features = {f"{side}_features{s}" for side in ("image", "text") for s in ("", "_normalised")}
    assert compared >= features & golden.keys()
    assert compared >= {"logits_per_text", *TOKENS} & golden.keys()
    for array in sorted(compared):
        assert_close(found[array], golden[array], array)


@pytest.mark.parametrize("name", folders("larger_image_features", "rectangular_image_features"))
def test_images_of_other_sizes_match_the_original(name):
    golden = load_golden(name)
    for size in ("larger", "rectangular"):
        if f"{size}_image_features" in golden:
            found = run(name, golden[f"{size}_pixel_values"])["image_features"]
            assert_close(found, golden[f"{size}_image_features"], size)


@pytest.mark.parametrize("name", folders("video_features_of_normalised_frames"))
def test_mean_pooling_averages_normalised_frames(name):
    """Compares with the mean of normalised vectors: CLIP4Clip's mean pooling, not PE's."""
    golden, imported = load_golden(name), load(name)
    frames = golden["video_pixel_values"].transpose(0, 1, 3, 4, 2)
    inputs = {"params": imported.params}, frames, np.ones(frames.shape[:2], bool)
    video = jax.jit(lambda p, x, m: XClip(imported.config).apply(p, x, m, method="encode_video"))
    found, expected = video(*inputs).video, golden["video_features_of_normalised_frames"]
    expected = expected / np.linalg.norm(expected, axis=-1, keepdims=True)
    assert_close(found, expected, "video")


def layout_of(names):
    """Returns the layout, a key of families.publish, that tensors have these names in."""
    names = set(names)
    if any(name.startswith("visual.trunk.") for name in names):
        return "eva" if any(".q_proj." in name for name in names) else "timm"
    if any(name.startswith("text_model.") for name in names):
        return "siglip" if "text_model.head.weight" in names else "hugging_face"
    if "positional_embedding_res" in names:
        return "long_clip"
    return "custom_text" if "text.token_embedding.weight" in names else "openai"


def published(tree, names):
    """Returns a tree of parameters as tensors of the layout that has these names."""
    tensors = {n.removeprefix("clip."): x for n, x in to_tensors(tree).items()}
    pool = "visual.attn_pool."
    for kind in ("weight", "bias"):
        if f"{pool}query.{kind}" in tensors:
            parts = [tensors.pop(f"{pool}{part}.{kind}") for part in ("query", "key_value")]
            tensors[f"{pool}attn.in_proj_{kind}"] = np.concatenate(parts)
    return families.publish(tensors, layout_of(names))


@pytest.mark.parametrize("name", folders("loss_infonce", "loss_sigmoid"))
def test_gradients_match_the_original(name):
    golden = load_golden(name)
    for loss in LOSSES:
        prefix = f"grad_norm_{loss}/"
        expected = {n.removeprefix(prefix): x for n, x in golden.items() if n.startswith(prefix)}
        if f"loss_{loss}" not in golden:
            continue
        value, gradients = run(name, golden["pixel_values"], golden["input_ids"], loss)
        assert value == pytest.approx(golden[f"loss_{loss}"], rel=1e-5)
        actual = {n: np.linalg.norm(x) for n, x in published(gradients, expected).items()}
        assert actual.keys() >= expected.keys()
        errors = {n: abs(actual[n] / norm - 1) for n, norm in expected.items()}
        worst = max(errors, key=errors.__getitem__)
        assert errors[worst] <= 1e-3, f"{worst}: {errors[worst]:.1e}"
        # The others are left out because they are small.
        rest = [actual[n] for n in actual.keys() - expected.keys()]
        assert max(rest, default=0) <= 2e-5 * max(expected.values())


@pytest.mark.parametrize("name", folders("raw_image_0"))
def test_raw_images_match_the_original(name):
    golden, config = load_golden(name), load(name).config
    mean, std = (np.array(x) for x in (config.preprocess.mean, config.preprocess.std))
    images = [golden[key] for key in sorted(golden) if re.fullmatch(r"raw_image_\d+", key)]
    pixels = np.stack([preprocess(Image.fromarray(x), frame_format(config)) for x in images])
    names = [key for key in golden if re.fullmatch(r"raw_pixel_values(_pil|_torchvision)?", key)]
    assert names
    for key in names:
        expected = golden[key].transpose(0, 2, 3, 1) * std + mean
        worst = np.abs(pixels / 255 - expected).max()
        assert worst <= PIXEL, f"{key}: {worst * 255:.2f}/255"
    normalised = ((pixels / 255 - mean) / std).astype(np.float32).transpose(0, 3, 1, 2)
    found = run(name, normalised)["image_features"]
    assert_close(found, golden["raw_image_features"], "raw", limit=1e-3)


@pytest.mark.parametrize("name", folders(without=True))
def test_unsupported_models_are_refused(name):
    with pytest.raises(InputError) as error:
        import_model(source_of(name))
    message = str(error.value)
    assert "\n" not in message
    assert re.search(r"NaFlex|multimodal_cfg|hf_model_name|timm_model_name|supported", message)
    assert len(message) < 600
