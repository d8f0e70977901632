"""Random checkpoints of encoder families in their published layouts, and what they compute.

The forward pass is plain NumPy in float64, written from the original implementations. Tensors have
the names of OpenAI's CLIP, with `attn.ln`, `mlp.gate` and `mlp.ln` for EVA-02's, PE's names for the
attention pool, and `visual.proj_bias` and `text_projection_bias`; `publish` renames them.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from checkpoints import fill, norm_shapes


@dataclass(frozen=True, kw_only=True)
class Tower:
    """Sizes and options of the blocks of a tower."""

    width: int
    heads: int
    layers: int = 2
    mlp: int
    epsilon: float = 1e-5
    activation: str = "gelu"
    gated: bool = False  # EVA-02: SwiGLU and inner norms


@dataclass(frozen=True, kw_only=True)
class Image(Tower):
    """An image tower."""

    width: int = 24
    heads: int = 3
    mlp: int = 56
    side: int = 24
    patch: int = 8
    class_token: bool = True
    patch_bias: bool = False
    pre_norm: bool = True
    pool_heads: int = 0  # of an attention pool; 0: the class token
    pool_mlp: int = 0
    projection: str = "linear"
    rotary: str = "none"
    rotary_grid: int = 0  # coordinates are scaled to it; 0: not


@dataclass(frozen=True, kw_only=True)
class Text(Tower):
    """A text tower."""

    width: int = 16
    heads: int = 2
    mlp: int = 64
    vocab: int = 60
    context: int = 9
    causal: bool = True
    pool: str = "argmax"
    end: int = 0
    bias: bool = False  # of the projection


class Family(NamedTuple):
    """An image tower, a text tower and their joint embedding space."""

    image: Image = Image()
    text: Text = Text()
    dim: int = 20
    logit_bias: bool = False


def linear_shapes(name, out, into):
    return {f"{name}weight": (out, into), f"{name}bias": (out,)}


def tower_shapes(prefix, tower):
    """Returns {name: shape} of the blocks of a tower."""
    width, shapes = tower.width, {}
    for layer in range(tower.layers):
        block = f"{prefix}.resblocks.{layer}"
        shapes |= norm_shapes(f"{block}.ln_1", width) | norm_shapes(f"{block}.ln_2", width)
        shapes |= linear_shapes(f"{block}.attn.in_proj_", 3 * width, width)
        shapes |= linear_shapes(f"{block}.attn.out_proj.", width, width)
        shapes |= linear_shapes(f"{block}.mlp.c_fc.", tower.mlp, width)
        shapes |= linear_shapes(f"{block}.mlp.c_proj.", width, tower.mlp)
        if tower.gated:
            shapes |= linear_shapes(f"{block}.mlp.gate.", tower.mlp, width)
            shapes |= norm_shapes(f"{block}.attn.ln", width)
            shapes |= norm_shapes(f"{block}.mlp.ln", tower.mlp)
    return shapes


def family_shapes(family):
    """Returns {name: shape} of all tensors of a family."""
    v, t, dim = family.image, family.text, family.dim
    shapes = {
        "logit_scale": (),
        "visual.conv1.weight": (v.width, 3, v.patch, v.patch),
        "visual.positional_embedding": ((v.side // v.patch) ** 2 + v.class_token, v.width),
        "token_embedding.weight": (t.vocab, t.width),
        "positional_embedding": (t.context, t.width),
        "text_projection": (t.width, dim),
        **norm_shapes("visual.ln_post", v.width),
        **norm_shapes("ln_final", t.width),
        **tower_shapes("visual.transformer", v),
        **tower_shapes("transformer", t),
    }
    if v.pool_heads:
        pool = "visual.attn_pool."
        shapes |= {f"{pool}probe": (1, 1, v.width), **norm_shapes(f"{pool}layernorm", v.width)}
        shapes |= linear_shapes(f"{pool}attn.in_proj_", 3 * v.width, v.width)
        shapes |= linear_shapes(f"{pool}attn.out_proj.", v.width, v.width)
        shapes |= linear_shapes(f"{pool}mlp.c_fc.", v.pool_mlp, v.width)
        shapes |= linear_shapes(f"{pool}mlp.c_proj.", v.width, v.pool_mlp)
    optional = {
        "visual.conv1.bias": (v.patch_bias, (v.width,)),
        "visual.class_embedding": (v.class_token, (v.width,)),
        "visual.ln_pre.weight": (v.pre_norm, (v.width,)),
        "visual.ln_pre.bias": (v.pre_norm, (v.width,)),
        "visual.proj": (v.projection != "none", (v.width, dim)),
        "visual.proj_bias": (v.projection == "bias", (dim,)),
        "text_projection_bias": (t.bias, (dim,)),
        "logit_bias": (family.logit_bias, ()),
    }
    return shapes | {name: shape for name, (present, shape) in optional.items() if present}


def draw(family, seed=0):
    """Returns random tensors of a family, for which every part matters.

    Embeddings are small, as the epsilon of the first layer norm is.
    """
    tensors = fill(family_shapes(family), seed)
    for name, array in tensors.items():
        if name.endswith("conv1.weight"):
            array *= 0.02
        elif "embedding" in name:
            array *= 0.2
        elif array.ndim == 2:
            array *= 10 * array.shape[-1] ** -0.5
        else:
            array *= 3
        if family.image.gated and name.startswith("visual") and name.endswith("in_proj_bias"):
            array[family.image.width : -family.image.width] = 0  # EVA-02's keys have none
    constants = {"logit_scale": np.float32(2.3), "logit_bias": np.float32(-3.1)}
    return tensors | {n: np.asarray(x) for n, x in constants.items() if n in tensors}


# Prefixes of names, of which the first that fits is replaced, then parts of blocks.
_HUGGING_FACE = {
    "visual.transformer.resblocks.": "vision_model.encoder.layers.",
    "visual.conv1": "vision_model.embeddings.patch_embedding",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
    "visual.proj": "visual_projection.weight",
    "visual.attn_pool.attn.": "vision_model.head.attention.",
    "visual.attn_pool.": "vision_model.head.",
    "transformer.resblocks.": "text_model.encoder.layers.",
    "token_embedding": "text_model.embeddings.token_embedding",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final": "text_model.final_layer_norm",
    "text_projection_bias": "text_model.head.bias",
    "text_projection": "text_projection.weight",
}
_TIMM = {
    "visual.transformer.resblocks.": "visual.trunk.blocks.",
    "visual.conv1": "visual.trunk.patch_embed.proj",
    "visual.class_embedding": "visual.trunk.cls_token",
    "visual.positional_embedding": "visual.trunk.pos_embed",
    "visual.ln_pre": "visual.trunk.norm_pre",
    "visual.ln_post": "visual.trunk.norm",
    "visual.proj_bias": "visual.trunk.head.bias",
    "visual.proj": "visual.trunk.head.weight",
    "visual.attn_pool.probe": "visual.trunk.attn_pool.latent",
    "visual.attn_pool.attn.out_proj": "visual.trunk.attn_pool.proj",
    "visual.attn_pool.attn.": "visual.trunk.attn_pool.",
    "visual.attn_pool.layernorm": "visual.trunk.attn_pool.norm",
    "visual.attn_pool.": "visual.trunk.attn_pool.",
    "text_projection_bias": "text.text_projection.bias",
}
_PREFIXES = {"hugging_face": _HUGGING_FACE, "timm": _TIMM, "eva": _TIMM, "openai": {}}
_PREFIXES |= {"siglip": _HUGGING_FACE | {"text_projection": "text_model.head.weight"}}
_PREFIXES |= {"custom_text": {"visual.": "visual."}, "long_clip": {}}
_HF_PARTS = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.": "self_attn."}
_HF_PARTS |= {"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
_TIMM_PARTS = {"ln_1": "norm1", "ln_2": "norm2", "attn.in_proj_": "attn.qkv."}
_TIMM_PARTS |= {"attn.out_proj": "attn.proj", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
_EVA_PARTS = {"mlp.c_fc": "mlp.fc1_x", "mlp.gate": "mlp.fc1_g", "mlp.ln": "mlp.norm"}
_EVA_PARTS |= {"attn.ln": "attn.norm"}
_PARTS = {"hugging_face": _HF_PARTS, "siglip": _HF_PARTS, "timm": _TIMM_PARTS}
_PARTS |= {"eva": _TIMM_PARTS | _EVA_PARTS}
_TRANSPOSED = ("visual_projection.weight", "trunk.head.weight", "text_model.head.weight")


def publish(tensors, layout):
    """Returns tensors under the names and in the shapes of a published layout."""
    published = {}
    for name, array in tensors.items():
        published |= _publish(name, array, layout, has_bias="text_projection_bias" in tensors)
    return published


def _publish(name, array, layout, *, has_bias):
    prefixes = _PREFIXES[layout]
    prefix = next((p for p in prefixes if name.startswith(p)), "")
    new = prefixes.get(prefix, "") + name.removeprefix(prefix)
    is_trunk = new.startswith(("visual.trunk.", "vision_model.", "text_model."))
    for part, other in _PARTS.get(layout, {}).items() if is_trunk else ():
        new = new.replace(part, other)
    is_text = not name.startswith(("visual.", "logit_"))
    if layout in ("timm", "eva", "custom_text") and is_text and not new.startswith("text."):
        new = f"text.{new}"
    if new == "text.text_projection" and has_bias:
        return {f"{new}.weight": array.T}
    if new.endswith(_TRANSPOSED) or (layout == "hugging_face" and name == "text_projection"):
        return {new: array.T}
    if name.startswith("logit_") and layout == "siglip":
        return {name: array.reshape(1)}
    if new in ("visual.trunk.pos_embed", "visual.trunk.cls_token"):
        return {new: array.reshape(1, -1, array.shape[-1])}
    if layout == "long_clip" and name == "positional_embedding":
        first = np.arange(len(array))[:, None] < 20
        parts = {name: np.where(first, array, 0), f"{name}_res": np.where(first, 0, array)}
        return {n: part.astype(array.dtype) for n, part in parts.items()}
    if "self_attn.in_proj_" in new:
        thirds = zip("qkv", np.split(array, 3), strict=True)
        return {new.replace("in_proj_", f"{x}_proj."): third for x, third in thirds}
    if "trunk.attn_pool.in_proj_" in new:
        width = len(array) // 3
        parts = {"q": array[:width], "kv": array[width:]}
        return {new.replace("in_proj_", f"{x}."): part for x, part in parts.items()}
    if layout == "eva" and ".attn.qkv." in new:
        thirds = dict(zip("qkv", np.split(array, 3), strict=True))
        if new.endswith("bias"):
            del thirds["k"]
        return {new.replace(".qkv.", f".{x}_proj."): third for x, third in thirds.items()}
    return {new: array}


ACTIVATIONS = {
    "gelu": lambda x: x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x / (1 + np.exp(-2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x)),
    "silu": lambda x: x / (1 + np.exp(-x)),
}


def layer_norm(x, t, name, epsilon):
    centred = x - x.mean(-1, keepdims=True)
    spread = np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon)
    return centred / spread * t[f"{name}.weight"] + t[f"{name}.bias"]


def linear(x, t, name):
    return x @ t[f"{name}weight"].T + t[f"{name}bias"]


def turn(x, angles):
    """Rotates adjacent pairs (a, b) to (a cos - b sin, b cos + a sin)."""
    a, b, cos, sin = x[..., ::2], x[..., 1::2], np.cos(angles), np.sin(angles)
    return np.stack([a * cos - b * sin, b * cos + a * sin], -1).reshape(x.shape)


def attend(query, key, value, heads, *, mask=True, angles=None):
    """Returns the attention of B x L x E queries, head by head."""
    outputs = []
    for q, k, v in zip(*(np.split(x, heads, -1) for x in (query, key, value)), strict=True):
        if angles is not None:
            q, k = turn(q, angles), turn(k, angles)
        scores = np.where(mask, q @ k.swapaxes(1, 2) / math.sqrt(q.shape[-1]), -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        outputs.append(weights / weights.sum(-1, keepdims=True) @ v)
    return np.concatenate(outputs, -1)


def run_blocks(x, t, prefix, tower, *, mask=True, angles=None):
    """Returns the output of all blocks of a tower."""
    activate, epsilon = ACTIVATIONS[tower.activation], tower.epsilon
    for layer in range(tower.layers):
        p = f"{prefix}.resblocks.{layer}."
        y = linear(layer_norm(x, t, f"{p}ln_1", epsilon), t, f"{p}attn.in_proj_")
        y = attend(*np.split(y, 3, -1), tower.heads, mask=mask, angles=angles)
        y = layer_norm(y, t, f"{p}attn.ln", epsilon) if tower.gated else y
        x = x + linear(y, t, f"{p}attn.out_proj.")
        y = layer_norm(x, t, f"{p}ln_2", epsilon)
        hidden = linear(y, t, f"{p}mlp.c_fc.")
        if tower.gated:
            hidden = activate(linear(y, t, f"{p}mlp.gate.")) * hidden
            hidden = layer_norm(hidden, t, f"{p}mlp.ln", epsilon)
        else:
            hidden = activate(hidden)
        x = x + linear(hidden, t, f"{p}mlp.c_proj.")
    return x


def resize(grid, rows, columns):
    """Resizes a square of vectors: bilinear, corners not aligned."""

    def weigh(count, size):
        weights = np.zeros((count, size))
        for i in range(count):
            place = min(max((i + 0.5) * size / count - 0.5, 0), size - 1)
            low = min(int(place), size - 2)
            weights[i, low], weights[i, low + 1] = 1 - (place - low), place - low
        return weights

    return np.einsum("ri,cj,ije->rce", weigh(rows, len(grid)), weigh(columns, len(grid)), grid)


def rotary(v, rows, columns):
    """Returns the angles of the class token, if any, and of each patch."""
    count, angles = v.width // v.heads // 4, []
    frequencies = [10000 ** (-j / count) for j in range(count)]
    start = 1 if v.rotary == "columns_first" and v.class_token else 0
    for row in range(rows):
        for column in range(columns):
            y, x = row + start, column + start
            if v.rotary_grid:
                y, x = y * v.rotary_grid / rows, x * v.rotary_grid / columns
            first, second = (x, y) if v.rotary == "columns_first" else (y, x)
            angles.append([first * f for f in frequencies] + [second * f for f in frequencies])
    return np.array([[0.0] * 2 * count] * v.class_token + angles)


def encode_images(family, tensors, images):
    """Returns the projected, pooled vectors, not normalised, of B x H x W x 3 images."""
    v, t = family.image, {name: x.astype(np.float64) for name, x in tensors.items()}
    number, rows, columns = len(images), images.shape[1] // v.patch, images.shape[2] // v.patch
    shape = number, rows, v.patch, columns, v.patch, 3
    patches = images.astype(np.float64).reshape(shape).transpose(0, 1, 3, 5, 2, 4)
    kernel = t["visual.conv1.weight"].reshape(v.width, -1)
    x = patches.reshape(number, rows * columns, -1) @ kernel.T + t.get("visual.conv1.bias", 0)
    positions, side = t["visual.positional_embedding"], v.side // v.patch
    if (rows, columns) != (side, side):
        square = positions[v.class_token :].reshape(side, side, -1)
        resized = resize(square, rows, columns).reshape(rows * columns, -1)
        positions = np.concatenate([positions[: int(v.class_token)], resized])
    if v.class_token:
        x = np.concatenate([np.tile(t["visual.class_embedding"], (number, 1, 1)), x], 1)
    x = x + positions
    x = layer_norm(x, t, "visual.ln_pre", v.epsilon) if v.pre_norm else x
    angles = None if v.rotary == "none" else rotary(v, rows, columns)
    x = layer_norm(
        run_blocks(x, t, "visual.transformer", v, angles=angles), t, "visual.ln_post", v.epsilon
    )
    x = pool_tokens(v, t, x) if v.pool_heads else x[:, 0]
    return x @ t["visual.proj"] + t.get("visual.proj_bias", 0) if "visual.proj" in t else x


def pool_tokens(v, t, x):
    """Returns the attention of the probe to B x L x E tokens, and an MLP of it added to it."""
    pool, (*weights,) = "visual.attn_pool.", np.split(t["visual.attn_pool.attn.in_proj_weight"], 3)
    biases = np.split(t[f"{pool}attn.in_proj_bias"], 3)
    probe = np.tile(t[f"{pool}probe"], (len(x), 1, 1))
    inputs = zip((probe, x, x), weights, biases, strict=True)
    y = attend(*(z @ weight.T + bias for z, weight, bias in inputs), v.pool_heads)
    y = linear(y, t, f"{pool}attn.out_proj.")[:, 0]
    hidden = linear(layer_norm(y, t, f"{pool}layernorm", v.epsilon), t, f"{pool}mlp.c_fc.")
    return y + linear(ACTIVATIONS[v.activation](hidden), t, f"{pool}mlp.c_proj.")


def encode_texts(family, tensors, ids):
    """Returns (projected vector of every position, that of the sentence), not normalised."""
    c, t = family.text, {name: x.astype(np.float64) for name, x in tensors.items()}
    length = ids.shape[1]
    x = t["token_embedding.weight"][ids] + t["positional_embedding"][:length]
    mask = np.tril(np.ones((length, length), bool)) if c.causal else True
    x = layer_norm(run_blocks(x, t, "transformer", c, mask=mask), t, "ln_final", c.epsilon)
    x = x @ t["text_projection"] + t.get("text_projection_bias", 0)
    places = {
        "argmax": [row.tolist().index(row.max()) for row in ids],
        "end": [row.tolist().index(c.end) if c.end in row else 0 for row in ids],
        "last": [length - 1] * len(ids),
    }[c.pool]
    return x, np.stack([x[i, place] for i, place in enumerate(places)])


def compute_logits(tensors, texts, images):
    """Returns the logits of every text with every image, from vectors that are not normalised."""
    texts, images = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (texts, images))
    scale = np.exp(np.float64(tensors["logit_scale"]))
    return scale * texts @ images.T + np.float64(tensors.get("logit_bias", 0))
