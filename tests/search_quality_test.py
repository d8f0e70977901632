"""Slow tests of search with trained models.

pytest -m slow tests/search_quality_test.py
"""

import json
import shutil
from pathlib import Path

import av
import numpy as np
import pytest
from browsing import chromium, read_heat_map, save_screenshot, search, search_and_play, serving
from demo import ROOT, run, train_demo

import xclip_jax
from xclip_jax.data import rendered
from xclip_jax.search import Index

__all__ = ["chromium"]  # the fixture
pytestmark = pytest.mark.slow

CLIPS = ROOT.parent / "shared" / "clips"
TEST_CLIPS = 220


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Returns (index of the demo's test clips, results.json of the demo)."""
    folder, trained = tmp_path_factory.mktemp("demo"), train_demo()
    (folder / "clips").mkdir()
    for path in (trained / "data/demo/scenes/videos").glob("test_*.mp4"):
        shutil.copy(path, folder / "clips")
    run(
        folder,
        "xclip_jax.search",
        "index",
        "clips",
        f"--model={trained}/runs/demo",
        "--index=index",
    )
    results = json.loads((trained / "runs/demo/results.json").read_text())
    return Index.open(folder / "index"), results


@pytest.fixture(scope="module")
def scenes():
    return rendered.draw_scenes("test", TEST_CLIPS)


def number(hit):
    return int(Path(hit.path).stem.removeprefix("test_"))


def test_recall_equals_that_of_the_evaluation(demo, scenes):
    index, results = demo
    correct = [number(index.query(s.captions[0])[0]) == n for n, s in enumerate(scenes)]
    assert len(index) == TEST_CLIPS
    assert 100 * np.mean(correct) == pytest.approx(results["text_to_video"]["R@1"], abs=1)


def test_exhaustive_ranking_equals_the_similarity_matrix(demo, scenes):
    index, _ = demo
    captions = [scene.captions[0] for scene in scenes]
    retriever = xclip_jax.load(index.model_name)
    paths = [f"{Path(index.location).parent}/clips/test_{n:05}.mp4" for n in range(TEST_CLIPS)]
    video = retriever.encode_video(paths)
    sim_TxV = retriever.similarity(retriever.encode_text(captions), video)
    answers = index.query_exhaustively(captions, k=TEST_CLIPS)
    ranking_TxV = [[number(hit) for hit in answer] for answer in answers]
    np.testing.assert_array_equal(ranking_TxV, np.argsort(-sim_TxV, axis=1, kind="stable"))


def test_best_second_is_in_the_described_event(demo, scenes):
    index, _ = demo
    inside = []
    for n, scene in enumerate(scenes):
        for place, event in enumerate(scene.events if scene.kind == "order" else ()):
            sentence = f"a {event.size} {event.colour} {event.shape}"
            second = index.query(sentence, k=1, path=f"test_{n:05}")[0].second
            inside.append((second < rendered.LAST / 2) == (place == 0))
    assert len(inside) > 300
    assert np.mean(inside) >= 0.8


def test_moments_overlap_the_described_event(demo, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import moments

    events = moments.render_films(tmp_path, 40)
    films = Index.create(tmp_path / "index", demo[0].model_name)
    films.add(tmp_path)
    measured = moments.measure(films, events, in_film=True)
    assert measured["moment"] >= 0.7
    assert measured["moment_IoU"] > measured["segment_IoU"] + 0.2
    assert measured["weak"] < 0.1 < 0.5 < measured["weak_unrelated"]


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """Returns (index of real clips, their captions), with a small model trained on them."""
    if not CLIPS.is_dir():
        pytest.skip(f"needs real clips with captions in {CLIPS}")
    folder = tmp_path_factory.mktemp("real")
    captions = CLIPS / "captions.json"
    data = ("--dataset=captions", f"--videos={CLIPS}", f"--annotations={captions}")
    run(folder, "xclip_jax.prepare", *data, "--output=data", "--image_size=96")
    small = ("vision.image_size=96", "vision.patch_size=16")
    run(
        folder,
        "xclip_jax.main",
        f"--config={ROOT}/configs/captions.py",
        "--config.data.path=data",
        "--config.train.epochs=80",
        *(f"--config.model.{field}" for field in small),
    )
    run(folder, "xclip_jax.search", "index", CLIPS, "--model=runs/captions", "--index=index")
    return Index.open(folder / "index"), json.loads(captions.read_text())


def test_each_caption_ranks_its_real_clip_first(real):
    index, clips = real
    for clip in clips:
        for caption in clip["captions"]:
            assert Path(index.query(caption)[0].path).name == clip["video"], caption


def test_moments_of_joined_real_clips(real, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import moments

    events = moments.join_clips(CLIPS, CLIPS / "captions.json", tmp_path)
    for name, options, least in (
        ("default", {}, 0.5),
        ("overlap", {"segment_seconds": 6, "overlap_seconds": 3}, 0.7),
    ):
        films = Index.create(tmp_path / name, real[0].model_name, **options)
        films.add([tmp_path / "a.mp4", tmp_path / "b.mp4"])
        measured = moments.measure(films, events, in_film=False)
        assert measured["second"] >= 0.8
        assert measured["moment"] >= least


def _plays(path, second):
    """Returns True if every Chromium plays the file, and it lasts at least a second longer."""
    with av.open(str(path)) as container:
        codec = container.streams.video[0].codec_context
        known = codec.name in ("h264", "vp8") and codec.pix_fmt == "yuv420p"
        return known and second + 1 < container.duration / av.time_base


def test_page_plays_real_clips_from_the_best_second(real, chromium):
    """Saves screenshots in the folder XCLIP_JAX_SCREENSHOTS, if set."""
    index, clips = real
    page = chromium.new_page(viewport={"width": 1280, "height": 900})
    played = 0
    with serving(index) as address:
        for clip in clips:
            hit = index.query(clip["captions"][0])[0]
            if _plays(CLIPS / clip["video"], hit.second):
                page.goto("about:blank")
                search_and_play(page, address, clip["captions"][0], clip["video"], hit.second)
                played += 1
        assert played >= 6
        words, times, values, _ = read_heat_map(page)
        assert values.shape == (len(words), len(times))
        page.locator("#heat").scroll_into_view_if_needed()
        save_screenshot(page, "heatmap")
        page.set_viewport_size({"width": 375, "height": 740})
        save_screenshot(page, "narrow_player")
        page.keyboard.press("Escape")
        save_screenshot(page, "narrow")
        search(page, "  ")
        save_screenshot(page, "error")
