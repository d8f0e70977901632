"""Tests of training that starts from the encoders of other families."""

import json
import shutil
from dataclasses import replace

import families
import jax
import layouts_test
import numpy as np
import pieces_test
import pytest
import tiny
import transformers
from tokenizers import processors

import xclip_jax
from xclip_jax import compile_only, prepare, train
from xclip_jax.cli import InputError
from xclip_jax.config import get_config
from xclip_jax.convert.exporting import export
from xclip_jax.convert.importing import convert, import_model
from xclip_jax.convert.reading import Options
from xclip_jax.data.builder import DatasetSettings
from xclip_jax.data.pieces import PieceTokenizer
from xclip_jax.data.text import learn_tokenizer
from xclip_jax.initialization import adopt_encoders
from xclip_jax.main import main

CAPTIONS = ["red and then green", "first blue, then grey"]


def write_siglip(folder):
    """Writes a small SigLIP with a tokenizer, for texts of 24 tokens."""
    family = layouts_test.SIGLIP
    family = family._replace(text=replace(family.text, vocab=273, context=24))
    checkpoint = layouts_test.write_hugging_face(folder / "hf", family, families.draw(family))
    made = pieces_test.backend()  # released files end texts by a template, too
    end = {"single": "$A <eos>", "special_tokens": [("<eos>", 1)]}
    made.post_processor = processors.TemplateProcessing(**end)
    pieces_test.write(folder / "pieces", made, tokenizer_class="GemmaTokenizer")
    for file in (folder / "pieces").iterdir():
        shutil.copy(file, checkpoint)
    return checkpoint, None


def write_case(folder, case):
    """Writes a small model of layouts_test whose ids are those of CLIP's tokenizer."""
    tokenizer = learn_tokenizer(CAPTIONS * 9)
    tokenizer.save(folder / "vocab")
    family, write = layouts_test.CASES[case]
    vocab = tokenizer.vocab_size
    end = vocab - 1 if family.text.pool == "end" else 0
    family = family._replace(text=replace(family.text, vocab=vocab, end=end))
    return write(folder / "model", family, families.draw(family)), folder / "vocab"


OTHER_LAYOUTS = {"siglip of timm", "siglip so400m of timm", "pe of timm", "pe g of timm"}
OTHER_LAYOUTS |= {"clip in bfloat16 and shards"}
FAMILIES = sorted(layouts_test.CASES.keys() - OTHER_LAYOUTS)


@pytest.fixture(scope="module", params=["siglip", "pe"])
def encoders(request, tmp_path_factory):
    """Returns (model directory with head mean_pooling, data set in its format)."""
    folder = tmp_path_factory.mktemp("encoders")
    case = request.param
    checkpoint, vocab = write_siglip(folder) if case == "siglip" else write_case(folder, case)
    convert(checkpoint, folder / "converted", Options(vocab=vocab))
    p = json.loads((folder / "converted/model.json").read_text())["preprocess"]
    names = ("image_size", "resize", "interpolation")
    settings = DatasetSettings(**{name: p[name] for name in names})
    return folder / "converted", tiny.make_dataset(folder / "data", ("train",), settings=settings)


def adopt(encoders, **fields):
    """Returns (config that starts from encoders, content of their model.json)."""
    c = get_config()
    c.init.clip, c.data.path = map(str, encoders)
    described = json.loads((encoders[0] / "model.json").read_text())
    c.model.max_frames = 4
    c.model.temporal.type = "none"
    c.train.update(batch_size=8, epochs=0)
    c.optimizer.update(lr=3e-3, encoder_lr=3e-3, weight_decay=0.0)
    c.eval.batch_size = 8
    c.log.update(every=1, tensorboard=False)
    c.report.attention_pairs = 0
    c.update_from_flattened_dict(fields)
    adopt_encoders(c, fields)
    return c, described


def test_fields_at_their_defaults_become_those_of_the_encoders(encoders):
    c, described = adopt(encoders)
    for section in ("vision", "text"):
        for name, value in described[section].items():
            assert c.model[section][name] == value, name
    for name in ("mean", "std"):
        assert list(c.model.preprocess[name]) == described["preprocess"][name]
    assert c.model.preprocess.resize == "squash"
    assert (c.model.embed_dim, c.model.head) == (described["embed_dim"], "xclip")
    assert c.model.max_words == {"last": 24, "argmax": 9}[described["text"]["pool"]]


def test_texts_are_cut_to_fewer_words_unless_the_encoders_pad_all(encoders):
    """SigLIP's sentence is the last position: texts of another length have another vector."""
    pool = json.loads((encoders[0] / "model.json").read_text())["text"]["pool"]
    if pool == "last":
        with pytest.raises(InputError, match=r"max_words = 5: must be .* = 24"):
            adopt(encoders, **{"model.max_words": 5})
    else:
        assert adopt(encoders, **{"model.max_words": 5})[0].model.max_words == 5


def test_field_that_the_command_sets_to_its_default_is_kept(encoders, monkeypatch):
    seen, side = [], get_config().model.vision.image_size
    monkeypatch.setattr(compile_only, "compile_only", lambda config, _: seen.append(config.model))
    arguments = ["--config=configs/captions.py:own", f"--config.init.clip={encoders[0]}"]
    main([*arguments, f"--config.model.vision.image_size={side}", "--compile_only"])
    main([*arguments, "--compile_only"])
    kept, adopted = seen
    assert kept.vision.image_size == side != adopted.vision.image_size
    kept.vision.image_size = adopted.vision.image_size
    assert kept == adopted


@pytest.mark.parametrize(
    "field", [("text", "layers", 5), ("text", "heads", 7), ("vision", "pool", "class_token")]
)
def test_field_with_another_value_is_an_error_that_names_both(encoders, field):
    section, name, value = field
    described = json.loads((encoders[0] / "model.json").read_text())[section][name]
    message = rf"model.{section}.{name} = {value!r}: must be {described!r}"
    with pytest.raises(InputError, match=message):
        adopt(encoders, **{f"model.{section}.{name}": value})


def test_encoders_that_are_not_converted_or_a_half_are_named(encoders, tmp_path):
    source = layouts_test.prepare(tmp_path, "clip, largest id")[2]
    c, _ = adopt(encoders)
    c.init.clip = str(source)
    with pytest.raises(InputError, match=r"no model there; it is not converted: run .*convert"):
        train.train(c, tmp_path / "run")
    family = layouts_test.CLIP
    half = layouts_test.write_hugging_face(
        tmp_path / "half", family, families.draw(family), half="text"
    )
    convert(half, tmp_path / "text_only")
    with pytest.raises(InputError, match=r"init.clip = .*text_only: it has a text tower only"):
        adopt((tmp_path / "text_only", encoders[1]))
    paths = [f"--{name}={tmp_path}" for name in ("videos", "annotations", "output")]
    with pytest.raises(SystemExit, match=r"text_only has a text tower only, which takes no frames"):
        prepare.main(["--dataset=captions", *paths, f"--model={tmp_path / 'text_only'}"])


@pytest.mark.parametrize("encoders", FAMILIES, indirect=True)
def test_training_starts_at_the_converted_similarity_and_improves(encoders, tmp_path):
    c, _ = adopt(encoders)
    train.train(c, tmp_path / "start")
    started = xclip_jax.load(tmp_path / "start")
    folder, _ = encoders
    original = xclip_jax.load(folder)
    jax.tree.map(np.testing.assert_array_equal, started.params["clip"], original.params["clip"])
    frames = [np.full((2, 30, 40, 3), shade, np.uint8) for shade in (10, 90, 200)]
    frames = [np.concatenate([a, a[:, ::-1] // 2]) for a in frames]
    # With the head of the converted model, the similarity is that of its mean frame.
    pooled = [retriever.encode_video(frames).video for retriever in (started, original)]
    np.testing.assert_allclose(*pooled, atol=1e-6)
    c, _ = adopt(
        encoders, **{"train.epochs": 30, "optimizer.lr": 1e-3, "optimizer.encoder_lr": 1e-3}
    )
    train.train(c, tmp_path / "run")
    losses = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    losses = [line["train/loss"] for line in losses if "train/loss" in line]
    assert np.mean(losses[-5:]) < 0.8 * losses[0]  # 2 log 8, that of chance


def test_temporal_positions_are_interpolated_to_more_frames(encoders, tmp_path, capsys):
    fields = {"model.temporal.type": "transformer", "model.max_frames": 40}
    fields |= {"model.temporal.heads": 1, "model.temporal.layers": 1}
    c, described = adopt(encoders, **fields)
    train.train(c, tmp_path / "run")
    params = xclip_jax.load(tmp_path / "run").params["temporal_encoder"]
    assert len(params["positions"]) == 40
    text = described["text"]
    same = text["width"] == described["embed_dim"] and not text["mlp_width"]
    expected = f"interpolated from {text['context_length']} to 40" if same else "random: CLIP's"
    assert expected in capsys.readouterr().out


def test_exported_tokenizer_has_the_same_ids_in_transformers(encoders, tmp_path):
    folder, _ = encoders
    tokenizer = xclip_jax.load(folder).tokenizer
    if not isinstance(tokenizer, PieceTokenizer):
        pytest.skip("transformers has no PE-Core")
    export(folder, tmp_path / "out")
    exported = transformers.AutoTokenizer.from_pretrained(tmp_path / "out/siglip")
    texts, options = ["A Dog", "red dog"], {"padding": "max_length", "truncation": True}
    ids = exported(texts, max_length=tokenizer.max_words, **options)["input_ids"]
    np.testing.assert_array_equal(ids, tokenizer(texts)[0])


def test_sigmoid_bias_is_exported_as_0_after_training_without_one(encoders, tmp_path):
    c, described = adopt(encoders)
    if described["text"]["pool"] != "last":
        pytest.skip("transformers has no PE-Core")
    train.train(c, tmp_path / "run")
    export(tmp_path / "run", tmp_path / "out")
    again = import_model(tmp_path / "out/siglip")
    assert float(again.params["logit_bias"]) == 0
    trained = xclip_jax.load(tmp_path / "run").params["clip"]
    jax.tree.map(np.testing.assert_array_equal, again.params["clip"], trained)


def test_words_of_aosm_are_neither_the_end_token_nor_padding(encoders):
    folder, _ = encoders
    retriever = xclip_jax.load(folder)
    if not isinstance(retriever.tokenizer, PieceTokenizer):
        pytest.skip("texts of PE-Core are CLIP's")
    ids, mask = retriever.tokenizer(["a dog", "dog", "a red dog"])
    a, dog, space_dog, space_red = (
        getattr(pieces_test, name) for name in ("A", "DOG", "SPACE_DOG", "SPACE_RED")
    )
    expected = [[a, space_dog, 1, 0], [dog, 1, 0, 0], [a, space_red, space_dog, 1]]
    np.testing.assert_array_equal(ids[:, :4], expected)
    words = np.asarray(retriever.model.aosm_words(mask))
    np.testing.assert_array_equal(words[:, :4], [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0]])
    assert not words[:, 4:].any()
