"""Random checkpoints with the names and shapes of the original PyTorch models."""

import json

import numpy as np
from safetensors.numpy import save_file

from xclip_jax.convert import exporting, layouts
from xclip_jax.convert.architecture import infer
from xclip_jax.convert.reading import Options, Source

VIT_B32 = {"patch": 32, "side": 224, "width": 768, "layers": 12, "dim": 512, "text_width": 512}
QUICK = Options(activation="quick_gelu")
TINY = {
    **{"patch": 8, "side": 16, "width": 64, "layers": 2, "dim": 64, "text_width": 64},
    **{"text_layers": 3, "context": 16, "vocab": 60},
}


def clip_shapes(
    patch, side, width, layers, dim, text_width, text_layers=12, context=77, vocab=49408
):
    """Returns {official name: shape} of OpenAI's ViT CLIP."""
    shapes = {
        "positional_embedding": (context, text_width),
        "text_projection": (text_width, dim),
        "logit_scale": (),
        "visual.class_embedding": (width,),
        "visual.positional_embedding": ((side // patch) ** 2 + 1, width),
        "visual.proj": (width, dim),
        "visual.conv1.weight": (width, 3, patch, patch),
        "token_embedding.weight": (vocab, text_width),
    }
    for name, size in (("visual.ln_pre", width), ("visual.ln_post", width)):
        shapes |= norm_shapes(name, size)
    shapes |= norm_shapes("ln_final", text_width)
    shapes |= block_shapes("visual.transformer", width, layers)
    return shapes | block_shapes("transformer", text_width, text_layers)


def norm_shapes(name, size):
    return {f"{name}.weight": (size,), f"{name}.bias": (size,)}


def block_shapes(prefix, width, layers):
    shapes = {}
    for layer in range(layers):
        block = f"{prefix}.resblocks.{layer}"
        shapes |= norm_shapes(f"{block}.ln_1", width) | norm_shapes(f"{block}.ln_2", width)
        for name, (out, into) in {
            "attn.in_proj_": (3 * width, width),
            "attn.out_proj.": (width, width),
            "mlp.c_fc.": (4 * width, width),
            "mlp.c_proj.": (width, 4 * width),
        }.items():
            shapes[f"{block}.{name}weight"] = (out, into)
            shapes[f"{block}.{name}bias"] = (out,)
    return shapes


def head_shapes(head, dim, context=16, words=12, frames=6, layers=2):
    """Returns {official name: shape} of the tensors that X-CLIP or CLIP4Clip adds to CLIP."""
    positions = {"frame_position_embeddings.weight": (context, dim)}
    if head == "mean_pooling":
        return {}
    if head == "seq_lstm":
        lstm = {f"lstm_visual.weight_{kind}_l0": (4 * dim, dim) for kind in ("ih", "hh")}
        return (
            positions | lstm | {f"lstm_visual.bias_{kind}_l0": (4 * dim,) for kind in ("ih", "hh")}
        )
    if head == "tight_transformer":
        return {
            "cross.embeddings.position_embeddings.weight": (context, dim),
            **block_shapes("cross.transformer", dim, layers),
            **norm_shapes("cross.pooler.ln_pool", dim),
            "cross.pooler.dense.weight": (dim, dim),
            "cross.pooler.dense.bias": (dim,),
            "similarity_dense.weight": (1, dim),
            "similarity_dense.bias": (1,),
        }
    shapes = positions | block_shapes("transformerClip", dim, layers)
    if head == "xclip":
        shapes |= {"global_mat_weight": (dim, dim), "local_mat_weight": (dim, dim)}
        for name, size in (("word", words), ("frame", frames)):
            for kind in ("logit_weight", "mat_weight", "mat_weight2"):
                shapes[f"{name}_{kind}"] = (size, size)
    return shapes


def release(head, seed=0, sizes=TINY):
    """Returns a random state dict of the official X-CLIP or CLIP4Clip."""
    clip = {f"clip.{name}": shape for name, shape in clip_shapes(**sizes).items()}
    return fill(clip | head_shapes(head, sizes["dim"], sizes["context"]), seed)


def clip(seed=0, sizes=TINY):
    """Returns a random state dict of plain CLIP."""
    return fill(clip_shapes(**sizes), seed)


def fill(shapes, seed):
    rng = np.random.default_rng(seed)
    return {
        name: np.asarray(rng.normal(0, 0.1, shape), np.float32) for name, shape in shapes.items()
    }


def write_hugging_face(folder, tensors, shards=1, **config):
    """Writes a Hugging Face folder of a plain CLIP's tensors, returns `folder`."""
    folder.mkdir()
    named = {f"clip.{name}": array for name, array in tensors.items()}
    options = Options(activation="gelu", vision_heads=4, text_heads=2)
    a = infer(Source("", False, named, options))
    description = exporting.clip_config(a, 58, 59) | config
    (folder / "config.json").write_text(json.dumps(description))
    weights = layouts.to_hugging_face(named)
    if shards == 1:
        save_file(weights, folder / "model.safetensors")
        return folder
    names, index = sorted(weights), {}
    for shard in range(shards):
        part = {name: weights[name] for name in names[shard::shards]}
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        save_file(part, folder / file)
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


def assert_same(found, expected):
    """Asserts that two dicts hold the same arrays, bit by bit."""
    assert set(found) == set(expected)
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        assert found[name].tobytes() == array.tobytes(), name
