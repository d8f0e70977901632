"""Tests of the demo's data: videos match captions, and test does not overlap with train."""

import hashlib
import json
import random
from dataclasses import replace

import av
import numpy as np
import pytest

from xclip_jax import config, prepare
from xclip_jax.cli import InputError
from xclip_jax.data import builder, rendered, scenes
from xclip_jax.data.preprocess import FrameFormat

COUNTS = {"train": 4000, "val": 60, "test": 220}


@pytest.fixture(scope="module")
def drawn():
    return {split: rendered.draw_scenes(split, count) for split, count in COUNTS.items()}


def decode(path):
    """Returns the frames at 0, 1, ..., 5 s."""
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    assert len(frames) == rendered.SECONDS * rendered.FPS
    seconds = [frame for frame in frames if float(frame.time).is_integer()]
    assert [frame.time for frame in seconds] == [0, 1, 2, 3, 4, 5]
    return [frame.to_ndarray(format="rgb24").astype(float) for frame in seconds]


def object_mask(image, colour):
    """Returns True where the colour is nearer than all others and the background."""
    corners = np.median(np.stack([image[0, 0], image[0, -1], image[-1, 0], image[-1, -1]]), axis=0)
    palette = np.array([*rendered.COLOURS.values(), corners], float)
    nearest = np.argmin(((image[:, :, None] - palette) ** 2).sum(-1), axis=-1)
    return nearest == list(rendered.COLOURS).index(colour)


def single(colour, shape, size, motion):
    look = {"background": (30, 25, 35), "noise": 7}
    return rendered.Scene((rendered.Event(colour, shape, size, motion),), **look)


def looks(scene):
    """Returns the attributes that captions mention."""
    return tuple((event.colour, event.shape, event.size, event.motion) for event in scene.events)


def combination(scene):
    """Returns (colour, shape, motion) of one object, or the (colour, shape) of two."""
    objects = tuple((event.colour, event.shape) for event in scene.events)
    return objects if scene.kind == "order" else (*objects[0], scene.events[0].motion)


def test_no_combination_is_in_two_splits_and_all_attributes_are_in_train(drawn):
    combinations = {
        split: {combination(scene) for scene in found} for split, found in drawn.items()
    }
    for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
        assert not combinations[one] & combinations[other], (one, other)
    backwards = {combination(scene)[::-1] for scene in drawn["train"] if len(scene.events) == 2}
    assert not backwards & combinations["test"]  # not even in the other order
    trained = {event for scene in drawn["train"] for event in looks(scene)}
    for attributes in ((0,), (1,), (2,), (3,), (0, 1), (0, 3), (1, 3)):
        seen = {tuple(event[i] for i in attributes) for event in trained}
        for scene in drawn["test"]:
            assert all(tuple(event[i] for i in attributes) in seen for event in looks(scene))


@pytest.mark.parametrize("split", ["val", "test"])
def test_evaluation_captions_fit_one_scene(drawn, split):
    found = drawn[split]
    assert len({scene.captions[0] for scene in found}) == len(found) == COUNTS[split]
    assert len({looks(scene) for scene in found}) == len(found)
    for scene in found:
        sentence = scenes.draw_sentence(scene, random.Random(0))
        assert [one for one in found if scenes.fits(sentence, one)] == [scene]


def test_scenes_of_train_have_full_and_short_captions(drawn):
    for scene in drawn["train"]:
        assert len(set(scene.captions)) == 6
        assert all(len(caption.replace(",", " ,").split()) <= 20 for caption in scene.captions)
    assert all(len(scene.captions) == 1 for scene in drawn["val"] + drawn["test"])


@pytest.mark.parametrize("split", ["val", "test"])
def test_evaluation_scenes_include_their_mirrors(drawn, split):
    found = set(drawn[split])
    with_twin = [scene for scene in found if rendered.mirror(scene) in found - {scene}]
    assert len(with_twin) >= 0.9 * len(found)


def test_mirror_has_the_same_frames_in_reverse(drawn):
    for scene in drawn["test"][:40]:
        for time in range(6):
            there = rendered.render_frame(scene, time).astype(int)
            back = rendered.render_frame(rendered.mirror(scene), 5 - time)
            assert np.abs(there - back).max() <= 1  # rounding


def test_evaluation_pairs_occur_with_shapes_swapped(drawn):
    pairs = {combination(scene) for scene in drawn["test"] if len(scene.events) == 2}
    swappable = [pair for pair in pairs if all(a != b for a, b in zip(*pair, strict=True))]
    assert swappable
    for (c1, s1), (c2, s2) in swappable:
        assert ((c1, s2), (c2, s1)) in pairs


def test_scenes_are_deterministic(drawn):
    again = rendered.draw_scenes("test", 60)
    assert again == drawn["test"][:60]
    assert [s.captions for s in again] == [s.captions for s in drawn["test"][:60]]
    assert rendered.draw_scenes("test", 60, seed=1) != again
    assert rendered.draw_scenes("val", 0) == []


def test_more_scenes_than_are_distinct_is_an_error():
    with pytest.raises(InputError, match="9999 val scenes"):
        rendered.draw_scenes("val", 9999)


@pytest.mark.parametrize(
    ("motion", "sign_x", "sign_y"),
    [("right", 1, 0), ("left", -1, 0), ("up", 0, -1), ("down", 0, 1), ("still", 0, 0)],
)
def test_object_moves_as_captioned(tmp_path, motion, sign_x, sign_y):
    rendered.render_video(single("red", "cross", "small", motion), tmp_path / "a.mp4")
    masks = [object_mask(image, "red") for image in decode(tmp_path / "a.mp4")]
    y, x = np.array([np.argwhere(mask).mean(axis=0) for mask in masks]).T
    for track, sign in ((x, sign_x), (y, sign_y)):
        steps = np.diff(track)
        assert np.all(steps * sign > 4) if sign else np.all(np.abs(steps) < 0.5), track


@pytest.mark.parametrize("shape", rendered.SHAPES)
def test_object_grows_and_shrinks(tmp_path, shape):
    for motion, sign in (("grow", 1), ("shrink", -1)):
        rendered.render_video(single("green", shape, "medium", motion), tmp_path / "a.mp4")
        areas = [object_mask(image, "green").sum() for image in decode(tmp_path / "a.mp4")]
        assert np.all(np.diff(areas) * sign > 20), (motion, areas)


def test_shapes_and_sizes_are_distinguishable():
    def area(shape, size):
        scene = single("red", shape, size, "still")
        return object_mask(rendered.render_frame(scene, 0).astype(float), "red")

    for shape in rendered.SHAPES:
        assert area(shape, "large").sum() > 2.5 * area(shape, "small").sum()
    for one in rendered.SHAPES:
        for other in rendered.SHAPES:
            if one < other:
                a, b = area(one, "small"), area(other, "small")
                assert (a ^ b).sum() > 0.15 * (a | b).sum(), (one, other)


@pytest.mark.parametrize("background", [(20, 25, 30), (215, 220, 210)])
def test_colours_are_preserved_and_in_order(tmp_path, background):
    names = list(rendered.COLOURS)
    for first, second in zip(names, names[1:] + names[:1], strict=True):
        a = rendered.Event(first, "circle", "medium", "still")
        b = rendered.Event(second, "cross", "medium", "still")
        rendered.render_video(rendered.Scene((a, b), background, 3), tmp_path / "a.mp4")
        for second_of_clip, image in enumerate(decode(tmp_path / "a.mp4")):
            seen = max(names, key=lambda name: object_mask(image, name).sum())
            assert seen == (first if second_of_clip < 3 else second)


def test_same_scene_gives_the_same_bytes(tmp_path, drawn):
    scene = drawn["test"][0]
    for name in "ab":
        rendered.render_video(scene, tmp_path / name)
    rendered.render_video(replace(scene, noise=scene.noise + 1), tmp_path / "c")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (tmp_path / "a").read_bytes() != (tmp_path / "c").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]


def test_many_scenes_give_the_same_bytes_every_time(tmp_path, drawn):
    def digests():
        for scene in drawn["train"][:100]:
            rendered.render_video(scene, tmp_path / "a")
            yield hashlib.sha256((tmp_path / "a").read_bytes()).hexdigest()

    assert list(digests()) == list(digests()) == list(digests())


def test_rendering_resumes_with_missing_videos(tmp_path):
    arguments = {"num_train": 6, "num_val": 2, "num_test": 4, "seed": 3}
    directory = rendered.render_dataset(tmp_path / "set", **arguments)
    listing = directory / "captions.jsonl"
    text = listing.read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert all(set(line) == {"video", "captions", "split"} for line in lines)
    assert [line["split"] for line in lines] == ["train"] * 6 + ["val"] * 2 + ["test"] * 4
    assert lines[0]["video"] == "train_00000.mp4"
    assert lines[-1]["captions"] == list(rendered.draw_scenes("test", 4, seed=3)[-1].captions)
    queries = [*map(json.loads, (directory / "short_queries.jsonl").read_text().splitlines())]
    assert len({query["text"] for query in queries}) == 4
    assert {video for query in queries for video in query["videos"]} <= {
        line["video"] for line in lines[-4:]
    }
    videos = {path.name: path for path in (directory / "videos").iterdir()}
    assert set(videos) == {line["video"] for line in lines}

    written = {name: path.stat().st_mtime_ns for name, path in videos.items()}
    gone = videos["val_00001.mp4"].read_bytes()
    videos["val_00001.mp4"].unlink()
    listing.unlink()
    rendered.render_dataset(directory, **arguments)
    again = {name: path.stat().st_mtime_ns for name, path in videos.items()}
    assert {name for name in written if again[name] != written[name]} == {"val_00001.mp4"}
    assert videos["val_00001.mp4"].read_bytes() == gone
    assert listing.read_text() == text

    with pytest.raises(InputError, match=r"'seed': 3.*'seed': 4"):
        rendered.render_dataset(directory, **(arguments | {"seed": 4}))


def test_failed_rendering_names_the_file(tmp_path):
    with pytest.raises(OSError, match=r"nowhere/a\.mp4"):
        rendered.render_video(
            single("red", "circle", "small", "still"), tmp_path / "nowhere" / "a.mp4"
        )


def test_rendered_data_has_the_format_of_the_model(tmp_path, monkeypatch):
    run, calls = config.get_config(), []
    run.data.update(path=str(tmp_path / "data"), rendered=6)
    run.model.vision.image_size = 64
    run.model.preprocess.update(resize="squash", interpolation="bilinear")
    monkeypatch.setattr(prepare, "prepare_rendered", lambda *a, **k: calls.append((a, k)))
    prepare.render_if_missing(run)
    format = FrameFormat(64, "squash", "bilinear")
    assert calls == [((tmp_path / "data", format), {"num_train": 6})]


def test_data_of_another_recipe_is_refused_even_if_it_is_prepared(tmp_path):
    run = config.get_config()
    run.data.update(path=str(tmp_path / "data"), rendered=6)
    builder.dataset_folder(run.data.path).mkdir(parents=True)
    prepare.render_if_missing(run)  # rendered elsewhere
    settings = tmp_path / "data/scenes/rendered.json"
    settings.parent.mkdir()
    settings.write_text(json.dumps({"seed": 0, "recipe": rendered.RECIPE}))
    prepare.render_if_missing(run)
    settings.write_text(json.dumps({"seed": 0, "recipe": 2}))
    with pytest.raises(InputError, match=r"recipe 2, not 5\): delete .*data or set another config"):
        prepare.render_if_missing(run)
