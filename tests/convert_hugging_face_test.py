"""Tests of converting folders of Hugging Face, compared with Transformers where installed."""

import json

import checkpoints
import ml_dtypes
import numpy as np
import pytest
from checkpoints import assert_same, write_hugging_face
from safetensors.numpy import save_file

import xclip_jax
from xclip_jax.cli import InputError
from xclip_jax.convert import mapping
from xclip_jax.convert.exporting import export
from xclip_jax.convert.importing import convert
from xclip_jax.data.text import learn_tokenizer


@pytest.mark.parametrize("shards", [1, 3])
def test_hugging_face_folder_is_converted(tmp_path, shards):
    tensors = checkpoints.clip()
    folder = write_hugging_face(tmp_path / "hf", tensors, shards)
    learn_tokenizer(["a dog"]).save(folder)
    with pytest.raises(InputError, match="ids, but the text tower has 60"):
        convert(folder, tmp_path / "model")
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        (folder / name).unlink(missing_ok=True)
    convert(folder, tmp_path / "model")
    retriever = xclip_jax.load(tmp_path / "model")
    assert retriever.config["vision"]["heads"] == 4
    assert retriever.config["text"]["heads"] == 2
    assert retriever.config["activation"] == "gelu"
    assert_same(mapping.to_tensors(retriever.params), {f"clip.{n}": x for n, x in tensors.items()})
    with pytest.raises(InputError, match="--vocab"):
        retriever.encode_text(["a dog"])


def test_invalid_hugging_face_folders_are_refused(tmp_path):
    tensors = checkpoints.clip()
    for number, (config, message) in enumerate([
        ({"model_type": "blip"}, "model_type is 'blip', must be 'clip' or 'siglip'"),
        ({"model_type": "siglip"}, "layer_norm_eps is 1e-05 .*; must be 1e-06 in both"),
        ({"model_type": "siglip2"}, r"'siglip2' is SigLIP 2 with images of any shape \(NaFlex\)"),
        ({"vision_config": {"hidden_act": "relu"}}, "hidden_act is 'relu'"),
    ]):  # fmt: skip
        folder = write_hugging_face(tmp_path / str(number), tensors, **config)
        with pytest.raises(InputError, match=message):
            convert(folder, tmp_path / "model")
    for text in ("{", "[" * 100_000):
        (folder / "config.json").write_text(text)
        with pytest.raises(InputError, match="not valid JSON"):
            convert(folder, tmp_path / "model")
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match=r"holds no config.json and is not a Hugging Face model"):
        convert(folder / "model.safetensors", tmp_path / "model")
    (folder / "model.safetensors").write_bytes(b"not one")
    (folder / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(InputError, match="not a complete safetensors file"):
        convert(folder, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": 1}}')
    with pytest.raises(InputError, match="not a valid index of shards"):
        convert(folder, tmp_path / "model")
    for shard in "ab":
        save_file({"logit_scale": np.zeros(1, np.float32)}, folder / f"{shard}.safetensors")
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"b\.safetensors: logit_scale is also in another shard"):
        convert(folder, tmp_path / "model")


def torch_clip(folder, **sizes):
    """Saves a random CLIPModel and returns (ids, frames, logits)."""
    torch = pytest.importorskip("torch")
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(**sizes)).eval()
    model.save_pretrained(folder)
    size = model.config.vision_config.image_size
    frames = torch.randn(3, 3, size, size)
    ids = torch.randint(5, 40, (2, 9))
    end = model.config.text_config.eos_token_id
    ids[:, -1] = end
    with torch.no_grad():
        logits = model(input_ids=ids, pixel_values=frames).logits_per_text
    return ids.numpy(), frames.numpy(), logits.numpy()


@pytest.mark.parametrize(
    "sizes",
    [
        {
            "text_config": {
                **{"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2},
                **{"num_attention_heads": 4, "vocab_size": 50, "max_position_embeddings": 12},
                **{"eos_token_id": 49, "hidden_act": "gelu"},
            },
            "vision_config": {
                **{"hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 2},
                **{"num_attention_heads": 2, "image_size": 24, "patch_size": 8},
                **{"hidden_act": "gelu"},
            },
            "projection_dim": 32,
        },
        pytest.param(
            {"text_config": {"eos_token_id": 49407}}, id="B/32", marks=pytest.mark.slow
        ),
    ],
)  # fmt: skip
def test_import_and_export_match_transformers(tmp_path, sizes):
    ids, frames, logits = torch_clip(tmp_path / "hf", **sizes)
    convert(tmp_path / "hf", tmp_path / "model")
    retriever = xclip_jax.load(tmp_path / "model")
    apply = retriever.model.apply
    found = apply(
        {"params": retriever.params},
        ids.astype(np.int32),
        np.ones(ids.shape, bool),
        frames.transpose(0, 2, 3, 1)[:, None],
        np.ones((3, 1), bool),
    )
    np.testing.assert_allclose(found, logits, atol=1e-4)

    export(tmp_path / "model", tmp_path / "out")
    import torch
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(tmp_path / "out" / "clip").eval()
    with torch.no_grad():
        back = model(input_ids=torch.tensor(ids), pixel_values=torch.tensor(frames))
    np.testing.assert_array_equal(back.logits_per_text.numpy(), logits)
    if "hidden_act" not in sizes["text_config"]:  # else the official code has no such model
        state = torch.load(tmp_path / "out" / "pytorch_model.bin", weights_only=True)
        assert state["clip.visual.proj"].dtype == torch.float32
        assert torch.equal(state["clip.visual.proj"], model.visual_projection.weight.T)


def test_bfloat16_weights_are_converted_exactly(tmp_path):
    tensors = {n: x.astype(ml_dtypes.bfloat16) for n, x in checkpoints.clip().items()}
    folder = write_hugging_face(tmp_path / "hf", tensors)
    convert(folder, tmp_path / "model")
    found = mapping.to_tensors(xclip_jax.load(tmp_path / "model").params)
    assert_same(found, {f"clip.{n}": x.astype(np.float32) for n, x in tensors.items()})
