"""Tests of the export to safetensors and of examples/xclip_torch.py, which reads it."""

import ast
import dataclasses
import json
import re
import sys
import textwrap
from functools import cache
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import code_rules
import jax
import numpy as np
import pytest
import tiny
import videoprism_files
from heads_test import model_config
from safetensors.numpy import load_file, save_file

import xclip_jax
from xclip_jax.checkpoint import describe_model
from xclip_jax.convert import __main__ as command
from xclip_jax.convert.exporting import export_safetensors
from xclip_jax.convert.importing import convert
from xclip_jax.convert.layouts import join_pool
from xclip_jax.convert.mapping import to_tensors
from xclip_jax.convert.reading import Options
from xclip_jax.models import ModelConfig, XClip
from xclip_jax.models.config import HEADS, check_model
from xclip_jax.models.families import EVA02, PE, SIGLIP, VIDEOPRISM

torch = pytest.importorskip("torch")
xclip_torch = pytest.importorskip("xclip_torch")
xclip_torch_encoders = pytest.importorskip("xclip_torch_encoders")
ROOT = Path(__file__).resolve().parents[1]
WORDS, FRAMES, SIDE = 5, 4, 8


def nest(fields, **more):
    return {k.replace(".", "__"): v for k, v in fields.items()} | more


SIGLIP_CASE = nest(
    SIGLIP,
    **{"vision__class_token": False, "vision__patch_bias": True, "vision__pre_norm": False},
    **{"vision__pool": "attention", "vision__projection": "none", "vision__mlp_width": 12},
    **{"text__projection": "bias", "text__context_length": WORDS, "logit_bias": True},
    **{"vision__image_size": SIDE + 1, "vision__uncovered": 1},
)
PE_CASE = nest(PE, vision__pool="attention", vision__pool_heads=4, vision__pool_mlp_width=12)
EVA_CASE = nest(EVA02, vision__patch_bias=True, vision__pre_norm=False, vision__projection="bias")
# Caps that change small logits, unlike the 50 of the released models, and an epsilon with which the
# norms of small vectors do not amplify rounding.
VIDEOPRISM_CASE = nest(
    VIDEOPRISM | {"vision.logit_cap": 2.0, "text.logit_cap": 1.5, "vision.epsilon": 1e-3},
    **{"vision__class_token": False, "vision__patch_bias": True, "vision__pre_norm": False},
    **{"vision__pool": "scaled_attention", "vision__projection": "none", "vision__mlp_width": 12},
    **{"vision__num_frames": FRAMES, "vision__temporal_layers": 2, "vision__joint_layers": 1},
)
PREPROCESS = {"preprocess__mean": (0.5, 0.4, 0.3), "preprocess__std": (0.2, 0.3, 0.4)}
CASES = {
    "paper": {"temporal__layers": 2, "text__end_id": 19, "text__pool": "end"},
    "official": {"preset": "official", "temporal__layers": 1, **PREPROCESS},
    **{head: {"head": head, "temporal__layers": 1} for head in HEADS if head != "xclip"},
    "tight_transformer, official": {"head": "tight_transformer", "preset": "official"},
    "fusion": {"fusion": "transformer", "temporal__layers": 1},
    "fusion, official": {"fusion": "transformer", "preset": "official", "logit_bias": True},
    "weighted": {"aggregation": "weighted", "temporal__type": "lstm"},
    "weighted, of CLIP's frames": {"aggregation": "weighted", "frame_features": "clip"},
    "learned tau": {"tau_learned": True, "max_scale": 5.0, "temporal__residual": True},
    "two matrices": {
        **{"granularities": ("frame_sentence", "video_word"), "preset": "official"},
        **{"temporal__type": "none", "words": "word_tokens"},
    },
    "SigLIP 2": SIGLIP_CASE,
    "PE": PE_CASE | {"padding": "competes"},
    "PE without class token": PE_CASE | {"vision__class_token": False, "vision__rotary_grid": 3},
    "EVA-02": EVA_CASE | {"words": "all_tokens"},
    "VideoPrism": VIDEOPRISM_CASE | {"head": "mean_pooling"},
    "VideoPrism, more frames": VIDEOPRISM_CASE
    | {"temporal__type": "none", "vision__num_frames": 3, "text__start_token": True},
    "VideoPrism, fewer frames": VIDEOPRISM_CASE
    | {"temporal__layers": 1, "vision__num_frames": 9, "vision__joint_layers": 0},
    "VideoPrism, official": VIDEOPRISM_CASE
    | {"preset": "official", "temporal__layers": 1, "vision__class_token": True},
    "VideoPrism, LSTM": VIDEOPRISM_CASE | {"aggregation": "weighted", "temporal__type": "lstm"},
    "VideoPrism, tight": VIDEOPRISM_CASE | {"head": "tight_transformer"},
    "VideoPrism, fusion": VIDEOPRISM_CASE | {"fusion": "transformer", "text__projection": "bias"},
    "open_clip": {
        **{"activation": "gelu", "text__activation": "silu", "max_scale": 5.0},
        **{"vision__epsilon": 1e-4, "text__epsilon": 1e-3},  # the latter also temporal
    },
    "vision": {"head": "mean_pooling", "towers": "vision"},
    "text": {"head": "mean_pooling", "towers": "text", "text__causal": False},
}
OTHERS = ("max-max", "mean-mean", "mean-max", "max-mean", "maxsim")
CASES |= {name: {"aggregation": name, "temporal__type": "none"} for name in OTHERS}


@cache
def make(name):
    """Returns (linen module, random parameters, PyTorch tensors) of a case."""
    sizes = {"vision__image_size": SIDE, "vision__patch_size": 4}
    model, rng = XClip(model_config(**sizes | CASES[name])), np.random.default_rng(1)
    check_model(model.config)
    params = tiny.make_params(model)
    params = jax.tree.map(lambda x: x + rng.normal(0, 0.2, x.shape).astype(x.dtype), params)
    return model, params, join_pool(to_tensors(params))


def write(folder, name, **changes):
    """Writes what the export writes for a case, with other values of model.json's fields."""
    model, _, tensors = make(name)
    folder.mkdir(exist_ok=True)
    described = describe_model(model.config)
    for field, value in changes.items():
        *parents, last = field.split("__")
        section = described
        for parent in parents:
            section = section[parent]
        section[last] = value
    (folder / "model.json").write_text(json.dumps(described))
    save_file(tensors, folder / "model.safetensors")
    return folder


def batch(config):
    """Returns 3 texts and 3 videos, padded, the last video without a real frame.

    Where texts have no end token, one text is empty.
    """
    rng, side = np.random.default_rng(0), config.vision.image_size
    ids = rng.integers(1, 19, (3, WORDS)).astype(np.int32)
    words = np.arange(WORDS) < [[3], [4 * config.text.end_token], [WORDS]]
    ids[np.arange(3), words.sum(1) - 1] = 19  # the end token
    frames = rng.integers(0, 256, (3, FRAMES, side, side, 3), np.uint8)
    return ids * words, words, frames, np.arange(FRAMES) < [[2], [FRAMES], [0]]


def compute(model, ids, words, frames, mask):
    """Returns the features of texts and videos, and their logits, of either module."""
    towers, found = model.config.towers, {}
    if towers != "vision":
        found["text"] = model.encode_text(ids, words)
    if towers != "text":
        found["video"] = model.encode_video(frames, mask)
    if towers == "both":
        found["logits"] = model.similarity(found["text"], found["video"])
    return found


def assert_close(actual, expected, limit):
    assert actual.shape == expected.shape
    worst = np.abs(np.asarray(actual, np.float64) - np.asarray(expected, np.float64)).max()
    assert worst <= limit, f"{worst:.1e}"


@pytest.mark.parametrize("name", CASES)
def test_torch_computes_the_same_numbers(name, tmp_path):
    model, params, _ = make(name)
    inputs = batch(model.config)
    expected = tiny.apply(model, params, *inputs, method=compute)
    with torch.inference_mode():
        loaded = xclip_torch.XClip.load(write(tmp_path, name))
        found = compute(loaded, *(torch.tensor(array) for array in inputs))
    assert found.keys() == expected.keys()
    for side in {"text", "video"} & found.keys():
        for array, other in zip(found[side], jax.tree.leaves(expected[side]), strict=False):
            assert_close(array.reshape(other.shape), other, 1e-5 * np.abs(other).max())
        assert (found[side].weights is None) == (expected[side].weights is None)
    if "logits" in found:
        assert np.ptp(expected["logits"]) > 0.1
        # Rounding of the deeper video towers is larger: relative to the largest logit.
        largest = np.abs(expected["logits"]).max() if model.config.vision.num_frames else 1.0
        assert_close(found["logits"], expected["logits"], 1e-5 * largest)


@pytest.mark.parametrize("name", CASES)
def test_every_tensor_has_a_documented_name(name):
    model, params, tensors = make(name)
    stacked = [("blocks" in str(path), leaf) for path, leaf in jax.tree.leaves_with_path(params)]
    separate = sum(len(leaf) if is_stack else 1 for is_stack, leaf in stacked)
    has_query = model.config.vision.pool != "class_token"
    joined = 2 * has_query  # query and key_value are one tensor
    assert len(tensors) == separate - joined
    text = (ROOT / "docs" / "pytorch.md").read_text("utf-8")
    documented = set(re.findall(r"`([^`\s]+)`", text))
    for tensor in tensors:
        *_, block = re.split(r"resblocks\.\d+\.", tensor)
        stack = re.sub(r"\d+", "N", tensor.removesuffix(block)) if block != tensor else ""
        parts = {stack, block} - {""}
        module = {part.removesuffix(".weight").removesuffix(".bias") for part in parts}
        assert module <= documented or parts <= documented, tensor


def test_tensors_must_be_exactly_those_of_the_model(tmp_path):
    file = write(tmp_path, "paper") / "model.safetensors"
    tensors = load_file(file)
    less = {name: x for name, x in tensors.items() if name != "clip.ln_final.bias"}
    for changed, message in [
        (less, r"Missing key.*clip\.ln_final\.bias"),
        (tensors | {"global_mat_weight": np.eye(8)}, r"Unexpected key.*global_mat_weight"),
        (
            tensors | {"clip.visual.proj": np.zeros((8, 7), np.float32)},
            "size mismatch.*visual.proj",
        ),
    ]:
        save_file(changed, file)
        with pytest.raises(RuntimeError, match=re.compile(message, re.DOTALL)):
            xclip_torch.XClip.load(tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("vision__family", "videoprism", r"model.json: vision family: missing, or unknown"),
        ("depth", 3, "model.json: depth: missing, or unknown"),
        ("vision__pool", "mean", r"vision pool = \['mean'\]: must be class_token|attention"),
        ("granularities", ["frame_word", "clip_word"], "granularities = .* must be video_sentence"),
        ("aggregation", "median", "aggregation = .*must be attention"),
        ("text__activation", "mish", r"text activation = \['mish'\]: must be None\|quick_gelu"),
        ("words", None, "words = .*must be word_tokens"),
    ],
)
def test_features_that_are_not_implemented_are_refused(tmp_path, field, value, message):
    folder = write(tmp_path, "paper", **{field: value})
    with pytest.raises(ValueError, match=message):
        xclip_torch.XClip.load(folder)


def find_choices(section, prefix=""):
    """Yields each field of a dataclass that names one of several choices, with these."""
    for name, hint in get_type_hints(section).items():
        hint = get_args(hint)[0] if type(None) in get_args(hint) else hint
        hint = get_args(hint)[0] if get_origin(hint) is tuple else hint
        if dataclasses.is_dataclass(hint):
            yield from find_choices(hint, f"{name}.")
        elif get_origin(hint) is Literal:
            yield prefix + name, set(get_args(hint))


def test_torch_module_implements_every_choice_of_the_model():
    known = {}
    for section, names in xclip_torch.FIELDS.items():
        for name, _, choices in (field.partition("=") for field in names.split()):
            known[f"{section}.{name}".lstrip(".")] = set(choices.split("|")) - {"", "None"}
    without_effect = {"preset", "dtype", "param_dtype", "remat", "vision.position_resize"}
    without_effect |= {"preprocess.resize", "preprocess.interpolation"}
    choices = dict(find_choices(ModelConfig))
    assert {name: known[name] for name in choices.keys() - without_effect} == {
        name: values for name, values in choices.items() if name not in without_effect
    }


def test_lengths_and_frames_that_would_change_the_numbers_are_refused(tmp_path):
    ids, words, frames, mask = map(torch.tensor, batch(make("paper")[0].config))
    official = xclip_torch.XClip.load(write(tmp_path / "official", "official"))
    paper = xclip_torch.XClip.load(write(tmp_path / "paper", "paper"))
    with pytest.raises(ValueError, match=rf"must be B x {WORDS}$"):
        official.encode_text(ids[:, :4], words[:, :4])
    with pytest.raises(ValueError, match=rf"must be B x {FRAMES} x 8 x 8 x 3$"):
        official.encode_video(frames[:, :2], mask[:, :2])
    with pytest.raises(ValueError, match=rf"must be B x at most {FRAMES} x 8 x 8 x 3$"):
        paper.encode_video(frames.movedim(-1, 2), mask)
    with pytest.raises(ValueError, match=r"frames are torch\.int64: must be uint8"):
        paper.encode_video(frames.long(), mask)
    related = xclip_torch.XClip.load(write(tmp_path / "videoprism", "VideoPrism"))
    with pytest.raises(ValueError, match=rf"must be B x {FRAMES} x 8 x 8 x 3$"):
        related.encode_video(frames[:, :2], mask[:, :2])  # frames would have other positions
    with torch.inference_mode():
        short = paper.encode_video(frames[:1, :2], mask[:1, :2])  # padding is masked
        long = paper.encode_video(frames[:1], mask[:1])
    assert_close(short.whole, long.whole, 1e-6)


def test_example_of_the_docstring_runs_on_an_export(tmp_path, monkeypatch, capsys):
    tiny.make_model(tmp_path / "model")
    arguments = [f"--input={tmp_path / 'model'}", f"--output={tmp_path / 'exported'}"]
    command.main(["--to=safetensors", *arguments])
    assert "tensors, for XClip.load" in capsys.readouterr().out
    files = sorted(path.name for path in (tmp_path / "exported").iterdir())
    assert files == ["model.json", "model.safetensors", "tokenizer"]
    monkeypatch.chdir(tmp_path)
    example = re.search(r"(    import torch\n.*?)\n\nIn masks", xclip_torch.__doc__, re.DOTALL)[1]
    exec(compile(textwrap.dedent(example), "xclip_torch.py", "exec"), variables := {})
    assert capsys.readouterr().out == "torch.Size([2, 3])\n"
    ids, mask = variables["batch"]["input_ids"] * variables["mask"], variables["mask"]
    retriever = xclip_jax.load(tmp_path / "model")
    expected = retriever.tokenizer(["a red dog", "a blue cat"])
    np.testing.assert_array_equal(ids, expected[0])
    np.testing.assert_array_equal(mask, expected[1])
    for source in (tmp_path / "exported", tmp_path / "exported" / "model.safetensors"):
        with pytest.raises(SystemExit, match=r"as it has a model\.json: pass the checkpoint"):
            command.main([f"--input={source}", f"--output={tmp_path / 'back'}"])
    with pytest.raises(SystemExit, match="--vocab cannot be used with --to=safetensors"):
        command.main(["--to=safetensors", *arguments[:1], "--output=x", "--vocab=y"])


@pytest.mark.parametrize(("head", "start"), [(None, -1), ("xclip", 3)])
def test_torch_module_runs_a_converted_videoprism(tmp_path, monkeypatch, head, start):
    checkpoint = videoprism_files.write(tmp_path / "a", videoprism_files.draw(), bos=start)
    convert(checkpoint, tmp_path / "model", Options(head=head))
    export_safetensors(tmp_path / "model", tmp_path / "exported")
    model, retriever = (
        xclip_torch.XClip.load(tmp_path / "exported"),
        xclip_jax.load(tmp_path / "model"),
    )
    assert model.config.text.start_token == (start >= 0)
    texts = ["the red square moves left", "Blue circle!", 40 * "turns up, "]
    docs = (ROOT / "docs" / "pytorch.md").read_text("utf-8")
    example = re.search(r"```python\n(import string\n.*?)```", docs, re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "pytorch.md", "exec"), variables := {"texts": texts, "model": model})
    inputs = variables["ids"], variables["text_mask"]
    for array, other in zip(inputs, retriever.tokenizer(texts), strict=True):
        np.testing.assert_array_equal(array, other)
    frames = np.random.default_rng(1).integers(0, 256, (3, 3, 12, 12, 3), np.uint8)
    mask = np.arange(3) < [[1], [2], [3]]
    video = retriever.encode("encode_video", (frames, mask), 3)
    expected = retriever.similarity(retriever.encode_text(texts), video)
    with torch.inference_mode():
        found = compute(model, *inputs, torch.tensor(frames), torch.tensor(mask))
    assert_close(found["video"].whole, video.video, 1e-5 * np.abs(video.video).max())
    assert_close(found["logits"], expected, 1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("module", [xclip_torch, xclip_torch_encoders], ids=lambda m: m.__name__)
def test_torch_modules_follow_the_rules_and_import_torch_and_safetensors_only(module):
    assert not code_rules.find_violations(Path(module.__file__))
    tree = ast.parse(Path(module.__file__).read_text("utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {a.name for node in imports if isinstance(node, ast.Import) for a in node.names}
    names |= {node.module for node in imports if isinstance(node, ast.ImportFrom)}
    foreign = {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names)
    assert foreign <= {"torch", "safetensors", "xclip_torch_encoders"}
