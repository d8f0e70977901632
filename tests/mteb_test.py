"""Tests of the wrapper for MTEB, which `.ci/mteb` installs before it runs them.

The tasks are made here of MTEB's classes, and run without a network and without torchcodec.
"""

import dataclasses

import jax
import numpy as np
import pytest
import tiny

import xclip_jax
from xclip_jax import metrics
from xclip_jax.cli import InputError

mteb = pytest.importorskip("mteb", reason="MTEB is not installed: see .ci/mteb")
datasets = pytest.importorskip("datasets")
retrieval = pytest.importorskip("mteb.abstasks.retrieval")
wrapper = pytest.importorskip("xclip_jax.integrations.mteb")

COUNT = 14  # more than the 10 of nDCG@10
TEXTS = [f"{a} {b}" for a in tiny.COLOURS for b in tiny.COLOURS][:COUNT]
OPTIONS = {"encode_kwargs": {"batch_size": 4, "show_progress_bar": False}}


@pytest.fixture(scope="module", autouse=True)
def offline():
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
            patch.setenv(name, "1")
        patch.setattr(datasets.config, "TORCHCODEC_AVAILABLE", False)
        yield


@pytest.fixture(scope="module")
def retriever(tmp_path_factory):
    return xclip_jax.load(tiny.make_model(tmp_path_factory.mktemp("model") / "model", TEXTS))


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return tiny.make_videos(tmp_path_factory.mktemp("videos"), COUNT)


def make_rows(**columns):
    count = len(next(iter(columns.values())))
    return datasets.Dataset.from_dict({"id": [f"r{i}" for i in range(count)], **columns})


def store(paths):
    """Returns a data set of videos, every other one as the bytes of its file, the rest as paths."""
    as_bytes = [{"path": path.name, "bytes": path.read_bytes()} for path in paths]
    as_paths = [{"path": str(path), "bytes": None} for path in paths]
    videos = [(as_bytes if i % 2 else as_paths)[i] for i in range(len(paths))]
    return make_rows(video=videos).cast_column("video", datasets.Video())


def describe(category):
    words = {"t": "text", "v": "video", "a": "audio"}
    return mteb.TaskMetadata(
        name=f"Shapes{category.upper()}",
        description="Moving shapes.",
        dataset={"path": "none", "revision": "none"},
        type="Any2AnyRetrieval",
        category=category,
        modalities=[words[letter] for letter in dict.fromkeys(category.replace("2", ""))],
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        main_score="ndcg_at_10",
    )


def make_task(category, queries, corpus):
    class Shapes(retrieval.AbsTaskRetrieval):
        metadata = describe(category)

        def load_data(self, **_):
            split = {"queries": queries, "corpus": corpus, "top_ranked": None}
            split["relevant_docs"] = {id: {id: 1} for id in queries["id"]}
            self.dataset, self.data_loaded = {"default": {"test": split}}, True

    return Shapes()


def run(model, category, queries, corpus):
    task = make_task(category, queries, corpus)
    options = {**OPTIONS, "cache": None, "co2_tracker": False, "show_progress_bar": False}
    (result,) = mteb.evaluate(model, task, **options).task_results
    return result.scores["test"][0]


def expect(counts):
    """Returns MTEB's names and values of metrics from our rank counts, without ties."""
    better_Q, equal_Q = counts
    assert not equal_Q.any()
    rank_Q = metrics.expected_ranks(better_Q, equal_Q)
    recalls = {f"recall_at_{k}": metrics.recall(*counts, k).mean() / 100 for k in (1, 5, 10)}
    return {**recalls, "ndcg_at_10": (1 / np.log2(1 + rank_Q) * (rank_Q <= 10)).mean()}


@pytest.mark.parametrize(("category", "way"), [("t2v", "text_to_video"), ("v2t", "video_to_text")])
def test_scores_of_mteb_are_those_of_the_fused_similarity(retriever, paths, category, way):
    text, video = make_rows(text=TEXTS), store(paths)
    queries, corpus = (text, video) if category == "t2v" else (video, text)
    model = wrapper.XClipSearch(retriever, "tests/tiny")
    assert isinstance(model, mteb.SearchProtocol)
    scores = run(model, category, queries, corpus)
    sims = retriever.similarities(retriever.encode_text(TEXTS), retriever.encode_video(paths))
    counts = {name: metrics.retrieval_counts(s, np.arange(COUNT))[way] for name, s in sims.items()}
    expected = expect(counts.pop("all"))
    assert {name: scores[name] for name in expected} == pytest.approx(expected, abs=1e-5)
    assert scores["main_score"] == scores["ndcg_at_10"]
    assert len(counts) == 4  # the granularities, among them the cosine of a single vector
    alone = np.array([expect(count)["ndcg_at_10"] for count in counts.values()])
    assert (abs(alone - scores["ndcg_at_10"]) > 0.005).all()


@pytest.fixture(scope="module")
def searcher(retriever, paths):
    model = wrapper.XClipSearch(retriever, "tests/tiny")
    model.index(store(paths[:6]), task_metadata=describe("t2v"), **OPTIONS)
    return model


def search(model, texts, top_k=10, category="t2v", **options):
    queries = make_rows(text=texts)
    metadata = describe(category)
    return model.search(queries, task_metadata=metadata, top_k=top_k, **OPTIONS, **options)


def test_search_returns_the_best_logits(searcher, retriever, paths):
    sim_TxV = retriever.similarity(
        retriever.encode_text(TEXTS[:3]), retriever.encode_video(paths[:6])
    )
    results = search(searcher, TEXTS[:3], top_k=2)
    assert list(results) == ["r0", "r1", "r2"]
    for scores, scores_V in zip(results.values(), sim_TxV, strict=True):
        best = np.argsort(-scores_V)[:2]
        assert list(scores) == [f"r{v}" for v in best]
        assert list(scores.values()) == pytest.approx(scores_V[best], abs=1e-4)
    assert results == search(searcher, TEXTS[:3], top_k=2)


def test_reranking_ranks_only_the_given_documents(searcher):
    (whole,) = search(searcher, TEXTS[:1]).values()
    results = search(searcher, TEXTS[:2], top_ranked={"r0": ["r5", "r1", "r3"]}, top_k=2)
    kept = [id for id in whole if id in ("r1", "r3", "r5")][:2]
    assert results == {"r0": pytest.approx({id: whole[id] for id in kept}, abs=1e-4), "r1": {}}
    assert list(results["r0"]) == kept


def test_equal_logits_keep_the_order_of_the_corpus(retriever, paths):
    model = wrapper.XClipSearch(retriever, "tests/tiny")
    model.index(store([paths[0]] * 3), task_metadata=describe("t2v"), **OPTIONS)
    assert list(search(model, TEXTS[:1], top_k=2)["r0"]) == ["r0", "r1"]


def test_texts_are_joined_as_by_mteb(retriever, paths):
    model, metadata = wrapper.XClipSearch(retriever, "tests/tiny"), describe("v2t")
    texts = {"title": ["red", ""], "text": ["grey", "red grey"]}
    model.index(make_rows(**texts), task_metadata=metadata, **OPTIONS)
    videos = store(paths[:1])
    (scores,) = model.search(videos, task_metadata=metadata, top_k=2, **OPTIONS).values()
    assert scores["r0"] == scores["r1"]


def test_metadata_describes_the_model(retriever):
    meta = wrapper.XClipSearch(retriever, "tests/tiny").mteb_model_meta
    arrays = jax.tree.leaves(retriever.params)
    assert (meta.name, meta.framework, meta.modalities) == (
        "tests/tiny",
        ["JAX"],
        ["text", "video"],
    )
    assert meta.n_parameters == sum(array.size for array in arrays)
    assert (
        meta.n_embedding_parameters
        == retriever.params["clip"]["textual"]["tokens"]["embedding"].size
    )
    assert (meta.max_tokens, meta.embed_dim) == (8, 32)


def test_revision_changes_with_weights_and_config(retriever):
    def revision(**changes):
        model = wrapper.XClipSearch(dataclasses.replace(retriever, **changes), "tests/tiny")
        return model.mteb_model_meta.revision

    params = jax.tree.map(lambda x: x + 1e-3, retriever.params)
    model = retriever.model.clone(config=dataclasses.replace(retriever.model.config, tau=0.1))
    assert len({revision(), revision(params=params), revision(model=model)}) == 3
    assert revision() == revision()


def test_name_without_organization_is_an_error(retriever):
    with pytest.raises(InputError, match=r"^name = 'tiny': must be of the form ORGANIZATION/MODEL"):
        wrapper.XClipSearch(retriever, "tiny")


@pytest.mark.parametrize(
    ("category", "message"),
    [
        ("vt2v", r"ShapesVT2V: a query is video \+ text: must be a text or a video"),
        ("a2v", "ShapesA2V: a query is audio: must be a text or a video"),
        ("t2t", r"ShapesT2T: category t2t: must compare texts with videos \(t2v or v2t\)"),
    ],
)
def test_other_modalities_are_an_error(retriever, paths, category, message):
    model, metadata = wrapper.XClipSearch(retriever, "tests/tiny"), describe(category)
    corpus = make_rows(text=TEXTS) if category == "t2t" else store(paths[:2])
    model.index(corpus, task_metadata=metadata, **OPTIONS)
    with pytest.raises(InputError, match=message):
        search(model, TEXTS[:1], category=category)


def test_sound_is_ignored(retriever, paths):
    model = wrapper.XClipSearch(retriever, "tests/tiny")
    model.index(store(paths[:2]), task_metadata=describe("t2va"), **OPTIONS)
    assert len(search(model, TEXTS[:1], category="t2va")["r0"]) == 2


def test_unreadable_video_is_named(retriever, paths, tmp_path):
    model, metadata = wrapper.XClipSearch(retriever, "tests/tiny"), describe("t2v")
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    with pytest.raises(InputError, match=r"^video 'r1' \(broken.mp4\): "):
        model.index(store([paths[0], broken]), task_metadata=metadata, **OPTIONS)
    rows = make_rows(video=[None]).cast_column("video", datasets.Video())
    with pytest.raises(InputError, match="video 'r0' is missing in the data set"):
        model.index(rows, task_metadata=metadata, **OPTIONS)


def test_decoded_frames_are_an_error(retriever):
    model, rows = wrapper.XClipSearch(retriever, "tests/tiny"), make_rows(video=[[[1, 2]]])
    with pytest.raises(InputError, match=r"'video' of List.*: must be datasets\.Video\(\)"):
        model.index(rows, task_metadata=describe("t2v"), **OPTIONS)


def test_infinite_logits_are_an_error(retriever, paths):
    params = jax.tree.map(lambda x: x * np.nan, retriever.params)
    model = wrapper.XClipSearch(dataclasses.replace(retriever, params=params), "tests/tiny")
    model.index(store(paths[:2]), task_metadata=describe("t2v"), **OPTIONS)
    with pytest.raises(InputError, match="ShapesT2V: the model computes NaN or infinite logits"):
        search(model, TEXTS[:1])
