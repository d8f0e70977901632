"""Tests of the export to Vespa: the written expressions, evaluated with NumPy, give the scores."""

import dataclasses
import json
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import tiny
from indexes import index, made, made_with_bank, model, no_processes, videos
from vespa_expressions import Profile, read_hex

from xclip_jax.checkpoint import save_model
from xclip_jax.cli import InputError
from xclip_jax.models import XClip
from xclip_jax.retriever import Retriever, load
from xclip_jax.search import Index
from xclip_jax.search.__main__ import main
from xclip_jax.search.vespa import _to_hex, check_model, export_application, make_query
from xclip_jax.train import configure_model

__all__ = ["index", "made", "made_with_bank", "model", "no_processes", "videos"]  # fixtures

SENTENCES = ["a red dog", "a blue cat and a red dog", "dog"]


def read_feed(folder):
    """Returns {id: fields} of the documents of a feed."""
    documents = map(json.loads, (folder / "feed.jsonl").read_text("utf-8").splitlines())
    return {document["put"].split("::")[1]: document["fields"] for document in documents}


def check_scores(index, folder):
    """Asserts that the last phase gives the score - bias of the index for a few sentences."""
    profile, feed = Profile(folder / "application"), read_feed(folder)
    assert len(feed) == len(index)
    for sentence in SENTENCES:
        query = make_query(index.retriever, sentence)
        hits = index.query(sentence, k=len(index), exhaustive=True, merge=False).hits
        assert len(hits) == len(index)
        for hit in hits:
            score = profile.evaluate("global", feed[hit.id], query)
            assert score == pytest.approx(hit.score - hit.bias, abs=1e-4)


def test_last_phase_is_the_score_of_the_index(made, tmp_path):
    index = Index.open(made)
    main(["export", f"--index={made}", f"--output={tmp_path / 'new'}", "--format=vespa"])
    check_scores(index, tmp_path / "new")


def test_last_phase_subtracts_the_hubness_bias(made_with_bank, tmp_path):
    index = Index.open(made_with_bank)
    export_application(index, tmp_path / "new")
    assert all(abs(fields["bias"]) > 1e-3 for fields in read_feed(tmp_path / "new").values())
    check_scores(index, tmp_path / "new")


def test_first_phases_are_those_of_the_funnel(index, tmp_path):
    export_application(index, tmp_path / "new")
    profile, feed = Profile(tmp_path / "new/application"), read_feed(tmp_path / "new")
    text = index.retriever.encode_text(SENTENCES[:1])
    query = make_query(index.retriever, SENTENCES[0])
    for table in index.tables():
        for row in table.to_pylist():
            fields, video_D = feed[row["id"]], np.array(row["video"])
            sentence = float(text.sentence[0] @ video_D)
            assert profile.evaluate("first", fields, query) == pytest.approx(sentence, abs=1e-5)
            words = text.words[0, 1 : text.mask[0].sum() - 1] @ video_D
            weights = np.exp(words / 0.01 - np.max(words / 0.01))
            both = (sentence + weights @ words / weights.sum()) / 2
            assert profile.evaluate("second", fields, query) == pytest.approx(both, abs=1e-5)


def test_learned_matrices_temperature_and_padding_are_exported(videos, tmp_path):
    path = tiny.make_model(tmp_path / "model", preset="official", tau_learned=True)
    retriever, rng = load(path), np.random.default_rng(0)
    params = retriever.params
    params["aggregation_matrices"] = {  # the identity would hide a wrong order
        name: np.asarray(matrix + rng.normal(0, 0.1, matrix.shape), np.float32)
        for name, matrix in params["aggregation_matrices"].items()
    }
    tokenizer, config = retriever.tokenizer, retriever.model.config
    save_model(path, config, params, tokenizer=tokenizer, extra={"step": 1})
    index = Index.create(tmp_path / "index", path, segment_seconds=3)
    index.add([videos / "clip0.mp4", videos / "clip1.mp4"])
    export_application(index, tmp_path / "new")
    check_scores(index, tmp_path / "new")
    assert len(Profile(tmp_path / "new/application").constants) == 6


def test_logit_bias_is_exported(model, made, tmp_path, monkeypatch):
    index, retriever = Index.open(made), load(model)
    config = dataclasses.replace(retriever.model.config, logit_bias=True)
    params = {**retriever.params, "logit_bias": np.float32(-9.5)}
    retriever = dataclasses.replace(retriever, model=XClip(config), params=params)
    monkeypatch.setattr(Index, "retriever", retriever)
    export_application(index, tmp_path / "new")
    profile, feed = Profile(tmp_path / "new/application"), read_feed(tmp_path / "new")
    query = make_query(retriever, SENTENCES[0])
    rows = {row["id"]: row for table in index.tables() for row in table.to_pylist()}
    snapshot = index._snapshot
    for segment_id in list(rows)[:3]:
        video = snapshot.features(snapshot.find(segment_id))
        expected = retriever.similarity(retriever.encode_text(SENTENCES[:1]), video)
        score = profile.evaluate("global", feed[segment_id], query)
        assert score == pytest.approx(float(expected[0, 0]), abs=1e-4)


def test_schema_declares_what_feed_and_query_hold(index, tmp_path):
    export_application(index, tmp_path / "new")
    profile, feed = Profile(tmp_path / "new/application"), read_feed(tmp_path / "new")
    query = make_query(index.retriever, SENTENCES[0], hits=3)
    assert query["hits"] == 3
    assert {f"input.query({name})" for name in profile.inputs} == {q for q in query if "(" in q}
    for fields in feed.values():
        assert set(fields) == set(profile.fields)
    assert profile.inputs["words"] == "tensor<float>(word{},x[32])"
    assert profile.fields["frames"] == "tensor<float>(frame{},x[32])"
    assert profile.match_features == ["model_score", "attribute(bias)"]
    counts = [re.findall(r"rerank-count: (\d+)", text) for text in profile.phases.values()]
    assert counts == [[], ["5000"], ["200"]]
    services = ET.parse(tmp_path / "new/application/services.xml").getroot()
    assert services.find("content/documents/document").attrib["type"] == "segment"
    readme = (tmp_path / "new/README.md").read_text()
    assert "**Not run: no Vespa was available.**" in readme


def test_frames_are_the_real_ones(index, tmp_path):
    export_application(index, tmp_path / "new")
    feed = read_feed(tmp_path / "new")
    for table in index.tables():
        for row in table.to_pylist():
            blocks = feed[row["id"]]["frames"]
            assert list(blocks) == [str(place) for place in range(row["count"])]
            frames = [np.frombuffer(bytes.fromhex(text), ">f4") for text in blocks.values()]
            assert np.concatenate(frames).tolist() == row["frames"][: row["count"] * 32]


def test_vectors_have_the_hex_dump_of_the_reference():
    """Compares with the example in Vespa's reference of its document JSON format."""
    assert _to_hex(np.array([1 / 9, 2 / 9, 1 / 3])) == "3DE38E393E638E393EAAAAAB"
    np.testing.assert_allclose(read_hex("3F471C723F638E393F800000"), [7 / 9, 8 / 9, 1], rtol=1e-7)


def test_existing_files_are_not_replaced(index, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="must be a new or empty folder"):
        export_application(index, tmp_path)
    with pytest.raises(InputError, match="must be a new or empty folder"):
        export_application(index, tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"aggregation": "weighted"}, "aggregation = 'weighted'"),
        ({"granularities": ("video_sentence", "video_word")}, "granularities"),
        ({"head": "mean_pooling"}, "head = 'mean_pooling'"),
        ({"fusion": "transformer"}, "fusion = 'transformer'"),
    ],
)
def test_other_models_are_refused(changes, field):
    config = tiny.make_config("")
    config.model.update(changes)
    retriever = Retriever({}, XClip(configure_model(config, 100)), {})
    with pytest.raises(InputError, match=f"model.{re.escape(field)}"):
        check_model(retriever)
