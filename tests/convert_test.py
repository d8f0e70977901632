"""Tests of conversion both ways: recognition, bit-exact round trips, one-line errors."""

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import checkpoints
import jax
import numpy as np
import pytest
from checkpoints import QUICK, assert_same, write_hugging_face
from safetensors.numpy import load_file

import xclip_jax
from xclip_jax.checkpoint import init_params
from xclip_jax.cli import InputError
from xclip_jax.convert import __main__ as command
from xclip_jax.convert import layouts, mapping
from xclip_jax.convert.architecture import infer
from xclip_jax.convert.exporting import export
from xclip_jax.convert.importing import convert
from xclip_jax.convert.reading import Options, Source
from xclip_jax.convert.torch_archive import read_archive, write_archive
from xclip_jax.data.text import learn_tokenizer
from xclip_jax.models import XClip
from xclip_jax.models.config import HEADS, TextConfig, VisionConfig

ROOT = Path(__file__).resolve().parents[1]


def write(path, tensors):
    write_archive(path, tensors)
    return path


@pytest.mark.parametrize("head", HEADS)
def test_round_trip_is_bit_identical(tmp_path, head):
    tensors = checkpoints.release(head)
    convert(write(tmp_path / "a.bin", tensors), tmp_path / "model")
    retriever = xclip_jax.load(tmp_path / "model")
    assert (retriever.config["head"], retriever.config["preset"]) == (head, "official")
    export(tmp_path / "model", tmp_path / "out")
    assert_same(read_archive(tmp_path / "out" / "pytorch_model.bin").tensors, tensors)
    towers = layouts.from_hugging_face(load_file(tmp_path / "out" / "clip" / "model.safetensors"))
    assert_same(towers, {name: x for name, x in tensors.items() if name.startswith("clip.")})


def test_sizes_are_inferred_from_shapes(tmp_path):
    convert(write(tmp_path / "a.bin", checkpoints.release("xclip")), tmp_path / "model")
    a = json.loads((tmp_path / "model" / "model.json").read_text())
    assert (a["max_words"], a["max_frames"], a["embed_dim"]) == (12, 6, 64)
    sizes = {"width": 64, "heads": 1}
    vision = VisionConfig(image_size=16, patch_size=8, layers=2, **sizes)
    assert a["vision"] == asdict(vision)
    assert a["text"] == asdict(TextConfig(vocab_size=60, context_length=16, layers=3, **sizes))
    assert a["temporal"] == {"type": "transformer", "layers": 2, "heads": 1, "residual": True}


@pytest.mark.parametrize(
    ("sizes", "text_heads", "heads", "positions"),
    [
        (checkpoints.VIT_B32, 8, 12, 50),
        ({**checkpoints.VIT_B32, "patch": 16}, 8, 12, 197),
        (
            {"patch": 14, "side": 224, "width": 1024, "layers": 24, "dim": 768, "text_width": 768},
            12,
            16,
            257,
        ),
        (
            {"patch": 14, "side": 336, "width": 1024, "layers": 24, "dim": 768, "text_width": 768},
            12,
            16,
            577,
        ),
    ],
    ids=["B/32", "B/16", "L/14", "L/14@336"],
)
def test_openai_architectures_are_inferred(sizes, text_heads, heads, positions):
    shapes = {f"clip.{name}": s for name, s in checkpoints.clip_shapes(**sizes).items()}
    tensors = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
    a = infer(Source("CLIP", False, tensors, QUICK))
    assert (a.text.heads, a.vision.heads, a.max_words) == (text_heads, heads, 77)
    assert a.vision.image_size == sizes["side"]
    assert shapes["clip.visual.positional_embedding"][0] == positions
    template = jax.eval_shape(lambda: init_params(XClip(a), 0))
    params = jax.tree.map(lambda x: np.broadcast_to(False, x.shape), template)
    found = {name: view.shape for name, view in mapping.torch_views(params).items()}
    assert found == shapes


def test_float16_weights_are_converted_exactly(tmp_path):
    tensors = {n: x.astype(np.float16) for n, x in checkpoints.clip().items()}
    convert(write(tmp_path / "a.pt", tensors), tmp_path / "model", QUICK)
    params = xclip_jax.load(tmp_path / "model").params
    found = mapping.to_tensors(params)
    assert_same(found, {f"clip.{n}": x.astype(np.float32) for n, x in tensors.items()})


def test_open_clip_checkpoints_and_buffers_are_recognized(tmp_path, capsys):
    tensors = {f"module.{n}": x for n, x in checkpoints.clip().items()}
    tensors["module.attn_mask"] = np.zeros((16, 16), np.float32)
    convert(write(tmp_path / "a.pt", tensors), tmp_path / "plain", QUICK)
    assert "quick_gelu" in capsys.readouterr().out
    convert(tmp_path / "a.pt", tmp_path / "gelu", Options(activation="gelu"))
    printed = capsys.readouterr().out
    assert "activation   gelu" in printed
    assert "skipped      attn_mask" in printed
    assert xclip_jax.load(tmp_path / "gelu").model.config.activation == "gelu"
    custom = checkpoints.clip()
    text = ("positional_embedding", "text_projection", "token", "ln_final", "transformer")
    custom = {f"text.{n}" if n.startswith(text) else n: x for n, x in custom.items()}
    convert(write(tmp_path / "b.pt", custom), tmp_path / "custom", Options(activation="gelu"))
    assert "open_clip" in capsys.readouterr().out
    assert xclip_jax.load(tmp_path / "custom").model.config.activation == "gelu"


def test_converted_clip_searches_with_either_head(tmp_path):
    tokenizer = learn_tokenizer(["a red ball", "a dog"])
    tokenizer.save(tmp_path / "vocab")
    sizes = {**checkpoints.TINY, "vocab": tokenizer.vocab_size}
    path = write(tmp_path / "a.pt", checkpoints.clip(sizes=sizes))
    frames = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)
    scores = {}
    for head in ("mean_pooling", "xclip"):
        convert(path, tmp_path / head, replace(QUICK, vocab=str(tmp_path / "vocab"), head=head))
        retriever = xclip_jax.load(tmp_path / head)
        found = retriever.search("a red ball", [frames, frames[:1]], k=1)
        scores[head] = found[0].score
        text = retriever.encode_text(["a dog"])
        granular = retriever.model.apply(
            {"params": retriever.params},
            text,
            retriever.encode_video([frames]),
            method="granular_similarity",
        )
        assert len(granular) == {"mean_pooling": 1, "xclip": 4}[head]
    assert scores["mean_pooling"] != scores["xclip"]


def test_lengths_must_match_matrices_unless_cropped(tmp_path):
    tensors = checkpoints.release("xclip")
    path = write(tmp_path / "a.bin", tensors)
    with pytest.raises(InputError, match=r"--max_words=8: .* for length 12; --crop_matrices"):
        convert(path, tmp_path / "model", Options(max_words=8))
    with pytest.raises(InputError, match=r"--max_frames=7: the learned matrices are for length 6$"):
        convert(path, tmp_path / "model", Options(max_frames=7, crop_matrices=True))
    convert(path, tmp_path / "model", Options(max_words=8, max_frames=3, crop_matrices=True))
    retriever = xclip_jax.load(tmp_path / "model")
    matrices = retriever.params["aggregation_matrices"]
    np.testing.assert_array_equal(matrices["video_word"], tensors["word_logit_weight"][:8, :8])
    np.testing.assert_array_equal(matrices["frame_sentence"], tensors["frame_logit_weight"][:3, :3])
    video = retriever.encode_video([np.zeros((2, 16, 16, 3), np.uint8)])
    ids = np.zeros((1, 9), np.int32)
    apply = retriever.model.apply
    text = apply({"params": retriever.params}, ids, ids == 0, method="encode_text")
    with pytest.raises(ValueError, match=r"9 words and 3 frames: .* 8 and 3"):
        retriever.similarity(text, video)


def change(tensors, **changes):
    changed = dict(tensors)
    for name, value in changes.items():
        name = name.replace("__", ".")
        if value is None:
            del changed[name]
        else:
            changed[name] = value
    return changed


def test_missing_misshapen_and_unknown_weights_are_named(tmp_path):
    good = checkpoints.release("seq_transformer")
    block = "transformerClip__resblocks__1__attn__in_proj_bias"
    for tensors, message in {
        "missing": (change(good, clip__ln_final__bias=None), "clip.ln_final.bias is missing"),
        "shape": (
            change(good, **{block: np.zeros(5, np.float32)}),
            r"transformerClip.resblocks.1.attn.in_proj_bias has shape \(5,\), must be \(192,\)",
        ),
        "unknown": (
            change(good, strange__weight=np.zeros(3, np.float32)),
            "unknown weights: strange.weight",
        ),
        "sizes": (change(good, clip__visual__proj=None), "^visual.proj is missing: cannot infer"),
        "huge image": (
            change(good, clip__visual__positional_embedding=np.zeros((10**6 + 1, 1), np.float32)),
            "image size 8000: must be from 1 to 4096 px",
        ),
        "no text": (change(good, clip__text_projection=None), "text_projection is missing"),
    }.values():
        path = write(tmp_path / "a.bin", tensors)
        with pytest.raises(InputError, match=message):
            convert(path, tmp_path / "model")
        path.unlink()
    assert not list(tmp_path.glob("model*"))


def test_export_names_features_the_official_code_lacks(tmp_path, capsys):
    path = write(tmp_path / "a.pt", checkpoints.clip())
    for number, (options, reason) in enumerate([
        ({"activation": "gelu"}, "model.activation = gelu"),
        ({"vision_heads": 4}, "model.vision.heads = 4"),
        ({}, None),
    ]):  # fmt: skip
        convert(path, tmp_path / f"model{number}", replace(QUICK, **options))
        capsys.readouterr()
        export(tmp_path / f"model{number}", tmp_path / f"out{number}")
        assert (reason or "official state dict, for torch.load") in capsys.readouterr().out
        assert (tmp_path / f"out{number}" / "pytorch_model.bin").exists() == (reason is None)


def test_files_beside_the_output_are_untouched(tmp_path):
    path = write(tmp_path / "a.pt", checkpoints.clip())
    mine = tmp_path / "model.part" / "precious"
    mine.mkdir(parents=True)
    convert(path, tmp_path / "model", QUICK)
    export(tmp_path / "model", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.pt", "model", "model.part", "out"]
    assert mine.is_dir()


def test_invalid_options_are_refused(tmp_path):
    path = write(tmp_path / "a.bin", checkpoints.release("xclip"))
    for options, message in [
        ({"max_words": 0}, "--max_words=0: must be at least 1"),
        ({"vision_heads": -1}, "--vision_heads=-1: must be at least 1"),
        ({"text_heads": 7}, "divisible by 7 heads: correct --text_heads"),
        ({"crop_matrices": True}, "--crop_matrices requires"),
    ]:
        with pytest.raises(InputError, match=re.escape(message)):
            convert(path, tmp_path / "model", Options(**options))
    folder = write_hugging_face(tmp_path / "hf", checkpoints.clip())
    with pytest.raises(InputError, match=r"--activation=quick_gelu: config.json has gelu: omit"):
        convert(folder, tmp_path / "model", QUICK)
    config = json.loads((folder / "config.json").read_text())
    vision = config["vision_config"] | {"num_attention_heads": 0}
    for tower, message in [("x", "must be an object"), (vision, r"heads .vision. is 0")]:
        (folder / "config.json").write_text(json.dumps(config | {"vision_config": tower}))
        with pytest.raises(InputError, match=message):
            convert(folder, tmp_path / "model")
    for source, message in [("/nowhere/a.pt", "no such file or folder"), ("", "--input is empty")]:
        with pytest.raises(InputError, match=message):
            convert(source, tmp_path / "model")


def test_resnet_is_refused(tmp_path):
    tensors = {"visual.layer1.0.conv1.weight": np.zeros((4, 4, 1, 1), np.float32)}
    with pytest.raises(InputError, match="ResNet image tower is not supported, only ViT"):
        convert(write(tmp_path / "RN50.pt", tensors), tmp_path / "model")


def test_export_without_official_counterpart_writes_only_towers(tmp_path, capsys):
    path = write(tmp_path / "a.pt", checkpoints.clip())
    convert(path, tmp_path / "model", replace(QUICK, head="xclip"))
    export(tmp_path / "model", tmp_path / "out")
    assert "no official state dict" in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["clip"]


def run(capsys, *arguments):
    """Returns the output and the exit status of the command."""
    try:
        command.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return capsys.readouterr().out + str(stop.code), stop.code
    return capsys.readouterr().out, 0


def test_command_prints_summary_and_one_line_errors(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    path = write(tmp_path / "a.bin", checkpoints.release("xclip"))
    printed, code = run(capsys, f"--input={path}", f"--output={tmp_path / 'model'}")
    assert code == 0
    assert "X-CLIP" in printed
    assert "activation   quick_gelu" in printed
    assert "12 words, 6 frames" in printed
    assert "none: texts cannot be encoded" in printed
    for arguments, message in [
        ([f"--input={path}", f"--output={tmp_path / 'model'}"], "exists already"),
        (["--input=no/such", f"--output={tmp_path / 'x'}"], "https://huggingface.co/no/such"),
        ([f"--input={path}", f"--output={tmp_path / 'x'}", "--head=xclip"], "its own head"),
        ([f"--input={ROOT / 'setup.py'}", f"--output={tmp_path / 'x'}"], "error: "),
        ([f"--input={tmp_path}", f"--output={tmp_path / 'x'}"], "no config.json"),
        ([f"--input={path}", f"--output={tmp_path / 'x'}", "--to=pytorch"], "no model in"),
        (
            [
                f"--input={tmp_path / 'model'}",
                f"--output={tmp_path / 'x'}",
                "--to=pytorch",
                "--max_words=3",
            ],
            "--max_words cannot be used",
        ),
    ]:
        printed, code = run(capsys, *arguments)
        assert message in printed, printed
        assert "\n" not in str(code), printed
        assert not (tmp_path / "x").exists()


def test_width_and_layers_of_towers_are_errors_of_their_own(tmp_path):
    no_layers = write(tmp_path / "a.pt", checkpoints.clip(sizes=checkpoints.TINY | {"layers": 0}))
    with pytest.raises(InputError, match="the vision tower has no layers"):
        convert(no_layers, tmp_path / "model")
    path = write(tmp_path / "b.pt", checkpoints.clip())
    with pytest.raises(InputError, match="the text tower has width 64, not divisible by 5 heads"):
        convert(path, tmp_path / "model", Options(text_heads=5))
    assert not (tmp_path / "model").exists()


def test_convert_runs_without_torch(tmp_path):
    path = write(tmp_path / "a.bin", checkpoints.release("seq_lstm"))
    code = (
        "import sys; sys.modules['torch'] = None; from xclip_jax.convert.__main__ import main;"
        f"main(['--input={path}', '--output={tmp_path / 'model'}'])"
    )
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "kept unread  frame_position_embeddings.weight" in done.stdout
