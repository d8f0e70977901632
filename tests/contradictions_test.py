"""Tests that files which contradict the weights beside them are errors that name both."""

import json
from dataclasses import replace

import families
import layouts_test
import numpy as np
import pytest
import tiny

import xclip_jax
from xclip_jax.cli import InputError
from xclip_jax.convert.importing import import_model
from xclip_jax.convert.reading import Options
from xclip_jax.data.text import learn_tokenizer
from xclip_jax.models import XClip
from xclip_jax.models.families import timm_tower


def encode_image(model, images):
    return model.clip.visual(images)


def change(folder, name, path, value):
    """Sets an entry, such as "vision_config.image_size", of a JSON file."""
    content = json.loads((folder / name).read_text())
    *groups, entry = path.split(".")
    section = content
    for group in groups:
        section = section.setdefault(group, {})
    section[entry] = value
    (folder / name).write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        ("vision_config.image_size", 64, "states vision.image_size = 64, the weights have 24"),
        ("vision_config.num_hidden_layers", 1, "states vision.layers = 1, the weights have 2"),
        ("text_config.num_hidden_layers", 3, "states text.layers = 3, the weights have 2"),
        ("text_config.vocab_size", 61, "states text.vocab_size = 61, the weights have 60"),
        ("vision_config.vision_use_head", False, "vision_use_head is False, supported is true"),
    ],
)
def test_hugging_face_config_that_contradicts_the_weights(tmp_path, entry, value, message):
    folder = layouts_test.prepare(tmp_path, "siglip")[2]
    import_model(folder)
    change(folder, "config.json", entry, value)
    with pytest.raises(InputError, match=f"config.json.*{message}"):
        import_model(folder)


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        ("vision_cfg.timm_model_kwargs.depth", 1, "states vision.layers = 1, the weights have 2"),
        ("vision_cfg.timm_model_kwargs.patch_size", 16, "patch_size = 16, the weights have 8"),
        ("vision_cfg.image_size", 48, "image_size = 48, its timm_model_kwargs 24"),
        ("vision_cfg.timm_pool", "token", "timm_pool is 'token', not that of vit_base_patch16_sig"),
        ("vision_cfg.timm_model_name", "vit_base_patch16_clip_224", "timm_pool is 'map', not tha"),
        ("vision_cfg.timm_model_name", "vit_pe_core_base_patch16_224", "class_token = True, the w"),
        ("vision_cfg.qk_norm", True, "vision_cfg.qk_norm is True, a setting that is not supported"),
        ("text_cfg.ls_init_value", 1e-5, "text_cfg.ls_init_value is 1e-05, a setting that is not"),
        ("text_cfg.proj_bias", False, "states text.projection = 'linear', the weights have 'bias'"),
        ("text_cfg.tokenizer_kwargs", {"clean": "whitespace"}, "clean is 'whitespace', supported"),
    ],
)
def test_open_clip_config_that_contradicts_the_weights(tmp_path, entry, value, message):
    folder = layouts_test.prepare(tmp_path, "siglip of timm")[2]
    folder = folder if folder.is_dir() else folder.parent
    import_model(folder)
    change(folder, "open_clip_config.json", f"model_cfg.{entry}", value)
    with pytest.raises(InputError, match=f"open_clip_config.json.*{message}"):
        import_model(folder)


def test_towers_of_timm_are_known_by_their_whole_names():
    # timm gives act_layer = gelu_tanh to these two and to the towers of so400m with patch 16.
    for name in ("vit_base_patch32_siglip_256", "vit_large_patch16_siglip_512.v2_webli"):
        assert timm_tower(name)["vision.activation"] == "gelu_tanh"
    assert timm_tower("vit_large_patch16_siglip_384")["vision.activation"] == "gelu"
    for name in ("vit_large_patch3_siglip_7", "vit_base_patch16_siglip_gap_224", "resnet50"):
        assert timm_tower(name) is None


def test_siglip_without_its_preprocessor_is_prepared_as_in_transformers(tmp_path):
    folder = layouts_test.prepare(tmp_path, "siglip")[2]
    (folder / "preprocessor_config.json").unlink(missing_ok=True)
    expected = ("squash", "bicubic", (0.5,) * 3)
    for content in (None, {}, {"size": {"height": 24, "width": 24}}):
        if content is not None:
            (folder / "preprocessor_config.json").write_text(json.dumps(content))
        p = import_model(folder).config.preprocess
        assert (p.resize, p.interpolation, p.mean) == expected


def test_siglip_without_its_tokenizer_is_an_error(tmp_path):
    folder = layouts_test.prepare(tmp_path, "siglip")[2]
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "GemmaTokenizer"}')
    with pytest.raises(InputError, match=r"tokenizer.json is missing, download it"):
        import_model(folder)


def test_end_token_of_another_tokenizer_is_refused(tmp_path):
    """A text without the end token would have the vector of its first position, as all others."""
    learn_tokenizer(["a dog"]).save(tmp_path / "vocab")
    text = replace(layouts_test.CLIP_END.text, vocab=600, end=5)
    family = layouts_test.CLIP_END._replace(text=text)
    folder = layouts_test.write_hugging_face(tmp_path / "a", family, families.draw(family))
    with pytest.raises(InputError, match=r"vocab ends texts by the id \d+, but .*eos_token_id 5"):
        import_model(folder, Options(vocab=tmp_path / "vocab"))


def test_missing_shard_is_named(tmp_path):
    folder = layouts_test.prepare(tmp_path, "clip in bfloat16 and shards")[2]
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(InputError, match=f"^{shard} is missing"):
        xclip_jax.load(folder)


def test_square_may_be_stated_by_both_sides(tmp_path):
    folder = layouts_test.prepare(tmp_path, "siglip of timm")[2]
    folder = folder if folder.is_dir() else folder.parent
    change(
        folder, "open_clip_config.json", "model_cfg.vision_cfg.timm_model_kwargs.img_size", [24, 24]
    )
    assert import_model(folder).config.vision.image_size == 24
    change(
        folder, "open_clip_config.json", "model_cfg.vision_cfg.timm_model_kwargs.img_size", [24, 48]
    )
    with pytest.raises(InputError, match=r"image_size = 24, its timm_model_kwargs \[24, 48\]"):
        import_model(folder)


def test_pixels_that_no_patch_covers_are_ignored(tmp_path):
    # As SigLIP so400m at 384 pixels: 27 x 27 patches of 14 cover 378 of them.
    folder = layouts_test.prepare(tmp_path, "siglip")[2]
    exact = import_model(folder)
    change(folder, "config.json", "vision_config.image_size", 27)
    larger = import_model(folder)
    assert (larger.config.vision.image_size, larger.config.vision.grid) == (27, 3)
    images = np.random.default_rng(0).normal(size=(2, 27, 27, 3)).astype(np.float32)
    one, other = (
        tiny.apply(XClip(model.config), model.params, x, method=encode_image)
        for model, x in ((exact, images[:, :24, :24]), (larger, images))
    )
    np.testing.assert_array_equal(one, other)
