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
from xclip_jax import train
from xclip_jax.cli import InputError
from xclip_jax.config import get_config
from xclip_jax.convert.exporting import export
from xclip_jax.convert.importing import convert
from xclip_jax.convert.reading import Options
from xclip_jax.data.builder import DatasetSettings
from xclip_jax.data.text import PieceTokenizer, learn_tokenizer
from xclip_jax.initialization import adopt_encoders

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


def write_pe(folder):
    """Writes a small PE-Core, for texts of 9 tokens."""
    tokenizer = learn_tokenizer(CAPTIONS * 9)
    tokenizer.save(folder / "vocab")
    family = layouts_test.PE._replace(
        text=replace(layouts_test.PE.text, vocab=tokenizer.vocab_size)
    )
    tensors = families.draw(family)
    return layouts_test.write_pt(folder / "pt", tensors, "PE-Core-T8-24.pt"), folder / "vocab"


@pytest.fixture(scope="module", params=[write_siglip, write_pe], ids=["siglip", "pe"])
def encoders(request, tmp_path_factory):
    """Returns (model directory with head mean_pooling, data set in its format)."""
    folder = tmp_path_factory.mktemp("encoders")
    checkpoint, vocab = request.param(folder)
    convert(checkpoint, folder / "model", Options(vocab=vocab))
    p = json.loads((folder / "model/model.json").read_text())["preprocess"]
    names = ("image_size", "resize", "interpolation")
    settings = DatasetSettings(**{name: p[name] for name in names})
    return folder / "model", tiny.make_dataset(folder / "data", ("train",), settings=settings)


def adopt(encoders, **fields):
    """Returns (config that starts from encoders, content of their model.json)."""
    c = get_config()
    c.init.clip, c.data.path = map(str, encoders)
    described = json.loads((encoders[0] / "model.json").read_text())
    c.model.update(max_words=min(32, described["text"]["context_length"]), max_frames=4)
    c.model.temporal.type = "none"
    c.train.update(batch_size=8, epochs=0)
    c.optimizer.update(lr=3e-3, encoder_lr=3e-3, weight_decay=0.0)
    c.eval.batch_size = 8
    c.log.update(every=1, tensorboard=False)
    c.report.attention_pairs = 0
    c.update_from_flattened_dict(fields)
    adopt_encoders(c)
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


def test_field_with_another_value_is_an_error_that_names_both(encoders, tmp_path):
    c, described = adopt(encoders, **{"model.text.layers": 5})
    layers = described["text"]["layers"]
    with pytest.raises(InputError, match=rf"text.layers = 5: must be {layers}"):
        train.train(c, tmp_path / "run")


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
