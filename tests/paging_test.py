"""Tests of pages of results, and of the calibration, in an index of many segments."""

import shutil

import numpy as np
import pytest
import tiny
from indexes import copied, index, made, model, no_processes, one_clip, videos

from xclip_jax.search import Index
from xclip_jax.search.calibration import SENTENCES, WEAK_PERCENTILE, calibrate, choose_examples

__all__ = ["copied", "index", "made", "model", "no_processes", "one_clip", "videos"]

COUNT = 60  # segments of one film each


@pytest.fixture(scope="module")
def many(model, tmp_path_factory):
    """Makes an index of COUNT segments of random features, in films of three."""
    index = Index.create(tmp_path_factory.mktemp("many") / "index", model, segment_seconds=4)
    rng, rows = np.random.default_rng(0), []
    for number in range(COUNT):
        frames = rng.normal(size=(4, 32)) + 2 * rng.normal(size=(1, 32))
        frames /= np.linalg.norm(frames, axis=1, keepdims=True)
        mean = frames.mean(0) / np.linalg.norm(frames.mean(0))
        start = 4.0 * (number % 3)
        row = {"id": f"{number:016x}", "path": f"/f/{number // 3}.mp4", "size": 1, "mtime": number}
        row |= {"start": start, "end": start + 4, "offset": 0.0, "sample": 0, "count": 4}
        row |= {"times": [start + k for k in range(4)], "video": mean.astype(np.float32)}
        rows.append({**row, "frames": frames.reshape(-1).astype(np.float32), "thumbnail": b""})
    index._store.add(rows, [])
    index.refresh()
    return index


@pytest.mark.parametrize("merge", [True, False])
def test_pages_neither_repeat_nor_skip_hits(many, merge):
    narrow = Index.open(many.location, rerank=8)
    narrow.candidates = 16
    pages = [narrow.query("a red dog", 7, offset=o, merge=merge) for o in range(0, COUNT, 7)]
    hits = [hit for page in pages for hit in page]
    assert [hit.rank for hit in hits] == list(range(1, len(hits) + 1))
    assert len({hit.id for hit in hits}) == len(hits)
    whole = narrow.query("a red dog", COUNT, merge=merge)
    assert [(hit.id, hit.score) for hit in hits] == [(hit.id, hit.score) for hit in whole]
    assert (len(hits) == COUNT) != merge


def test_newest_films_come_first(many):
    films = many.films(2)
    assert [film.path for film in films] == ["/f/19.mp4", "/f/18.mp4"]
    assert [(film.duration, film.mtime) for film in films] == [(12.0, 59 / 1e9), (12.0, 56 / 1e9)]
    assert films[0].id == f"{57:016x}"


def test_calibration_describes_unrelated_pairs():
    rng = np.random.default_rng(0)
    scores, cosines = rng.normal(size=(SENTENCES, 50)), rng.normal(size=(SENTENCES, 50, 4))
    cosines[:, :, 2:] = np.nan
    calibration = calibrate(scores, cosines)
    assert calibration.threshold == pytest.approx(np.percentile(scores, WEAK_PERCENTILE))
    assert calibration.background == pytest.approx(cosines[:, :, :2].mean())


def test_examples_have_different_good_matches():
    scores = np.array([[0.0, 8.0, 1.0], [9.0, 0.0, 0.0], [8.5, 0.0, 0.0], [0.0, 0.0, 4.0]])
    assert choose_examples(["a", "b", "c", "d"], scores, 5.0) == ("b", "a")


def test_calibration_is_stored_and_marks_weak_matches(copied, one_clip):
    before = copied._calibration
    assert before.threshold is not None
    hits = copied.query("a red dog", k=50, merge=False)
    assert [hit.weak for hit in hits] == [hit.score < before.threshold for hit in hits]
    assert not any(hit.weak for hit in copied.like(hits[0].id, k=50))  # not of sentences
    reader = Index.open(copied.location)
    assert reader._calibration == before
    copied.add(one_clip)
    assert copied._calibration != before
    assert reader.refresh()
    assert reader._calibration == copied._calibration


def test_calibration_that_was_lost_is_made_by_the_next_update(copied, videos):
    version, saved = copied._calibration.version, copied._calibration
    copied._store.save_calibration(type(saved)())
    again = Index.open(copied.location)
    assert not any(hit.weak for hit in again.query("a red dog"))
    again.add(videos)
    assert again._calibration == saved
    assert again._calibration.version == version


def test_model_without_tokenizer_is_not_calibrated(videos, tmp_path):
    folder = tiny.make_model(tmp_path / "model")
    shutil.rmtree(folder / "tokenizer")
    (folder / "digests.json").unlink()
    index = Index.create(tmp_path / "index", tmp_path / "model", segment_seconds=2)
    index.add([videos / "clip0.mp4"])
    assert index.examples == []
    assert not any(hit.weak for hit in index.similar(videos / "clip0.mp4"))
