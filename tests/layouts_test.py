"""Tests of converting encoder families from their published layouts, against plain NumPy.

families.py draws the checkpoints and computes what they should give. Small models of the original
code are in families_test, which needs files.
"""

import json
from dataclasses import replace
from pathlib import Path

import families
import ml_dtypes
import numpy as np
import pytest
import tiny
from families import Family, Image, Text, publish
from safetensors.numpy import save_file

from xclip_jax.cli import InputError
from xclip_jax.convert.architecture import infer
from xclip_jax.convert.exporting import export
from xclip_jax.convert.importing import convert, import_model
from xclip_jax.convert.mapping import to_tensors
from xclip_jax.convert.reading import Options, classify
from xclip_jax.convert.torch_archive import Archive, write_archive
from xclip_jax.models import XClip

MAP = {"class_token": False, "patch_bias": True, "pre_norm": False, "projection": "none"}
TANH = {"activation": "gelu_tanh", "epsilon": 1e-6}
SIGLIP_IMAGE = Image(**MAP, **TANH, pool_heads=3, pool_mlp=56)
SIGLIP_TEXT = Text(**TANH, mlp=52, causal=False, pool="last", bias=True)
SIGLIP = Family(SIGLIP_IMAGE, SIGLIP_TEXT, dim=24, logit_bias=True)
SIGLIP_GELU = SIGLIP._replace(image=replace(SIGLIP_IMAGE, activation="gelu"))
PE_SIZES = {"width": 128, "heads": 2, "layers": 1, "mlp": 152, "pool_heads": 8, "pool_mlp": 512}
PE_IMAGE = Image(**PE_SIZES, rotary="columns_first")
PE_TEXT = Text(width=64, heads=1)
PE = Family(PE_IMAGE, PE_TEXT)
PE_TIMM = PE._replace(image=replace(PE_IMAGE, projection="bias", rotary_grid=5))
GIGANTIC = {"class_token": False, "width": 192, "heads": 2, "pool_mlp": 768}
PE_G = PE._replace(image=replace(PE_IMAGE, **GIGANTIC))
PE_G_TIMM = PE._replace(image=replace(PE_TIMM.image, **GIGANTIC))
EVA02_IMAGE = Image(
    **{"activation": "silu", "epsilon": 1e-6, "gated": True, "patch_bias": True},
    **{"pre_norm": False, "projection": "bias", "rotary": "rows_first", "rotary_grid": 16},
)
MOBILE_CLIP = Family(Image(projection="bias"), Text(causal=False))
QUICK = {"activation": "quick_gelu"}
LONG_CLIP = Family(
    Image(width=64, heads=1, **QUICK), Text(width=64, heads=1, context=24, mlp=256, **QUICK)
)
CLIP = Family(Image(**QUICK), Text(**QUICK))
CLIP_END = CLIP._replace(text=replace(CLIP.text, pool="end", end=50))
SIGLIP_SETTINGS = {"no_causal_mask": True, "proj_bias": True, "pool_type": "last"}
SIGLIP_SETTINGS |= {"norm_kwargs": {"eps": 1e-6}, "act_kwargs": {"approximate": "tanh"}}
SIGLIP_SETTINGS |= {"hf_tokenizer_name": "timm/ViT-B-16-SigLIP2"}


def describe(tower):
    """Returns what config.json of Hugging Face says of a tower."""
    described = {
        **{"hidden_size": tower.width, "intermediate_size": tower.mlp},
        **{"num_hidden_layers": tower.layers, "num_attention_heads": tower.heads},
        "hidden_act": tower.activation.replace("gelu_tanh", "gelu_pytorch_tanh"),
        "layer_norm_eps": tower.epsilon,
    }
    if isinstance(tower, Image):
        return described | {"image_size": tower.side, "patch_size": tower.patch}
    return described | {"eos_token_id": tower.end or 2, "vocab_size": tower.vocab}


def save(tensors, path):
    save_file({name: np.array(x, order="C") for name, x in tensors.items()}, path)


def write_hugging_face(folder, family, tensors, half=None, shards=1, **config):
    """Writes a CLIPModel or SiglipModel, or a half of it, returns `folder`."""
    kind = "siglip" if family.image.pool_heads else "clip"
    image, text = describe(family.image), describe(family.text)
    described = {"vision": image, "text": text}.get(half)
    described = described or {"vision_config": image, "text_config": text}
    kind_of_half = f"{kind}_{half}_model" if half else kind
    folder.mkdir()
    content = {"model_type": kind_of_half} | described | config
    (folder / "config.json").write_text(json.dumps(content))
    tensors = publish(tensors, "siglip" if kind == "siglip" else "hugging_face")
    prefixes = {"vision": ("vision_model.", "visual_p"), "text": ("text_",)}.get(half, "")
    tensors = {name: x for name, x in tensors.items() if name.startswith(prefixes)}
    names, index = sorted(tensors), {}
    for shard in range(shards):
        part = {name: tensors[name] for name in names[shard::shards]}
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        save(part, folder / ("model.safetensors" if shards == 1 else file))
        index |= dict.fromkeys(part, file)
    if shards > 1:
        content = json.dumps({"weight_map": index})
        (folder / "model.safetensors.index.json").write_text(content)
    return folder


def write_timm(folder, family, tensors, name, *, vision=(), text=(), model=()):
    """Writes an open_clip model whose image tower is timm's `name`, returns `folder`."""
    v, t = family.image, family.text
    sizes = {"img_size": v.side, "patch_size": v.patch, "embed_dim": v.width, "depth": v.layers}
    sizes |= {"num_heads": v.heads, "mlp_ratio": v.mlp / v.width}
    if v.rotary_grid:
        sizes["ref_feat_shape"] = [v.rotary_grid, v.rotary_grid]
    image = {"timm_model_name": name, "timm_model_kwargs": sizes, "image_size": v.side}
    image |= {"timm_pool": "map" if v.pool_heads else "token", "timm_proj": None}
    words = {"width": t.width, "heads": t.heads, "layers": t.layers, "vocab_size": t.vocab}
    sections = {"vision_cfg": image | dict(vision), "text_cfg": words | dict(text)}
    described = {"embed_dim": family.dim} | sections | dict(model)
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": described}))
    layout = "eva" if v.gated else "timm"
    save(publish(tensors, layout), folder / "open_clip_model.safetensors")
    return folder


def write_pt(folder, tensors, name, layout="openai"):
    """Writes a folder with a flat state dict of PyTorch, returns the file."""
    folder.mkdir()
    write_archive(folder / name, publish(tensors, layout))
    return folder / name


CASES = {
    "siglip": (SIGLIP, write_hugging_face),
    "siglip of timm": (
        SIGLIP_GELU,
        lambda *a: write_timm(*a, "vit_base_patch16_siglip_224", text=SIGLIP_SETTINGS),
    ),
    "siglip so400m of timm": (
        SIGLIP,
        lambda *a: write_timm(*a, "vit_so400m_patch16_siglip_256.v2_webli", text=SIGLIP_SETTINGS),
    ),
    "pe": (PE, lambda folder, _, t: write_pt(folder, t, "PE-Core-T8-24.pt").parent),
    "pe g": (PE_G, lambda folder, _, t: write_pt(folder, t, "PE-Core-T8-24.pt")),
    "pe of timm": (PE_TIMM, lambda *a: write_timm(*a, "vit_pe_core_base_patch16_224")),
    "pe g of timm": (PE_G_TIMM, lambda *a: write_timm(*a, "vit_pe_core_gigantic_patch14_448")),
    "eva-02": (Family(EVA02_IMAGE), lambda *a: write_timm(*a, "eva02_base_patch16_clip_224")),
    "mobileclip 2": (
        MOBILE_CLIP,
        lambda *a: write_timm(*a, "vit_large_patch14_clip_224", text={"no_causal_mask": True}),
    ),
    "long-clip": (LONG_CLIP, lambda folder, _, t: write_pt(folder, t, "longclip.pt", "long_clip")),
    "clip, largest id": (CLIP, write_hugging_face),
    "clip, first end token": (CLIP_END, write_hugging_face),
    "clip in bfloat16 and shards": (CLIP, lambda *a: write_hugging_face(*a, shards=3)),
}


def prepare(folder, case):
    """Returns (family, tensors, written checkpoint) of one of CASES."""
    family, write = CASES[case]
    tensors = families.draw(family)
    if "bfloat16" in case:
        halves = {name: x.astype(ml_dtypes.bfloat16) for name, x in tensors.items()}
        tensors = {name: x.astype(np.float32) for name, x in halves.items()}
        return family, tensors, write(folder / "model", family, halves)
    return family, tensors, write(folder / "model", family, tensors)


def draw_inputs(family, rows=None, columns=None):
    """Returns (ids, images): end tokens are followed by larger ids, and are missing in one text."""
    rng, v, t = np.random.default_rng(1), family.image, family.text
    ids = rng.permuted(np.tile(np.arange(2, t.vocab), (4, 1)), axis=1)[:, : t.context]
    ids[ids == t.end] = 2
    ids[:3, 2] = ids[1, 5] = t.end
    images = rng.normal(size=(3, (rows or 3) * v.patch, (columns or 3) * v.patch, 3))
    return ids.astype(np.int32), images.astype(np.float32)


def compute(model, ids, images):
    """Returns what the family computes: vectors of images, of all words, and the logits."""
    mask = np.ones((len(images), 1), bool)
    text = model.encode_text(ids, np.ones(ids.shape, bool))
    video = model.encode_video(images[:, None], mask)
    frames = model.encode_frames(images[:, None], mask)[1][:, 0]
    return frames, model.clip.textual(ids), model.similarity(text, video)


HALVES = {"vision": lambda m, x: m.clip.visual(x), "text": lambda m, x: m.clip.textual(x)}


def assert_close(actual, expected, name):
    worst = np.abs(np.asarray(actual, np.float64) - expected).max() / np.abs(expected).max()
    assert worst <= 1e-5, f"{name}: {worst:.1e}"


@pytest.mark.parametrize("case", CASES)
def test_published_layouts_match_plain_numpy(tmp_path, case):
    family, tensors, source = prepare(tmp_path, case)
    imported = import_model(source)
    ids, images = draw_inputs(family)
    found = tiny.apply(XClip(imported.config), imported.params, ids, images, method=compute)
    vectors = families.encode_images(family, tensors, images)
    words, sentences = families.encode_texts(family, tensors, ids)
    expected = vectors, words, families.compute_logits(tensors, sentences, vectors)
    for name, actual, wanted in zip(("images", "words", "logits"), found, expected, strict=True):
        assert_close(actual, wanted, name)


@pytest.mark.parametrize("half", ["vision", "text"])
@pytest.mark.parametrize("family", [CLIP_END, SIGLIP], ids=["clip", "siglip"])
def test_halves_match_plain_numpy(tmp_path, family, half):
    tensors = families.draw(family)
    imported = import_model(write_hugging_face(tmp_path / "half", family, tensors, half=half))
    assert imported.config.towers == half
    ids, images = draw_inputs(family)
    if half == "vision":
        inputs, expected = images, families.encode_images(family, tensors, images)
    else:
        inputs, expected = ids, families.encode_texts(family, tensors, ids)[0]
    found = tiny.apply(XClip(imported.config), imported.params, inputs, method=HALVES[half])
    assert_close(found, expected, half)


@pytest.mark.parametrize(
    ("case", "rows", "columns"), [("pe", 4, 5), ("pe g", 5, 5), ("pe g", 2, 4)]
)
def test_images_of_other_sizes_match_plain_numpy(tmp_path, case, rows, columns):
    family, tensors, source = prepare(tmp_path, case)
    imported = import_model(source)
    _, images = draw_inputs(family, rows, columns)
    found = tiny.apply(XClip(imported.config), imported.params, images, method=HALVES["vision"])
    assert_close(found, families.encode_images(family, tensors, images), "images")


@pytest.mark.parametrize(("case", "text", "place"), [("siglip", [5, 1], 0), ("pe", [58, 5, 59], 1)])
def test_xclip_head_scores_one_word_and_one_frame(tmp_path, case, text, place):
    """Compares with cosines by hand: attention to one word or one frame is that vector."""
    family, tensors, source = prepare(tmp_path, case)
    imported = import_model(source, Options(head="xclip"))
    ids = np.zeros((2, family.text.context), np.int32)
    ids[0, : len(text)] = text
    ids[1, : len(text) - 1] = text[:place] + text[place + 1 :]  # no word at all
    mask = np.arange(ids.shape[1]) < [[len(text)], [len(text) - 1]]
    images = draw_inputs(family)[1][:2, None]

    def score(model, ids, mask, frames):
        text = model.encode_text(ids, mask)
        video = model.encode_video(frames, np.ones((2, 1), bool))
        granular = model.granular_similarity(text, video)
        return model.aosm_words(mask), granular, model.similarity(text, video)

    model = XClip(imported.config)
    words, granular, mean = tiny.apply(model, imported.params, ids, mask, images, method=score)
    assert np.argwhere(words).tolist() == [[0, place]]
    assert len(granular) == 4
    assert all(np.isfinite(x).all() for x in granular.values())
    np.testing.assert_allclose(np.mean(list(granular.values()), 0), mean, rtol=1e-5)
    vectors = families.encode_images(family, tensors, images[:, 0])
    tokens, sentences = families.encode_texts(family, tensors, ids)
    for_sentence = families.compute_logits(tensors, sentences, vectors)
    for_word = families.compute_logits(tensors, tokens[:1, place], vectors)
    for name in ("video_sentence", "frame_sentence"):
        assert_close(granular[name], for_sentence, name)
    for name in ("video_word", "frame_word"):
        assert_close(granular[name][:1], for_word, name)


@pytest.mark.parametrize("case", ["clip, largest id", "clip, first end token", "siglip"])
def test_exported_encoders_are_imported_unchanged(tmp_path, case):
    source = prepare(tmp_path, case)[-1]
    convert(source, tmp_path / "converted")
    export(tmp_path / "converted", tmp_path / "out")
    kind = "siglip" if case == "siglip" else "clip"
    one, other = import_model(source), import_model(tmp_path / "out" / kind)
    assert one.config == other.config
    found, expected = (to_tensors(x.params) for x in (other, one))
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)


@pytest.mark.parametrize("case", ["clip, first end token", "siglip"])
def test_exported_encoders_match_transformers(tmp_path, case):
    torch = pytest.importorskip("torch")
    import transformers

    family, tensors, source = prepare(tmp_path, case)
    convert(source, tmp_path / "converted")
    export(tmp_path / "converted", tmp_path / "out")
    kind = "Siglip" if case == "siglip" else "CLIP"
    encoder = getattr(transformers, f"{kind}Model")
    model = encoder.from_pretrained(tmp_path / "out" / kind.lower()).eval()
    ids, images = draw_inputs(family)
    inputs = {"input_ids": ids.astype(np.int64), "pixel_values": images.transpose(0, 3, 1, 2)}
    with torch.no_grad():
        found = model(**{name: torch.tensor(x) for name, x in inputs.items()}).logits_per_text
    vectors = families.encode_images(family, tensors, images)
    sentences = families.encode_texts(family, tensors, ids)[1]
    assert_close(found.numpy(), families.compute_logits(tensors, sentences, vectors), "logits")


def test_heads_of_the_largest_pe_are_known():
    """Takes the sizes of PE-Core-G14-448, with a layer each, and no memory for its numbers."""
    image = replace(PE_G.image, width=1536, heads=16, mlp=8960, pool_mlp=6144)
    largest = Family(image, Text(width=1280, heads=20, layers=1, context=72), dim=1280)
    shapes = families.family_shapes(largest)
    tensors = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
    config = infer(classify(Archive(tensors), Path("PE-Core-G14-448.pt"), Options()))
    assert (config.vision.heads, config.vision.pool_heads, config.text.heads) == (16, 8, 20)


TOWER = "vit_large_patch14_clip_224"


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("convnext_base", {}, "timm_model_name is 'convnext_base'"),
        ("vit_base_patch16_siglip_gap_224", {}, "timm_model_name is 'vit_base_patch16_siglip_gap"),
        ("naflexvit_base_patch16_siglip", {}, "timm_model_name is 'naflexvit_base_patch16_siglip"),
        (TOWER, {"vision": {"timm_pool": "avg"}}, "timm_pool is 'avg', supported is map or token"),
        (TOWER, {"vision": {"timm_proj": "mlp"}}, "timm_proj is 'mlp', supported is none"),
        (
            TOWER,
            {"vision": {"timm_model_kwargs": {"global_pool": "avg"}}},
            "timm_model_kwargs.global_pool is 'avg'",
        ),
        (TOWER, {"text": {"hf_model_name": "roberta-base"}}, "hf_model_name is 'roberta-base'"),
        (TOWER, {"model": {"multimodal_cfg": {"layers": 2}}}, "multimodal_cfg.* supported"),
        (None, {"vision": {"layers": [3, 4, 6, 3]}}, r"layers is \[3, 4, 6, 3\], supported is one"),
    ],
)
def test_unsupported_encoders_are_refused(tmp_path, name, changes, message):
    tensors = families.draw(MOBILE_CLIP)
    source = write_timm(tmp_path / "model", MOBILE_CLIP, tensors, name, **changes)
    with pytest.raises(InputError, match=message) as error:
        import_model(source)
    assert "\n" not in str(error.value)


def test_naflex_is_refused(tmp_path):
    tensors = families.draw(SIGLIP)
    source = write_hugging_face(tmp_path / "a", SIGLIP, tensors, model_type="siglip2")
    with pytest.raises(InputError, match=r"images of any shape \(NaFlex\), which is not supported"):
        import_model(source)


def test_long_clip_takes_20_rows_of_the_first_table(tmp_path):
    _, tensors, source = prepare(tmp_path, "long-clip")
    positions = import_model(source).params["clip"]["textual"]["positions"]
    np.testing.assert_array_equal(positions, tensors["positional_embedding"])
