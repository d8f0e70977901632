"""Tests of indexes with a bank of captions, whose hubness bias is subtracted from scores."""

import dataclasses
import json
import shutil

import lancedb
import numpy as np
import pytest
import tiny
from indexes import (
    BANK,
    COUNT,
    SECONDS,
    content,
    index,
    made,
    made_with_bank,
    model,
    no_processes,
    one_clip,
    videos,
)

import xclip_jax
from xclip_jax.cli import InputError
from xclip_jax.metrics import MAX_CAPTIONS, MIN_CAPTIONS, hubness_bias, subtract_hubness_bias
from xclip_jax.search import Index
from xclip_jax.search.__main__ import main
from xclip_jax.search.selection import EVERYTHING
from xclip_jax.search.serve import make_app
from xclip_jax.search.store import Store

__all__ = ["index", "made", "made_with_bank", "model", "no_processes", "one_clip", "videos"]


@pytest.fixture(scope="module")
def banked(made_with_bank):
    return Index.open(made_with_bank)


def features_of(index):
    """Returns (ids, features) of all segments."""
    snapshot = index._snapshot
    ids = [f"{key:016x}" for key in snapshot.keys.tolist()]
    return ids, snapshot.features(np.arange(len(snapshot)))


def rank(index, text, model):
    """Returns ([id, ...], {id: (logit, bias as a logit)}) by the definition."""
    retriever = xclip_jax.load(model)
    ids, video = features_of(index)
    scale = np.exp(retriever.params["clip"]["logit_scale"])
    cosines_1xN = retriever.similarity(retriever.encode_text([text]), video) / scale
    bank_BxN = retriever.similarity(retriever.encode_text(BANK), video) / scale
    order = np.argsort(-subtract_hubness_bias(cosines_1xN, bank_BxN)[0])
    pairs = zip(scale * cosines_1xN[0], scale * hubness_bias(bank_BxN), strict=True)
    return [ids[row] for row in order], dict(zip(ids, pairs, strict=True))


@pytest.mark.parametrize("exhaustive", [False, True])
@pytest.mark.parametrize("text", ["a red dog", "blue", "a cat and"])
def test_ranking_is_by_score_minus_bias(banked, index, model, text, exhaustive):
    expected, values = rank(banked, text, model)
    answer = banked.query(text, k=50, exhaustive=exhaustive, merge=False)
    assert [hit.id for hit in answer] == expected
    for hit in answer:
        assert (hit.score, hit.bias) == pytest.approx(values[hit.id], abs=1e-4)
    without = {hit.id: hit for hit in index.query(text, k=50, exhaustive=exhaustive, merge=False)}
    assert list(without) != expected  # the bias matters
    for hit in answer:
        assert hit.score == pytest.approx(without[hit.id].score, abs=1e-4)
        assert without[hit.id].bias == 0


def test_first_and_second_stage_subtract_the_bias(banked, model):
    expected, _ = rank(banked, "a red dog", model)
    snapshot, (ids, video) = banked._snapshot, features_of(banked)
    everything = np.arange(len(snapshot))
    vectors, biases = snapshot.vectors.take(everything), snapshot.biases(everything)
    vector_1xD = banked.retriever.encode_text(["a red dog"]).sentence
    scores = vectors.astype(np.float64) @ vector_1xD[0]
    rows, products = snapshot.nearest(vector_1xD, 7, subtract_bias=True)
    assert rows.tolist() == np.argsort(biases - scores)[:7].tolist()
    np.testing.assert_allclose(products, np.sort(scores - biases)[::-1][:7], atol=1e-3)
    rows, _ = snapshot.nearest(vector_1xD, 7, subtract_bias=False)
    assert rows.tolist() == np.argsort(-scores)[:7].tolist()
    first = {ids[row] for row in np.argsort(biases - scores)[:4]}
    only = dataclasses.replace(banked._funnel, candidates=4, rerank=4)  # no second stage
    text = banked.retriever.encode_text(["a red dog"])
    ranking = only.rank(banked._shards, EVERYTHING, text, 4)
    found = [ids[row] for row in snapshot.find_row_ids(ranking.rows)]
    assert found == [key for key in expected if key in first]
    funnel = dataclasses.replace(banked._funnel, candidates=len(banked), rerank=4)
    video = video.replace(video=vectors)  # in float16, as that stage has them
    scorer = funnel.scorer
    parts = tiny.apply(scorer.model, scorer.params, text, video, method="granular_similarity")
    words = np.asarray(parts["video_sentence"] + parts["video_word"])[0] / 2
    second = {ids[row] for row in np.argsort(scorer.scale * biases - words)[:4]}
    ranking = funnel.rank(banked._shards, EVERYTHING, text, 4)
    found = [ids[row] for row in snapshot.find_row_ids(ranking.rows)]
    assert found == [key for key in expected if key in second]


def test_queries_by_example_ignore_the_bias(banked, index):
    hit = banked.query("a dog")[0]
    for search, argument in (("like", hit.id), ("similar", hit.path)):
        answers = [getattr(each, search)(argument, k=50, merge=False) for each in (banked, index)]
        assert [hit.id for hit in answers[0]] == [hit.id for hit in answers[1]]
        assert {hit.bias for hit in answers[0]} == {0}


def test_biases_do_not_depend_on_the_batch_or_the_run(banked, model, videos, tmp_path):
    """Compares bits, because after a kill the remaining files are in different batches."""
    other = Index.create(tmp_path / "one_by_one", model, segment_seconds=SECONDS, bank=BANK)
    for path in sorted(videos.iterdir(), reverse=True):
        Index.open(tmp_path / "one_by_one").add([path])
    other.refresh()
    assert content(other) == content(banked)
    assert len({row[-1] for row in content(banked).values()}) == 3 * COUNT


def test_index_without_bank_has_no_bias(index):
    assert {row[-1] for row in content(index).values()} == {None}
    assert "bank" not in index.about


def test_corrupted_bank_or_bias_is_noticed(made_with_bank, one_clip, tmp_path):
    folder = shutil.copytree(made_with_bank, tmp_path / "copy")
    table = lancedb.connect(folder).open_table("segments")
    path = table.search().select(["path"]).limit(1).to_list()[0]["path"]
    table.update(where=f"path = '{path}' AND start = 0", values={"bias": 0.5})
    copy = Index.open(folder)
    assert copy.num_segments == 3 * COUNT - 1
    lancedb.connect(folder).open_table("bank").delete(f"caption = '{BANK[3]}'")
    with pytest.raises(InputError, match="captions of its bank do not have their checksum"):
        copy.add(one_clip)


@pytest.mark.parametrize("head", ["tight_transformer", "seq_lstm"])
def test_heads_without_words_use_the_bias(videos, tmp_path, head):
    model = tiny.make_model(tmp_path / "model", head=head)
    both = [
        Index.create(tmp_path / name, model, segment_seconds=SECONDS, bank=bank)
        for name, bank in (("with", BANK), ("without", None))
    ]
    for each in both:
        each.add([videos])
    expected, values = rank(both[0], "a red dog", model) if head == "seq_lstm" else (None, None)
    answers = [both[0].query("a red dog", k=50, exhaustive=e, merge=False) for e in (False, True)]
    assert [hit.id for hit in answers[0]] == [hit.id for hit in answers[1]]
    ranked = [hit.score - hit.bias for hit in answers[0]]
    assert ranked == sorted(ranked, reverse=True)
    assert all(hit.bias for hit in answers[0])
    if values:
        assert [hit.id for hit in answers[0]] == expected


@pytest.mark.parametrize(
    "bank", [[], ["a dog"], ["a dog"] * (MIN_CAPTIONS - 1) + [" "] * 9, ["a"] * (MAX_CAPTIONS + 1)]
)
def test_bank_of_too_few_or_too_many_captions_is_an_error(model, tmp_path, bank):
    with pytest.raises(InputError, match=r"bank: [\d,]+ captions .* must be 100 to 5,000"):
        Index.create(tmp_path / "index", model, bank=bank)
    with pytest.raises(InputError, match=r"bank: 'captions.txt': must be a list"):
        Index.create(tmp_path / "index", model, bank="captions.txt")
    assert not (tmp_path / "index").exists()


# ---- the command


@pytest.fixture
def folder(model, videos, tmp_path, monkeypatch):
    """Makes the current folder, with `model`, `videos` and the captions `bank.txt`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(model)
    (tmp_path / "videos").symlink_to(videos)
    (tmp_path / "bank.txt").write_text("\n\n  ".join(BANK) + "\n", encoding="utf-8-sig")
    return tmp_path


def run_index(*options):
    main(["index", "videos", "--index=index", "--segment_seconds=2", *options])


def test_command_stores_the_bank_and_goes_on_with_it(folder, videos, capsys, banked):
    run_index("--model=model", "--bank=bank.txt")
    assert Store("index").bank() == BANK
    capsys.readouterr()
    main(["recall", "--sample=5", "--json", "--index=index"])  # before a copy, whose scores tie
    assert json.loads(capsys.readouterr().out)["top_10"] == 100
    (folder / "more").mkdir()
    shutil.copy(videos / "clip0.mp4", folder / "more" / "copy.mp4")
    main(["index", "more", "--index=index"])
    run_index("--bank=bank.txt")
    index = Index.open("index")
    assert index.num_segments == 3 * COUNT + 3
    biases = {row[0].split("/")[-1] + str(row[1]): row[-1] for row in content(index).values()}
    assert biases["copy.mp42.0"] == biases["clip0.mp42.0"]
    capsys.readouterr()
    main(["query", "a red dog", "--index=index", "--path=videos/"])
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["rank", "score", "bias", "best", "moment", "file"]
    hits = banked.query("a red dog")
    assert [line.split()[1:3] for line in lines] == [
        [f"{hit.score:.2f}", f"{hit.bias:.2f}"] for hit in hits
    ]
    main(["query", "a red dog", "--index=index", "--path=videos/", "--json"])
    found = [(hit["score"], hit["bias"]) for hit in json.loads(capsys.readouterr().out)["hits"]]
    np.testing.assert_allclose(found, [(hit.score, hit.bias) for hit in hits], atol=1e-5)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "--bank=other.txt: must be a text file"),
        (b"", "--bank=other.txt: 0 captions"),
        (b"\n \n", "--bank=other.txt: 0 captions"),
        (b"a dog\n" * 99, "--bank=other.txt: 99 captions"),
        (b"a dog\n" * 6000, "choose some at random: shuf -n 5000"),
        (b"a dog\n" * 200 + b"\xff", "other.txt, line 201: not UTF-8 text"),
        (b"a dog\n" * 200, "index was made with another bank; omit --bank or create another"),
    ],
)
def test_invalid_or_other_bank_is_a_one_line_error(folder, capsys, content, expected):
    Index.create("index", "model", segment_seconds=2, bank=BANK)
    if content is not None:
        (folder / "other.txt").write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        run_index("--bank=other.txt")
    assert expected in str(stop.value.code)
    assert "\n" not in str(stop.value.code)


def test_bank_for_an_index_without_one_is_an_error(folder):
    Index.create("index", "model", segment_seconds=2)
    with pytest.raises(SystemExit, match="was made without a bank; omit --bank or create"):
        run_index("--bank=bank.txt")


def test_bank_of_a_model_without_tokenizer_is_an_error(folder, model):
    (folder / "model").unlink()
    shutil.copytree(model, "model")
    shutil.rmtree("model/tokenizer")
    (folder / "model" / "digests.json").unlink()
    with pytest.raises(SystemExit, match="the model has no tokenizer"):
        run_index("--model=model", "--bank=bank.txt")
    assert not (folder / "index").exists()


def test_server_reports_score_and_bias(banked):
    from starlette.testclient import TestClient

    with TestClient(make_app(banked), base_url="http://localhost") as client:
        hits = client.post("/api/search", json={"text": "a red dog"}).json()["hits"]
    expected = banked.query("a red dog", k=24)
    assert [(hit["id"], hit["bias"]) for hit in hits] == [(hit.id, hit.bias) for hit in expected]
