"""Tests of creating, opening and searching an index of a few videos."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import tiny
from indexes import COUNT, SECONDS, content, index, made, model, no_processes, videos
from PIL import Image

import xclip_jax
from xclip_jax.cli import InputError
from xclip_jax.data.preprocess import FrameFormat
from xclip_jax.data.video import read_frames, read_still
from xclip_jax.search import Index
from xclip_jax.search.examples import read_example
from xclip_jax.search.output import export_segments

__all__ = ["index", "made", "model", "no_processes", "videos"]  # the fixtures


def test_stored_features_are_those_of_the_frames(index, videos, model):
    retriever = xclip_jax.load(model)
    assert (index.num_files, index.num_segments, len(index)) == (COUNT, 3 * COUNT, 3 * COUNT)
    frames = read_frames(videos / "clip1.mp4", FrameFormat(tiny.SIDE)).frames
    expected = retriever.encode_video([np.stack(frames[a : a + 2]) for a in (0, 2, 4)])
    rows = [row for row in content(index).values() if row[0] == str(videos / "clip1.mp4")]
    rows.sort(key=lambda row: row[1])
    assert [row[1] for row in rows] == [0, 2, 4]
    np.testing.assert_allclose([row[3] for row in rows], expected.video, atol=1e-6)
    frames = np.reshape([row[4] for row in rows], (3, 4, 32))
    np.testing.assert_allclose(frames[expected.mask], expected.frames[expected.mask], atol=1e-6)


@pytest.mark.parametrize("exhaustive", [False, True])
def test_ranking_equals_that_of_the_full_model(index, videos, model, exhaustive):
    retriever = xclip_jax.load(model)
    segments = {}
    for path in videos.iterdir():
        frames = read_frames(path, FrameFormat(tiny.SIDE)).frames
        for start in (0, 2, 4):
            segments[str(path), start] = np.stack(frames[start : start + 2])
    video = retriever.encode_video(list(segments.values()))
    for text in ("a red dog", "blue", "a cat and"):
        scores = retriever.similarity(retriever.encode_text([text]), video)[0]
        expected = sorted(zip(scores, segments, strict=True), reverse=True)[:7]
        answer = index.query(text, k=7, exhaustive=exhaustive, merge=False)
        assert [(hit.path, hit.segment_start) for hit in answer] == [where for _, where in expected]
        assert [hit.score for hit in answer] == pytest.approx([s for s, _ in expected], abs=1e-4)
        assert [hit.rank for hit in answer] == list(range(1, 8))
        assert all(hit.start <= hit.second < hit.end for hit in answer)
        assert answer.searched == 3 * COUNT


def test_frames_are_made_as_the_model_requires(videos, tmp_path):
    preprocess = {"resize": "squash", "interpolation": "bilinear"}
    model = tiny.make_model(tmp_path / "model", preprocess=preprocess)
    index = Index.create(tmp_path / "index", model, segment_seconds=6)
    wide = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 48, 3), np.uint8))
    wide.save(tmp_path / "wide.png")
    index.add([videos / "clip1.mp4"])
    retriever = xclip_jax.load(model)
    format = FrameFormat(tiny.SIDE, "squash", "bilinear")
    frames = np.stack(read_frames(videos / "clip1.mp4", format).frames)
    expected = retriever.encode_video([frames])
    (row,) = content(index).values()
    np.testing.assert_allclose(row[3], expected.video[0], atol=1e-6)
    np.testing.assert_array_equal(
        read_example(videos / "clip1.mp4", retriever.model.config), frames[[0, 1, 3, 5]]
    )
    wide.resize((16, 16), Image.Resampling.BILINEAR).save(tmp_path / "square.png")
    scores = [index.similar(tmp_path / name)[0].score for name in ("wide.png", "square.png")]
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)


def test_k_larger_than_the_index_returns_all_segments(index):
    assert len(index.query("a dog", k=1000, merge=False)) == 3 * COUNT


def test_filters_select_segments_by_path_and_time(index, videos):
    assert {hit.path for hit in index.query("a dog", path="clip2")} == {str(videos / "clip2.mp4")}
    assert len(index.query("a dog", k=50, path="clip?.mp4", merge=False)) == 3 * COUNT
    assert len(index.query("a dog", k=50, path="*p[2].mp4")) == 0
    assert len(index.query("a dog", k=50, path=f"{videos}/*3.mp4", merge=False)) == 3
    assert len(index.query("a dog", k=50, path="%")) == 0  # not a wildcard
    early = index.query("a dog", k=50, end=1.5)
    assert {hit.segment_start for hit in early} == {0}
    assert early.searched == COUNT
    assert {hit.segment_start for hit in index.query("a dog", k=50, start=4.5)} == {4}
    assert len(index.query("a dog", k=50, start=2.5, end=3.5, exhaustive=True)) == COUNT


@pytest.mark.parametrize("exhaustive", [False, True])
@pytest.mark.parametrize(("start", "end"), [(2.6, 4.4), (None, 0.5), (5, None), (3, 3), (2.2, 2.7)])
def test_best_second_is_between_start_and_end(index, start, end, exhaustive):
    answer = index.query("a dog", k=50, start=start, end=end, exhaustive=exhaustive)
    assert len(answer) >= COUNT
    for hit in answer:
        assert (start or 0) <= hit.second <= (6 if end is None else end)
        assert hit.start <= hit.second <= hit.end


def test_name_that_the_database_refuses_is_an_error(model, tmp_path):
    with pytest.raises(InputError, match=r"no index can be created in '.*a\\tb': Invalid input"):
        Index.create(tmp_path / "a\tb", model)


def test_start_after_end_is_an_error(index):
    hit = index.query("a dog")[0]
    for search in (index.query, index.similar, index.like):
        argument = {"query": "a dog", "similar": hit.path, "like": hit.id}[search.__name__]
        with pytest.raises(InputError, match=r"start = 4, end = 3: start must not be after end"):
            search(argument, start=4, end=3)


@pytest.mark.parametrize(
    "filters",
    [{"start": np.nan}, {"end": np.inf}, {"start": -5}, {"start": "3"}, {"path": 5}, {"end": []}],
)
def test_filters_of_invalid_types_or_values_are_errors(index, filters):
    (name,) = filters
    with pytest.raises(InputError, match=rf"{name}.*must be a (number of seconds|string)"):
        index.query("a", **filters)


def test_filters_apply_to_segments_similar_to_another(index):
    hit = index.query("a dog")[0]
    answer = index.like(hit.id, k=50, path="clip2", start=2.5, end=3.5)
    assert [(Path(other.path).name, other.segment_start) for other in answer] == [("clip2.mp4", 2)]


def test_overlong_filter_or_sentence_is_an_error(index):
    with pytest.raises(InputError, match=r"path: must be a string of at most 4096 characters"):
        index.query("a dog", path="x" * 200_000)
    with pytest.raises(InputError, match=r"more than 10,000 characters"):
        index.query("dog " * 250_000)


@pytest.mark.parametrize("text", ["", "   ", "\n", "&nbsp;", "\ufeff", "\0", "\x1b[31m", "\u200b"])
def test_empty_sentence_is_an_error(index, text):
    with pytest.raises(InputError, match="sentence is empty"):
        index.query(text)


def test_long_sentence_is_truncated_with_a_note(index):
    answer = index.query("a red dog and a blue cat " * 400)
    assert "first 6 tokens" in answer.note
    assert len(answer) == 10
    assert index.query("a dog").note is None


def test_later_queries_do_not_compile(index):
    index.query("a dog")
    index.similar(index.segment(index.query("a dog")[0].id).path)
    before = xclip_jax.inference.apply_model._cache_size()
    for k in (1, 3, 10, 200):
        index.query("a red cat and a dog", k=k)
        index.query("cat", k=k, path="clip1")
        index.like(index.query("a dog")[0].id, k=k - 1 or 1)
    assert xclip_jax.inference.apply_model._cache_size() == before


def test_example_is_compared_with_videos_and_frames(index, videos, model, tmp_path):
    retriever = xclip_jax.load(model)
    frames = read_frames(videos / "clip3.mp4", FrameFormat(64)).frames
    Image.fromarray(frames[4]).save(tmp_path / "still.png")
    for file, pixels in ((videos / "clip3.mp4", np.stack(frames)), ("still.png", frames[4][None])):
        vector = retriever.encode_video([pixels]).video[0]
        expected = []
        for _, _, _, video, block, _ in content(index).values():
            cosines = np.reshape(block, (4, 32))[:2] @ vector
            weights = np.exp((cosines - cosines.max()) / 0.01)
            expected.append((video @ vector + weights @ cosines / weights.sum()) / 2)  # Eq. 3, 7, 8
        scale = np.exp(retriever.params["clip"]["logit_scale"])
        scores = [hit.score for hit in index.similar(tmp_path / file, k=100, merge=False)]
        assert scores == pytest.approx(sorted(scale * np.array(expected), reverse=True), abs=2e-3)


def test_like_leaves_out_the_segment_itself(index):
    hit = index.query("a dog")[0]
    answer = index.like(hit.id, k=3)
    assert hit.id not in [other.id for other in answer]
    assert [other.rank for other in answer] == [1, 2, 3]


def test_unreadable_example_is_an_error(index, tmp_path):
    (tmp_path / "no.png").write_bytes(b"not an image")
    with pytest.raises(InputError, match="cannot be read as an image"):
        index.similar(tmp_path / "no.png")
    with pytest.raises(InputError, match="gone"):
        index.similar(tmp_path / "gone.mp4")


def test_captions_are_ranked_by_similarity(index, videos, model):
    captions = ["a red dog", "a blue cat and", "cat"]
    retriever = xclip_jax.load(model)
    video = retriever.encode_video([videos / "clip0.mp4"])
    scores = retriever.similarity(retriever.encode_text(captions), video)[:, 0]
    ranked = index.rank_captions(videos / "clip0.mp4", captions)
    assert [caption for caption, _ in ranked] == [captions[i] for i in np.argsort(-scores)]
    assert ranked[0][1] == pytest.approx(scores.max(), abs=1e-5)


def test_heat_map_has_the_cosines_of_words_and_real_frames(index):
    hit = index.query("a red dog")[0]
    heat_map = index.heat_map(hit.id, "a red dog")
    assert heat_map.words == ["a", "red", "dog"]
    assert heat_map.times == [hit.segment_start, hit.segment_start + 1]
    text = index.retriever.encode_text(["a red dog"])
    video = index._snapshot.features(index._snapshot.find(hit.id))
    cosines = text.words[0, 1:4] @ video.frames[0, :2].T  # one token a word
    np.testing.assert_allclose(heat_map.words_WxF, cosines, atol=1e-5)


def test_best_second_is_the_hottest_of_the_heat_map(index):
    for text in ("a red dog", "blue", "a cat and"):
        for hit in index.query(text, k=50):
            heat_map = index.heat_map(hit.id, text)
            assert hit.second == heat_map.times[int(np.argmax(heat_map.sentence))]


def test_segment_and_thumbnail_by_id(index, videos):
    hit = index.query("a dog")[0]
    segment = index.segment(hit.id)
    assert (segment.path, segment.start) == (hit.path, hit.segment_start)
    assert (segment.end, segment.score) == (hit.segment_end, None)
    assert index.thumbnail(hit.id)[:3] == b"\xff\xd8\xff"
    assert read_still(hit.path, hit.second)[:3] == b"\xff\xd8\xff"
    for lookup in (index.segment, index.thumbnail, index.like):
        with pytest.raises(KeyError):
            lookup("0123456789abcdef")


def test_features_do_not_depend_on_the_batch(index, model, videos, tmp_path):
    """Compares bits, because after a kill the remaining files are in different batches."""
    other = Index.create(tmp_path / "one_by_one", model, segment_seconds=SECONDS)
    for path in sorted(videos.iterdir(), reverse=True):
        other.add([path])
    assert content(other) == content(index)


def test_float16_scores_are_close(index, model, videos, tmp_path):
    half = Index.create(tmp_path / "half", model, segment_seconds=SECONDS, precision="float16")
    half.add([videos])
    for one, other in zip(index.query("a dog"), half.query("a dog"), strict=True):
        assert one.score == pytest.approx(other.score, abs=0.01)


def test_another_model_is_an_error(made, tmp_path):
    other = tiny.make_model(tmp_path / "other", seed=1)
    with pytest.raises(InputError, match=f"was made with the model .* not with {other}"):
        Index.open(made, other)


def test_moved_model_must_be_passed_explicitly(model, videos, tmp_path):
    folder = Path(shutil.copytree(model, tmp_path / "before"))
    Index.create(tmp_path / "index", folder).add([videos / "clip0.mp4"])
    folder.rename(tmp_path / "after")
    with pytest.raises(InputError, match=r"no longer in .*before: set --model to its new location"):
        Index.open(tmp_path / "index").query("a dog")
    assert len(Index.open(tmp_path / "index", tmp_path / "after").query("a dog")) == 1


def test_missing_index_is_an_error(tmp_path):
    with pytest.raises(InputError, match="no index in"):
        Index.open(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_inaccessible_bucket_is_an_error():
    with pytest.raises(InputError, match="the index nonsense://bucket/index cannot be read: "):
        Index.open("nonsense://bucket/index")


def test_corrupted_index_is_a_one_line_error(made, tmp_path):
    for number, pattern in enumerate(["segments.lance/data/*", "segments.lance/_versions/*"]):
        folder = Path(shutil.copytree(made, tmp_path / str(number)))
        for path in folder.glob(pattern):
            path.write_bytes(b"x" * 100)
        with pytest.raises(InputError, match=r"cannot be read: .+") as caught:
            Index.open(folder).query("a dog")
        assert "\n" not in str(caught.value)


def test_folder_with_other_files_is_an_error(model, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="is not empty and not an index"):
        Index.create(tmp_path, model)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_playlist_as_example_is_an_error(index, videos, tmp_path):
    """Passes playlists, because FFmpeg would open any local file that they name."""
    playlist = tmp_path / "a.m3u8"
    clip = videos / "clip0.mp4"
    playlist.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{clip}\n#EXT-X-ENDLIST")
    for name in ("a.m3u8", "a.mp4", "a.ts", "a"):
        copy = tmp_path / name
        if copy != playlist:
            shutil.copy(playlist, copy)
        with pytest.raises(InputError):
            index.similar(copy)


@pytest.mark.parametrize(
    "settings", [{"segment_seconds": 0}, {"segment_seconds": 2.5}, {"precision": "int8"}]
)
def test_invalid_settings_are_an_error(model, tmp_path, settings):
    with pytest.raises((InputError, TypeError), match=next(iter(settings))):  # TypeError: beartype
        Index.create(tmp_path / "index", model, **settings)
    assert not (tmp_path / "index").exists()


@pytest.mark.parametrize("k", [0, -1, 2.5, "3"])
def test_invalid_k_is_an_error(index, k):
    with pytest.raises((InputError, TypeError), match=r"at least 1|Actual"):  # TypeError: beartype
        index.query("a dog", k=k)


def test_empty_index_returns_no_hits(model, tmp_path):
    empty = Index.create(tmp_path / "empty", model)
    assert empty.query("a dog").hits == []
    assert empty.query("a dog", exhaustive=True).hits == []
    with pytest.raises(InputError, match="already an index"):
        Index.create(tmp_path / "empty", model)


READ_ONLY = """
import os, sys
from xclip_jax.search import Index
Index.open(sys.argv[1]).query("a dog")  # imports modules before the change of user
os.seteuid(65534)  # user nobody
try:
    open(os.path.join(sys.argv[1], "x"), "w")
except PermissionError:
    print("read-only,", len(Index.open(sys.argv[1]).query("a dog", k=4)), "hits")
"""


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid(), reason="needs root to become nobody"
)
def test_readers_need_no_write_access(made, model, videos):
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        shutil.copytree(model, f"{folder}/model")
        index = Index.create(f"{folder}/index", f"{folder}/model", segment_seconds=SECONDS)
        index.add([videos])
        done = subprocess.run(
            [sys.executable, "-c", READ_ONLY, f"{folder}/index"], capture_output=True, text=True
        )
    assert done.stdout == "read-only, 4 hits\n", done.stderr


@pytest.mark.parametrize("fields", [{"aggregation": "weighted"}, {"tau_learned": True}])
def test_models_with_trained_aggregation_rank_as_the_full_model(videos, tmp_path, fields):
    """The weights of frames are read back from the index, also by queries by example."""
    model = tiny.make_model(tmp_path / "model", **fields)
    index = Index.create(tmp_path / "index", model, segment_seconds=6)
    index.add([videos])
    files = sorted(videos.glob("*.mp4"))
    retriever = index.retriever
    video = retriever.encode_video(files)
    text = retriever.encode_text(["a red dog"])
    scores = retriever.similarity(text, video)[0]
    for exhaustive in (False, True):
        answer = index.query("a red dog", exhaustive=exhaustive)
        found = {hit.path: hit.score for hit in answer}
        assert [found[str(file)] for file in files] == pytest.approx(scores.tolist(), abs=1e-3)
    assert len(index.similar(files[0])) == len(files)
    if "aggregation" in fields:
        export_segments(index, tmp_path / "out.npz")
        with np.load(tmp_path / "out.npz") as arrays:
            assert arrays["frames"].shape == (len(files), *video.frames.shape[1:])
            assert arrays["weights"].shape == video.weights.shape
        equal = retriever.similarity(text, video.replace(weights=np.zeros_like(video.weights)))[0]
        assert np.abs(equal - scores).max() > 1e-2
