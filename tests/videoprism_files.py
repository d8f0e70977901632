"""Random checkpoints of VideoPrism-LvT in their published layout, and what they compute.

The forward pass is plain NumPy in float64, written from the original implementation.
"""

import io
import math
from dataclasses import dataclass

import numpy as np
import pytest
from scipy.special import erf, softmax
from sentencepiece import SentencePieceTrainer

from xclip_jax.convert.importing import convert
from xclip_jax.convert.reading import Options

WORDS = "a the red green blue grey square circle moves turns left right up down fast slowly"


@dataclass(frozen=True)
class Sizes:
    width: int = 16
    heads: int = 2
    hidden: int = 40  # of the video tower's MLPs
    spatial: int = 2
    temporal: int = 1
    joint: int = 1
    text: int = 2
    vocab: int = 42
    frames: int = 3
    grid: int = 3
    patch: int = 4


TEXTS = ["the red square moves left", "Blue circle!", "a grey circle turns right, slowly"]
SIZES = Sizes()


def block_shapes(prefix, layers, sizes, hidden):
    width, heads = sizes.width, sizes.heads
    inner = (heads, width // heads)
    shapes = {f"self_attention/{n}/w": (width, *inner) for n in ("query", "key", "value", "post")}
    shapes |= {f"self_attention/{n}/b": inner for n in ("query", "key", "value")}
    shapes |= {"self_attention/post/b": (width,)}
    for norm in ("layer_norm", "ff_layer/layer_norm"):
        shapes |= {f"{norm}/scale": (width,), f"{norm}/bias": (width,)}
    for name, into, out in (("ffn_layer1", width, hidden), ("ffn_layer2", hidden, width)):
        linear = f"ff_layer/{name}/linear"
        shapes |= {f"{linear}/kernel": (into, out), f"{linear}/bias": (out,)}
    return {f"{prefix}/x_layers/{name}": (layers, *shape) for name, shape in shapes.items()}


def draw(sizes=SIZES, seed=0):
    """Returns random arrays by their published names."""
    width, vision, pool = sizes.width, "vision_encoder", "contrastive_vision_pooler"
    inner = (sizes.heads, 4 * width // sizes.heads)
    shapes = {
        f"{vision}/patch_projection/linear/kernel": (3 * sizes.patch**2, width),
        f"{vision}/patch_projection/linear/bias": (width,),
        f"{vision}/spatial_pos_emb/emb_var": (sizes.grid**2, width),
        f"{vision}/temporal_pos_emb/emb_var": (sizes.frames, width),
        f"{pool}/pooling_attention_query": (1, width),
        f"{pool}/pooling_attention/per_dim_scale/per_dim_scale": inner[1:],
        f"{pool}/pooling_attention/post/w": (width, *inner),
        f"{pool}/pooling_attention/post/b": (width,),
        "text_encoder/token_emb/emb_var": (sizes.vocab, width),
        "text_encoder/cls_emb": (1, 1, width),
    }
    for name in ("query", "key", "value"):
        shapes[f"{pool}/pooling_attention/{name}/w"] = (width, *inner)
        shapes[f"{pool}/pooling_attention/{name}/b"] = inner
    norms = [f"{vision}/spatial_ln", f"{vision}/temporal_ln", "text_encoder/unimodal_ln"]
    for norm in [*norms, f"{pool}/pooling_attention_layer_norm"]:
        shapes |= {f"{norm}/scale": (width,), f"{norm}/bias": (width,)}
    for name, prefix, hidden in (
        ("spatial", f"{vision}/spatial_encoder/transformers_stack", sizes.hidden),
        ("temporal", f"{vision}/temporal_encoder/transformers_stack", sizes.hidden),
        ("joint", "auxiliary_encoder/transformers_stack", sizes.hidden),
        ("text", "text_encoder/unimodal_transformer", 4 * width),
    ):
        shapes |= block_shapes(prefix, getattr(sizes, name), sizes, hidden)
    rng = np.random.default_rng(seed)
    return {
        f"params/{name}": rng.normal(size=shape, scale=0.4).astype(np.float32)
        for name, shape in shapes.items()
    }


def write(folder, arrays, vocab_size=SIZES.vocab, **options):
    """Writes a checkpoint with a vocabulary learned from WORDS, and returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "flax_lvt_small_f3r12_repeated.npz", **arrays)
    (folder / "sentencepiece.model").write_bytes(learn_vocabulary(vocab_size, **options))
    return folder


def learn_vocabulary(size, bos=-1):
    """Returns a SentencePiece model with id 0 as padding and start token `bos` (-1: none)."""
    rng, stream = np.random.default_rng(0), io.BytesIO()
    sentences = (" ".join(rng.choice(WORDS.split(), 6)) + "." for _ in range(200))
    options = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": bos, "minloglevel": 2}
    SentencePieceTrainer.train(
        sentence_iterator=sentences, model_writer=stream, vocab_size=size, **options
    )
    return stream.getvalue()


class Reference:
    """The original's computations with the arrays of a checkpoint."""

    def __init__(self, arrays):
        self.arrays = {k.removeprefix("params/"): np.float64(v) for k, v in arrays.items()}

    def norm(self, name, x):
        scale, bias = self.arrays[f"{name}/scale"], self.arrays[f"{name}/bias"]
        variance = x.var(-1, keepdims=True)
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(variance + 1e-6) * (1 + scale) + bias

    def blocks(self, prefix, x, activate, mask=None):
        names = [n for n in self.arrays if n.startswith(f"{prefix}/x_layers/")]
        for layer in range(len(self.arrays[names[0]])):
            one = Reference({n.split("/x_layers/")[1]: self.arrays[n][layer] for n in names})
            x = x + one.attend(one.norm("layer_norm", x), mask)
            y, p = one.norm("ff_layer/layer_norm", x), one.arrays
            for name in ("ffn_layer1", "ffn_layer2"):
                linear = f"ff_layer/{name}/linear"
                y = y @ p[f"{linear}/kernel"] + p[f"{linear}/bias"]
                y = activate(y) if name == "ffn_layer1" else y
            x = x + y
        return x

    def attend(self, x, mask):
        """Returns self-attention with logits capped to 50 before the mask is applied."""
        q, k, v = (
            np.einsum("bld,dnh->blnh", x, self.arrays[f"self_attention/{name}/w"])
            + self.arrays[f"self_attention/{name}/b"]
            for name in ("query", "key", "value")
        )
        scores = 50 * np.tanh(np.einsum("bqnh,bknh->bnqk", q, k) * q.shape[-1] ** -0.5 / 50)
        weights = softmax(scores if mask is None else np.where(mask, scores, -1e30), -1)
        y, post = np.einsum("bnqk,bknh->bqnh", weights, v), self.arrays["self_attention/post/w"]
        return np.einsum("bqnh,dnh->bqd", y, post) + self.arrays["self_attention/post/b"]

    def pool(self, x):
        name = "contrastive_vision_pooler/pooling_attention"
        p = {k.removeprefix(f"{name}/"): v for k, v in self.arrays.items() if name in k}
        query = p[f"{name}_query"]
        q, k, v = (
            np.einsum("bld,dnh->blnh", y, p[f"{part}/w"]) + p[f"{part}/b"]
            for part, y in (("query", query[None]), ("key", x), ("value", x))
        )
        scale = 1.442695041 / math.sqrt(q.shape[-1])
        q = q * scale * np.log1p(np.exp(p["per_dim_scale/per_dim_scale"]))
        weights = softmax(np.einsum("onh,blnh->bnl", q[0], k), -1)
        y = np.einsum("bnl,blnh->bnh", weights, v)
        y = np.einsum("bnh,dnh->bd", y, p["post/w"]) + p["post/b"]
        return self.norm(f"{name}_layer_norm", y)

    def encode_video(self, frames):
        """Returns the vectors of videos and frames, of V x F x S x S x 3 pixels in [0, 1]."""
        p, (videos, count, side, *_) = self.arrays, frames.shape
        kernel = p["vision_encoder/patch_projection/linear/kernel"]
        patch = math.isqrt(len(kernel) // 3)
        grid = side // patch
        x = frames.reshape(videos * count, grid, patch, grid, patch, 3).swapaxes(2, 3)
        x = x.reshape(videos * count, grid * grid, -1) @ kernel
        x = x + p["vision_encoder/patch_projection/linear/bias"]
        x = x + p["vision_encoder/spatial_pos_emb/emb_var"]
        x = self.blocks("vision_encoder/spatial_encoder/transformers_stack", x, gelu)
        x = self.norm("vision_encoder/spatial_ln", x)
        x = x.reshape(videos, count, grid * grid, -1).swapaxes(1, 2)
        x = (x + p["vision_encoder/temporal_pos_emb/emb_var"]).reshape(-1, count, x.shape[-1])
        x = self.blocks("vision_encoder/temporal_encoder/transformers_stack", x, gelu)
        x = self.norm("vision_encoder/temporal_ln", x)
        x = x.reshape(videos, grid * grid, count, -1).swapaxes(1, 2)
        x = x.reshape(videos, -1, x.shape[-1])
        x = self.blocks("auxiliary_encoder/transformers_stack", x, gelu)
        frames = self.pool(x.reshape(videos * count, grid * grid, -1))
        return self.pool(x), frames.reshape(videos, count, -1)

    def encode_text(self, ids, mask):
        """Returns the vectors of sentences and of all positions, of T x W ids."""
        table, token = (self.arrays[f"text_encoder/{n}"] for n in ("token_emb/emb_var", "cls_emb"))
        (texts, words), width = ids.shape, table.shape[1]
        half = width // 2
        angles = np.arange(words)[:, None] * np.exp(-np.arange(half) * math.log(10000) / (half - 1))
        x = table[ids] * math.sqrt(width) + np.concatenate([np.sin(angles), np.cos(angles)], 1)
        x = np.concatenate([x, np.tile(token * math.sqrt(width), (texts, 1, 1))], 1)
        real = np.pad(mask, ((0, 0), (0, 1)), constant_values=True)[:, None, None]
        real = real & np.tril(np.ones((words + 1, words + 1), bool))
        x = self.blocks("text_encoder/unimodal_transformer", x, lambda x: np.maximum(x, 0), real)
        x = self.norm("text_encoder/unimodal_ln", x)
        return x[:, -1], x[:, :-1]


def gelu(x):
    return x * 0.5 * (1 + erf(x / math.sqrt(2)))


@pytest.fixture(scope="module")
def arrays():
    return draw()


@pytest.fixture(scope="module")
def checkpoint(arrays, tmp_path_factory):
    return write(tmp_path_factory.mktemp("videoprism") / "small", arrays)


@pytest.fixture(scope="module")
def directory(checkpoint, tmp_path_factory):
    """Returns the converted model, with the head of X-CLIP."""
    folder = tmp_path_factory.mktemp("converted") / "model"
    convert(checkpoint, folder, Options(head="xclip"))
    return folder
