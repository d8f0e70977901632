"""Tests of CLIP's towers: masks, positions, sizes and numeric types."""

import dataclasses
import functools
import math

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xclip_jax.models import transformer
from xclip_jax.models.clip import CLIP, normalize_frames
from xclip_jax.models.config import (
    BlockConfig,
    ModelConfig,
    PreprocessConfig,
    TextConfig,
    VisionConfig,
)
from xclip_jax.models.transformer import (
    ACTIVATIONS,
    REMAT,
    SelfAttention,
    Transformer,
    flash_attention,
    uses_flash_attention,
)

# No size is a power of two: 3 x 3 patches of 5 pixels, heads of widths 8 and 9.
EMBED_DIM = 10
CONFIG = ModelConfig(
    embed_dim=EMBED_DIM,
    vision=VisionConfig(image_size=15, patch_size=5, width=24, layers=2, heads=3),
    text=TextConfig(vocab_size=50, context_length=11, width=18, layers=3, heads=2),
)
IDS = np.array([[48, 3, 7, 11, 2, 49, 0], [48, 9, 5, 49, 0, 0, 0]])
IMAGES = np.random.default_rng(0).normal(size=(2, 15, 15, 3)).astype(np.float32)

RGB = PreprocessConfig()


def clip(**changes):
    return CLIP(dataclasses.replace(CONFIG, **changes))


def encode_image(model, images):
    return model.visual(images)


def encode_words(model, ids):
    return model.textual(ids)


def encode_both(model, images, ids):
    return model.visual(jnp.asarray(images)), model.textual(ids)


def shapes_of(model):
    init = functools.partial(model.init, method=encode_both)
    return jax.eval_shape(init, jax.random.key(0), IMAGES, IDS)["params"]


@pytest.fixture(scope="module")
def params():
    """Draws parameters without zero biases or unit scales, which would hide a missing one."""
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        centre = 1 if path[-1].key == "scale" else 0
        return (centre + 0.2 * rng.normal(size=leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes_of(clip()))


@pytest.fixture(scope="module")
def exact(params):
    """Returns the outputs of the float32 towers for IMAGES and IDS."""
    return run(clip(), params)


def run(model, params, images=IMAGES, ids=IDS):
    return jax.jit(lambda p: model.apply({"params": p}, images, ids, method=encode_both))(params)


def test_parameters_have_the_configured_sizes(params, exact):
    shapes = {
        "/".join(path): leaf.shape for path, leaf in flax.traverse_util.flatten_dict(params).items()
    }
    expected = {
        "logit_scale": (),
        "textual/encoder/blocks/attention/out/kernel": (3, 2, 9, 18),
        "textual/encoder/blocks/attention/qkv/kernel": (3, 18, 3, 2, 9),
        "textual/encoder/blocks/fc/kernel": (3, 18, 72),
        "textual/ln_final/norm/scale": (18,),
        "textual/positions": (11, 18),
        "textual/projection/kernel": (18, 10),
        "textual/tokens/embedding": (50, 18),
        "visual/class_token": (24,),
        "visual/encoder/blocks/attention/qkv/bias": (2, 3, 3, 8),
        "visual/encoder/blocks/proj/kernel": (2, 96, 24),
        "visual/patch/kernel": (5, 5, 3, 24),
        "visual/positions": (10, 24),
        "visual/projection/kernel": (24, 10),
    }
    assert {name: shapes[name] for name in expected} == expected
    images, words = exact
    assert images.shape == (2, 10)
    assert words.shape == (2, 7, 10)


def layer_norm(x, p):
    spread = np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return (x - x.mean(-1, keepdims=True)) / spread * p["norm"]["scale"] + p["norm"]["bias"]


def plain_block(x, p, mask):
    """Returns the output of a pre-norm block on L x E float64, head by head."""
    y = layer_norm(x, p["ln_1"])
    attention = p["attention"]
    total = x + attention["out"]["bias"]
    for head in range(attention["qkv"]["kernel"].shape[2]):
        query, key, value = (
            y @ attention["qkv"]["kernel"][:, k, head] + attention["qkv"]["bias"][k, head]
            for k in range(3)
        )
        scores = np.where(mask, query @ key.T / math.sqrt(query.shape[-1]), -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        total = total + weights @ value @ attention["out"]["kernel"][head]
    y = layer_norm(total, p["ln_2"]) @ p["fc"]["kernel"] + p["fc"]["bias"]
    y = y / (1 + np.exp(-1.702 * y))
    return total + y @ p["proj"]["kernel"] + p["proj"]["bias"]


def test_transformer_matches_loop_in_numpy(params):
    blocks = jax.tree.map(lambda x: np.asarray(x, np.float64), params["textual"]["encoder"])
    x = np.random.default_rng(2).normal(size=(2, 5, 18))
    mask = np.tril(np.ones((5, 5), bool))
    expected = []
    for row in x:
        for layer in range(3):
            p = jax.tree.map(lambda leaf, layer=layer: leaf[layer], blocks["blocks"])
            row = plain_block(row, p, mask)
        expected.append(row)
    model = Transformer(CONFIG.blocks("text"))
    variables = {"params": params["textual"]["encoder"]}
    found = jax.jit(model.apply)(variables, x.astype(np.float32), mask[None, None])
    np.testing.assert_allclose(found, np.stack(expected), atol=2e-5)


@pytest.mark.parametrize("remat", REMAT)
def test_remat_changes_neither_value_nor_gradient(params, remat):
    x = np.random.default_rng(2).normal(size=(1, 4, 18)).astype(np.float32)

    def gradients(remat):
        model = Transformer(CONFIG.blocks("text"), remat=remat)
        loss = jax.value_and_grad(lambda p: jnp.sum(jnp.sin(model.apply({"params": p}, x))))
        # Only a program with recomputation contains a remat primitive.
        program = str(jax.make_jaxpr(loss)(params["textual"]["encoder"]))
        assert ("checkpoint[" in program or "remat" in program) == (remat != "none")
        return jax.jit(loss)(params["textual"]["encoder"])

    found, expected = gradients(remat), gradients("none")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), found, expected)
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected[1])) > 1


@pytest.mark.parametrize(
    ("recent_gpu", "dtype", "width", "masked", "uses"),
    [
        (True, jnp.bfloat16, 64, False, True),
        (True, jnp.float32, 64, False, False),  # cuDNN has 16 bits only
        (True, jnp.bfloat16, 64, True, False),
        (True, jnp.bfloat16, 4, False, False),
        (True, jnp.bfloat16, 256, False, False),
        (False, jnp.bfloat16, 64, False, False),
    ],
)
def test_kernel_of_attention_is_one_that_the_device_has(
    monkeypatch, recent_gpu, dtype, width, masked, uses
):
    monkeypatch.setattr(transformer, "is_recent_gpu", lambda: recent_gpu)
    query, mask = jnp.zeros((1, 50, 1, width), dtype), jnp.ones((1, 1, 50, 50), bool)
    assert uses_flash_attention(query, mask if masked else None) == uses


@pytest.mark.parametrize("length", [6, 7])
def test_padding_to_an_even_length_changes_nothing(length):
    query, key, value, by = jax.random.normal(jax.random.key(0), (4, 2, length, 3, 8))

    def flash(*x):
        return jnp.sum(by * flash_attention(*x, kernel="xla"))

    def plain(*x):
        return jnp.sum(by * jax.nn.dot_product_attention(*x))

    found, expected = (jax.value_and_grad(f, (0, 1, 2))(query, key, value) for f in (flash, plain))
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


def test_word_depends_on_tokens_up_to_it_only(params):
    """Checks that the gradient of word i by token j is nonzero if and only if j <= i."""
    ids = np.array([[48, 3, 7, 11, 2, 49]])
    model = clip()

    def words(embedding):
        tokens = {**params["textual"], "tokens": {"embedding": embedding}}
        variables = {"params": {**params, "textual": tokens}}
        found = model.apply(variables, ids, method=encode_words)[0]
        return found @ jnp.arange(1.0, EMBED_DIM + 1)

    embedding = params["textual"]["tokens"]["embedding"]
    jacobian = np.asarray(jax.jit(jax.jacrev(words))(embedding))  # words x vocabulary x width
    influence = np.linalg.norm(jacobian[:, ids[0]], axis=-1)
    np.testing.assert_array_equal(influence > 0, np.tril(np.ones((6, 6), bool)))


def test_tokens_after_the_end_do_not_change_earlier_words(params):
    encode = jax.jit(lambda ids: clip().apply({"params": params}, ids, method=encode_words))
    words = np.asarray(encode(IDS))
    other = np.array([[48, 3, 7, 11, 2, 49, 33], [48, 9, 5, 49, 21, 22, 23]])
    np.testing.assert_array_equal(encode(other)[0, :6], words[0, :6])
    np.testing.assert_array_equal(encode(other)[1, :4], words[1, :4])
    assert np.abs(encode(other)[1, 4:] - words[1, 4:]).max() > 0.01
    longer = encode(np.pad(IDS, [(0, 0), (0, 4)]))
    assert longer.shape == (2, 11, 10)
    np.testing.assert_allclose(longer[:, :7], words, atol=2e-6)


def test_images_are_encoded_independently(params):
    encode = jax.jit(lambda images: clip().apply({"params": params}, images, method=encode_image))
    one = encode(IMAGES[:1])
    np.testing.assert_allclose(encode(IMAGES)[:1], one, atol=2e-6)
    rolled = encode(np.roll(IMAGES[:1], 5, axis=1))  # the same patches at other positions
    assert np.abs(rolled - one).max() > 0.01


def test_activations_match_their_formulas(params, exact):
    x = np.linspace(-4, 4, 41)
    gelu = [0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in x]
    np.testing.assert_allclose(ACTIVATIONS["gelu"](x.astype(np.float32)), gelu, atol=1e-6)
    quick = x / (1 + np.exp(-1.702 * x))
    np.testing.assert_allclose(ACTIVATIONS["quick_gelu"](x.astype(np.float32)), quick, atol=1e-6)
    for found, default in zip(run(clip(activation="gelu"), params), exact, strict=True):
        assert 1e-4 < np.abs(found - default).max() < 1


def test_uint8_frames_are_normalised_like_float_frames():
    rng = np.random.default_rng(3)
    pixels = rng.integers(0, 256, (2, 3, 5, 5, 3), np.uint8)
    mask = np.array([[True, True, False], [True, False, False]])
    mean = np.array([0.48145466, 0.4578275, 0.40821073])
    std = np.array([0.26862954, 0.26130258, 0.27577711])
    normalised = (pixels / 255.0 - mean) / std
    expected = normalised * mask[..., None, None, None]
    np.testing.assert_allclose(normalize_frames(pixels, mask, RGB), expected, atol=2e-6)
    floats = normalize_frames(normalised.astype(np.float32), mask, RGB)
    np.testing.assert_allclose(floats, expected, atol=2e-6)
    assert not np.asarray(floats)[~mask].any()
    broken = np.where(mask[..., None, None, None], normalised, np.nan).astype(np.float32)
    np.testing.assert_array_equal(normalize_frames(broken, mask, RGB), floats)


def test_bfloat16_is_close_to_float32_and_keeps_float32_parameters(params, exact):
    half = clip(dtype="bfloat16")
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(shapes_of(half))}
    assert dtypes == {jnp.dtype("float32")}
    for found, full in zip(run(half, params), exact, strict=True):
        assert found.dtype == jnp.bfloat16
        difference = np.linalg.norm(np.asarray(found, np.float32) - full, axis=-1)
        assert 0 < (difference / np.linalg.norm(full, axis=-1)).max() < 0.03


def test_clamped_logit_scale_keeps_its_gradient(params):
    """Takes the gradient at CLIP's own scale, 100, which could not decrease without one."""

    def scale(logit_scale):
        variables = {"params": {**params, "logit_scale": logit_scale}}
        return clip().apply(variables, method="scale")

    for value in (0.0, 2.6592, 4.0):
        assert scale(jnp.float32(value)) == pytest.approx(math.exp(value), rel=1e-6)
    limit = jnp.float32(math.log(100))
    assert jax.grad(scale)(limit) == pytest.approx(100, rel=1e-6)
    assert scale(limit) == pytest.approx(100, rel=1e-6)
    assert scale(jnp.float32(7)) == scale(limit)


def test_equal_configs_make_equal_modules():
    """Compares modules, because equal ones share compiled programs."""
    assert clip() == clip()
    assert hash(clip()) == hash(clip())
    assert clip() != clip(vision=dataclasses.replace(CONFIG.vision, heads=4))


def plain_attention(x, p, mask):
    """Returns softmax attention on B x L x E float64, where masked scores are -1e6."""
    qkv = np.einsum("ble,eink->blink", x, p["qkv"]["kernel"]) + p["qkv"]["bias"]
    query, key, value = (qkv[:, :, i] for i in range(3))
    scores = np.einsum("bqnk,bsnk->bnqs", query, key) / math.sqrt(query.shape[-1])
    weights = np.asarray(jax.nn.softmax(np.where(mask, scores, -1e6)))
    y = np.einsum("bnqs,bsnk->bqnk", weights, value)
    return np.einsum("bqnk,nke->bqe", y, p["out"]["kernel"]) + p["out"]["bias"]


def test_attention_matches_explicit_softmax():
    """Includes a fully masked row, which gives the mean of all values."""
    rng = np.random.default_rng(4)
    x, mask = rng.normal(size=(3, 5, 18)), rng.random((3, 1, 5, 5)) < 0.5
    mask[0, 0, 2] = False
    mask[1] = False
    model = SelfAttention(BlockConfig(heads=2), dtype="float32")
    single = x.astype(np.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), single, mask)["params"]
    params = jax.tree.map(lambda leaf: 0.5 * rng.normal(size=leaf.shape), shapes)
    params32 = jax.tree.map(np.float32, params)

    def total(x):
        return jnp.sum(jnp.sin(model.apply({"params": params32}, x, mask)))

    found = jax.jit(model.apply)({"params": params32}, single, mask)
    np.testing.assert_allclose(found, plain_attention(x, params, mask), atol=1e-5)
    assert np.isfinite(jax.jit(jax.grad(total))(single)).all()
