"""Tests of what checkpoints do not store: activation, heads, image normalisation, prefixes."""

import json
import operator

import checkpoints
import numpy as np
import pytest
from checkpoints import QUICK, TINY, write_hugging_face
from safetensors.numpy import save_file

import xclip_jax
from xclip_jax.cli import InputError
from xclip_jax.convert.importing import convert, import_model
from xclip_jax.convert.reading import Options
from xclip_jax.convert.torch_archive import write_archive
from xclip_jax.models.config import PreprocessConfig

HALF = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}


def write(path, tensors):
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        write_archive(path, tensors)
    return path


def write_open_clip(folder, tensors=None, name="open_clip_pytorch_model.bin", **config):
    """Writes the weights and the open_clip_config.json of a plain CLIP, returns the weights."""
    vision = {"layers": 2, "width": 64, "patch_size": 8, "image_size": 16, "head_width": 16}
    model = {"embed_dim": 64, "vision_cfg": vision, "text_cfg": {"width": 64, "heads": 2}}
    described = {"model_cfg": model | config.pop("model", {})} | config
    (folder / "open_clip_config.json").write_text(json.dumps(described))
    return write(folder / name, checkpoints.clip() if tensors is None else tensors)


@pytest.mark.parametrize("name", ["open_clip_pytorch_model.bin", "open_clip_model.safetensors"])
@pytest.mark.parametrize("quick", [False, True])
def test_open_clip_config_beside_the_weights_is_read(tmp_path, name, quick):
    stated = {"mean": [0.5, 0.25, 0.5], "std": [0.25, 0.5, 0.25], "interpolation": "bicubic"}
    path = write_open_clip(tmp_path, name=name, model={"quick_gelu": quick}, preprocess_cfg=stated)
    for source in (path, tmp_path):
        with pytest.raises(
            InputError, match=r"^--image_mean, --image_std: the model takes mean .*: omit"
        ):
            import_model(source, Options(preprocess=PreprocessConfig()))
        c = import_model(source).config
        assert c.activation == ("quick_gelu" if quick else "gelu")
        assert (c.vision.heads, c.text.heads) == (4, 2)
        assert c.preprocess == PreprocessConfig((0.5, 0.25, 0.5), (0.25, 0.5, 0.25))


@pytest.mark.parametrize("name", ["a.bin", "a.safetensors"])
def test_plain_weights_require_their_activation(tmp_path, name):
    path = write(tmp_path / name, checkpoints.clip())
    with pytest.raises(InputError, match=r"do not state their activation: set --activation=quick"):
        import_model(path)
    for activation in ("gelu", "quick_gelu"):
        assert import_model(path, Options(activation=activation)).config.activation == activation


def test_state_dict_with_the_sizes_of_openai_is_quick_gelu(tmp_path):
    sizes = {"input_resolution": np.array(16), "context_length": np.array(16)}
    path = write(tmp_path / "a.pt", checkpoints.clip() | sizes)
    assert import_model(path).config.activation == "quick_gelu"


def test_heads_of_wide_towers_must_be_stated(tmp_path):
    wide = TINY | {"width": 1280, "layers": 1, "text_width": 64}
    path = write(tmp_path / "a.bin", checkpoints.clip(sizes=wide))
    with pytest.raises(InputError, match=r"vision tower has width 1280: set --vision_heads"):
        import_model(path, QUICK)
    options = Options(activation="gelu", vision_heads=16)
    assert import_model(path, options).config.vision.heads == 16
    (tmp_path / "b").mkdir()
    vision = {"width": 1280, "head_width": 80}
    path = write_open_clip(
        tmp_path / "b", checkpoints.clip(sizes=wide), model={"vision_cfg": vision}
    )
    assert import_model(path).config.vision.heads == 16


def test_width_that_contradicts_the_weights_is_an_error(tmp_path):
    vision = {"width": 2 * TINY["width"], "head_width": 16}
    path = write_open_clip(tmp_path, model={"vision_cfg": vision})
    message = rf"open_clip_config.json describes an image tower of width {vision['width']}, the wei"
    with pytest.raises(InputError, match=message):
        import_model(path)


def test_flag_that_contradicts_a_file_is_an_error(tmp_path):
    path = write_open_clip(tmp_path)
    assert import_model(path, Options(activation="gelu")).config.activation == "gelu"
    message = r"--activation=quick_gelu: open_clip_config.json has gelu: omit it"
    with pytest.raises(InputError, match=message):
        import_model(path, QUICK)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"preprocess_cfg": {"mean": [1, 2]}}, r"mean is \[1, 2\]: must be three numbers"),
        ({"preprocess_cfg": {"std": [0, 1, 1]}}, r"std is .*: must be three numbers above 0"),
        ({"preprocess_cfg": {"resize_mode": "longest"}}, r".*resize_mode is 'longest', supported"),
        ({"preprocess_cfg": {"interpolation": "nearest"}}, r".*interpolation is 'nearest', suppo"),
        ({"preprocess_cfg": 3}, r"preprocess_cfg must be an object"),
        ({"model": {"vision_cfg": {"width": "x"}}}, r"vision_cfg.width is 'x', must be a whole"),
        (
            {"model": {"vision_cfg": {"width": 64, "layers": [3, 4]}}},
            r"vision_cfg.layers is .3, 4.",
        ),
        ({"model": {"quick_gelu": "true"}}, r"quick_gelu is 'true', must be true or false"),
        ({"model": {"vision_cfg": {"width": 64, "head_width": 48}}}, r"vision_cfg.width 64 is not"),
        ({"model": {"text_cfg": {"embed_cls": True}}}, r"text_cfg.embed_cls is True, supported"),
        ({"model": {"text_cfg": {"pool_type": "eos"}}}, r"text_cfg.pool_type is .eos., s"),
        ({"model": {"text_cfg": {"proj_type": "mlp"}}}, r"text_cfg.proj_type is .mlp., s"),
        ({"model": {"text_cfg": {"norm_kwargs": {"eps": 0}}}}, r"text_cfg.norm_kwargs is .*eps"),
        ({"model": {"text_cfg": {"norm_kwargs": {"bias": 1}}}}, r"text_cfg.norm_kwargs is .*eps"),
        ({"model": {"text_cfg": {"act_kwargs": {"a": 1}}}}, r"text_cfg.act_kwargs is .'a': 1."),
        ({"model": {"vision_cfg": {"pool_type": "avg"}}}, r"vision_cfg.pool_type is .avg., s"),
        ({"model": {"vision_cfg": {"norm_kwargs": {"eps": 1e-6}}}}, r"vision_cfg.norm_kwargs is {"),
        ({"model": {"text_cfg": []}}, r"heads|embed"),
    ],
)
def test_malformed_open_clip_config_is_an_error(tmp_path, config, message):
    path = write_open_clip(tmp_path, **config)
    if config == {"model": {"text_cfg": []}}:  # nothing stated: open_clip's defaults
        assert import_model(path).config.text.heads == 8
        return
    with pytest.raises(InputError, match=rf"open_clip_config.json: {message}"):
        import_model(path)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"preprocess_cfg": {"resize_mode": "squash"}}, {"preprocess.resize": "squash"}),
        ({"preprocess_cfg": {"resize_mode": "shortest"}}, {"preprocess.resize": "crop"}),
        (
            {"preprocess_cfg": {"interpolation": "bilinear"}},
            {"preprocess.interpolation": "bilinear"},
        ),
        ({"model": {"text_cfg": {"no_causal_mask": True}}}, {"text.causal": False}),
        ({"model": {"text_cfg": {}}}, {"text.causal": True, "text.pool": "argmax"}),
        (
            {"model": {"text_cfg": {"pool_type": "last"}}},
            {"text.pool": "last", "max_words": 16, "text.causal": True},
        ),
        ({"model": {"text_cfg": {"norm_kwargs": {"eps": 1e-6}}}}, {"text.epsilon": 1e-6}),
        (
            {"model": {"text_cfg": {"act_kwargs": {"approximate": "tanh"}}}},
            {"activation": "gelu_tanh", "vision.activation": "gelu"},
        ),
    ],
)
def test_settings_of_open_clip_become_fields(tmp_path, config, expected):
    found = import_model(write_open_clip(tmp_path, **config)).config
    actual = {field: operator.attrgetter(field)(found) for field in expected}
    assert actual == expected


def test_preprocessor_config_changes_the_features(tmp_path):
    folders = {name: write_hugging_face(tmp_path / name, checkpoints.clip()) for name in "ab"}
    (folders["b"] / "preprocessor_config.json").write_text(json.dumps(HALF))
    frames = [np.full((1, 16, 16, 3), 200, np.uint8)]
    features = []
    for name, folder in folders.items():
        convert(folder, tmp_path / f"model_{name}")
        features.append(xclip_jax.load(tmp_path / f"model_{name}").encode_video(frames).video)
    assert not np.allclose(*features, atol=1e-3)
    stored = json.loads((tmp_path / "model_b" / "model.json").read_text())["preprocess"]
    common = {"resize": "crop", "interpolation": "bicubic", "spread": False, "image_size": 16}
    assert stored == {"mean": [0.5] * 3, "std": [0.25] * 3} | common
    normalised = (np.asarray(frames, np.float32) / 255 - 0.5) / 0.25
    retriever = xclip_jax.load(tmp_path / "model_b")
    np.testing.assert_allclose(
        retriever.encode_video(list(normalised)).video, features[1], atol=1e-5
    )


def test_model_that_does_not_normalise_takes_pixels_from_0_to_1(tmp_path):
    folder = write_hugging_face(tmp_path / "a", checkpoints.clip())
    (folder / "preprocessor_config.json").write_text(json.dumps({"do_normalize": False}))
    retriever = xclip_jax.load(folder)
    frames = np.random.default_rng(0).integers(0, 256, (1, 16, 16, 3), np.uint8)
    one, other = (retriever.encode_video([images]).video for images in (frames, frames / 255))
    np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"do_center_crop": False}, "do_center_crop is False, supported is true"),
        (
            {"size": {"height": 16, "width": 16}, "do_center_crop": True},
            "size is .*height.*, supported is the shortest edge",
        ),
        (
            {"size": {"height": 16, "width": 20}},
            "size is .*height.*, supported is a square or the shortest edge",
        ),
        ({"size": {"longest_edge": 16}}, "size is .*longest_edge.*, supported is the shortest"),
        ({"size": 224}, "size is 224, but config.json has image_size 16"),
        ({"size": {"height": 20, "width": 20}}, "size is 20, but config.json has image_size 16"),
        ({"size": 256, "crop_size": 224}, "crop_size is 224, supported is 256"),
        ({"do_flip_channel_order": True}, "do_flip_channel_order is True, supported is false"),
        ({"image_mean": [122, 116, 104]}, "mean is .122, 116, 104.: must be three numbers, 0 to 1"),
        ({"resample": 0}, "resample is 0, supported is 2, bilinear, or 3, bicubic"),
        ({"rescale_factor": 1}, "rescale_factor is 1, supported is 1/255"),
    ],
)
def test_other_preprocessing_is_refused(tmp_path, config, message):
    folder = write_hugging_face(tmp_path / "a", checkpoints.clip())
    (folder / "preprocessor_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=f"preprocessor_config.json: .*{message}"):
        import_model(folder)


@pytest.mark.parametrize(
    ("config", "resize", "interpolation"),
    [
        ({}, "crop", "bicubic"),
        ({"size": {"height": 16, "width": 16}}, "squash", "bicubic"),
        ({"size": {"height": 16, "width": 16}, "resample": 2}, "squash", "bilinear"),
        ({"size": 16, "resample": 2}, "crop", "bilinear"),
        ({"size": {"shortest_edge": 16}, "crop_size": 16, "resample": 3}, "crop", "bicubic"),
    ],
)
def test_resize_and_interpolation_are_read(tmp_path, config, resize, interpolation):
    folder = write_hugging_face(tmp_path / "a", checkpoints.clip())
    (folder / "preprocessor_config.json").write_text(json.dumps(config | HALF))
    expected = PreprocessConfig((0.5,) * 3, (0.25,) * 3, resize, interpolation)
    assert import_model(folder).config.preprocess == expected


def test_old_config_dicts_win_as_in_transformers(tmp_path):
    old = {"num_attention_heads": 2}  # transformers fills the rest up with its defaults
    folder = write_hugging_face(tmp_path / "hf", checkpoints.clip(), vision_config_dict=old)
    with pytest.raises(InputError, match=r"hidden_act is 'quick_gelu' \(vision\) and 'gelu'"):
        import_model(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"text_config_dict": old}))
    config = import_model(folder).config
    assert (config.activation, config.vision.heads, config.text.heads) == ("quick_gelu", 2, 2)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "model."])
@pytest.mark.parametrize("name", ["a.bin", "a.safetensors"])
def test_prefixes_of_wrapped_models_are_removed(tmp_path, prefix, name):
    tensors = checkpoints.clip()
    expected = import_model(write(tmp_path / "plain.bin", tensors), QUICK)
    wrapped = {prefix + name: array for name, array in tensors.items()}
    wrapped["n_averaged"] = np.array(3)
    actual = import_model(write(tmp_path / name, wrapped), QUICK)
    assert actual.config == expected.config
    for a, b in zip(*(x.params["clip"]["visual"].items() for x in (actual, expected)), strict=True):
        np.testing.assert_equal(a, b)


def test_release_checkpoint_with_the_tight_head_is_recognized(tmp_path):
    tensors = checkpoints.release("xclip") | checkpoints.release("tight_transformer", seed=1)
    tensors = {n: x for n, x in tensors.items() if not n.startswith("transformerClip")}
    imported = import_model(write(tmp_path / "a.bin", tensors))
    assert imported.config.head == "tight_transformer"
    assert "global_mat_weight" in imported.unread


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_weights_that_are_not_finite_are_refused(tmp_path, value):
    tensors, name = checkpoints.clip(), "visual.transformer.resblocks.0.mlp.c_fc.weight"
    tensors[name] = tensors[name].astype(np.float64)
    tensors[name][0, 0] = value
    path = write(tmp_path / "a.bin", tensors)
    with pytest.raises(InputError, match=r"c_fc.weight contains NaN or infinite numbers$"):
        convert(path, tmp_path / "model", QUICK)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("kind", [np.complex64, np.int8, np.bool_])
def test_weights_must_be_floating_point(tmp_path, kind):
    tensors, name = checkpoints.clip(), "visual.transformer.resblocks.0.mlp.c_fc.weight"
    tensors[name] = tensors[name].astype(kind)
    with pytest.raises(InputError, match=rf"c_fc.weight has type {np.dtype(kind)}, must be of fl"):
        import_model(write(tmp_path / "a.safetensors", tensors), QUICK)


def test_hugging_face_weights_are_described_by_the_file_beside_them(tmp_path):
    folder = write_hugging_face(tmp_path / "a", checkpoints.clip())
    one, other = import_model(folder), import_model(folder / "model.safetensors")
    assert one.config == other.config


def test_tight_head_leaves_a_position_for_the_sentence(tmp_path):
    path = write(tmp_path / "a.bin", checkpoints.release("tight_transformer"))
    with pytest.raises(InputError, match=r"--max_frames=16: must be from 1 to 15"):
        import_model(path, Options(max_frames=16))
    imported = import_model(path, Options(max_frames=15))
    assert imported.config.max_frames == 15


def test_error_about_many_tensors_is_short(tmp_path):
    names = {f"{'x' * 1000}{number}": np.zeros(1, np.float32) for number in range(2000)}
    path = write(tmp_path / "a.bin", checkpoints.clip() | names)
    with pytest.raises(InputError, match=r"and 1995 more$") as error:
        import_model(path, QUICK)
    assert len(str(error.value)) < 3000


def test_load_takes_what_convert_takes(tmp_path):
    folder = write_hugging_face(tmp_path / "hf", checkpoints.clip())
    convert(folder, tmp_path / "model")
    frames = [np.full((2, 20, 30, 3), 90, np.uint8)]
    expected = xclip_jax.load(tmp_path / "model").encode_video(frames)
    actual = xclip_jax.load(folder)
    np.testing.assert_array_equal(actual.encode_video(frames).video, expected.video)
    path = write(tmp_path / "a.bin", checkpoints.release("xclip"))
    assert xclip_jax.load(path).model.config.head == "xclip"
