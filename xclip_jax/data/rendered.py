"""Renders the demo's data set: H.264 clips of moving coloured shapes, with captions.

One shape moves, or two appear one after the other; `scenes` has the sentences about them. Every
scene with a direction in time also occurs mirrored in time, with exactly the same frames in the
opposite order: no single frame and no average of frames distinguishes the two. Shapes are also
swapped between objects, so that the words of a caption without their order do not suffice. Colours
and shapes are few, so that clips which differ only in motion or order often are in one batch. The
combinations of val and test (object and motion, or two objects) do not occur in train, but each of
their colours, shapes and motions does.
"""

import functools
import io
import itertools
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
from jaxtyping import Float, UInt8

from xclip_jax.cli import InputError, PathLike, progress, write_atomically
from xclip_jax.data.annotations import Split
from xclip_jax.data.scenes import (
    AXES,
    COLOURS,
    RADII,
    SHAPES,
    Event,
    Scene,
    draw_captions,
    draw_sentence,
    fits,
    mirror,
)
from xclip_jax.workers import worker_pool

SIDE, FPS, SECONDS = 64, 8, 6  # the frames at 0, 1, ..., 5 s are what a reader samples
LAST = SECONDS - 1.0  # all motion ends here: a mirrored scene is mirrored around LAST / 2
RECIPE = 5  # to be increased when the same seed gives other videos or captions

_PAIRS_OF_COLOURS = [*map(list, itertools.combinations_with_replacement(range(len(COLOURS)), 2))]
_PAIRS_OF_SHAPES = [*map(list, itertools.combinations_with_replacement(range(len(SHAPES)), 2))]


def assign_split(scene: Scene) -> Split:
    """Returns the split of a scene's combination: test (1/4), val (1/8) or train."""
    colours = sorted(list(COLOURS).index(event.colour) for event in scene.events)
    shapes = sorted(SHAPES.index(event.shape) for event in scene.events)
    if scene.kind == "order":  # independent of which object has which shape
        number = _PAIRS_OF_COLOURS.index(colours) + _PAIRS_OF_SHAPES.index(shapes)
    else:
        axis = next(i for i, axis in enumerate(AXES) if scene.events[0].motion in axis)
        number = colours[0] + shapes[0] + axis
    if number % 8 == 1:
        return "val"
    return "test" if number % 8 in (3, 6) else "train"


def draw_scenes(split: Split, count: int, seed: int = 0) -> list[Scene]:
    """Returns the first `count` scenes of a split, each followed by its mirror.

    Scenes of train have four full and two short captions, and some share captions. Those of val
    and test have a full one, which fits no other scene. Raises InputError if the split has fewer
    than `count` scenes.
    """
    rng, caption_rng = random.Random(f"{split} {seed}"), random.Random(f"{split} {seed} captions")
    kinds = [False, True, False] * 2 if split == "train" else [False]  # True: short
    scenes: list[Scene] = []
    described: set[Scene] = set()
    for _ in range(100 * count if split == "train" else 30_000):  # val and test are limited
        if len(scenes) >= count:
            break
        related = _draw_related_scenes(rng)
        if assign_split(related[0]) != split:
            continue
        if split == "train" or described.isdisjoint(related):
            described.update(s for scene in related for s in (scene, mirror(scene)))
            variants = [v for scene in related for v in _draw_variants(scene, rng)]
            captions = (draw_captions(variant, kinds, caption_rng) for variant in variants)
            scenes += [replace(v, captions=c) for v, c in zip(variants, captions, strict=True)]
    if len(scenes) < count:
        raise InputError(f"{count} {split} scenes requested, only {len(scenes)} are distinct")
    return scenes[:count]


def draw_queries(scenes: Sequence[Scene], seed: int = 0) -> dict[str, list[int]]:
    """Returns {short sentence: indices of all scenes it fits}, as many sentences as scenes."""
    rng = random.Random(f"queries {seed}")
    queries: dict[str, list[int]] = {}
    for number, scene in enumerate(scenes, 1):
        while len(queries) < number:
            sentence = draw_sentence(scene, rng, short=True)
            queries[sentence.text] = [i for i, one in enumerate(scenes) if fits(sentence, one)]
    return queries


def _draw_related_scenes(rng: random.Random) -> list[Scene]:
    """Returns scenes of one object, small and large, or of two objects and with shapes swapped."""
    colour, shape = rng.choice([*COLOURS]), rng.choice(SHAPES)
    if rng.choices(("motion", "order"))[0] == "order":
        (c1, s1), (c2, s2) = rng.sample([*itertools.product(COLOURS, SHAPES)], 2)
        swaps = dict.fromkeys([(s1, s2), (s2, s1)] if c1 != c2 else [(s1, s2)])
        first, second = rng.choices(("small", "large"), k=2)
        events = [(Event(c1, a, first, "still"), Event(c2, b, second, "still")) for a, b in swaps]
        return list(map(Scene, events))
    motion, *_ = rng.choice(AXES)
    sizes = ("medium",) if motion == "grow" else ("small", "large")
    return [Scene((Event(colour, shape, size, motion),)) for size in sizes]


def _draw_variants(scene: Scene, rng: random.Random) -> Iterable[Scene]:
    """Returns the scene with another place and background, and its mirror."""
    events = []
    for event in scene.events:
        place = (rng.uniform(0.45, 0.55), rng.uniform(0.45, 0.55))
        scale, tilt = rng.uniform(0.92, 1.08), rng.uniform(-0.15, 0.15)
        events.append(replace(event, place=place, scale=scale, tilt=tilt))
    grey = rng.choice((rng.randint(15, 65), rng.randint(180, 225)))
    background = tuple(grey + rng.randint(-12, 12) for _ in range(3))
    noise = rng.randrange(1 << 30)
    scene = replace(scene, events=tuple(events), background=background, noise=noise)
    return dict.fromkeys((scene, mirror(scene)))  # one object at rest is its own mirror


def render_frame(scene: Scene, time: float) -> UInt8[np.ndarray, "S S 3"]:
    """Returns the image of the scene at `time` seconds, RGB, S = SIDE."""
    time = min(max(time, 0.0), LAST)
    event, phase = scene.events[0], time / LAST
    if scene.kind == "order":  # two events take half each
        span = (LAST - 1) / 2
        phase = min(time / span, 1.0)
        if time >= LAST / 2:
            event, phase = scene.events[1], max(1.0 - (LAST - time) / span, 0.0)
    if event.motion in ("left", "up", "shrink"):
        phase = 1.0 - phase
    (x, y), radius = event.place, RADII[event.size] * event.scale
    along = radius + phase * (1 - 2 * radius)  # from border to border; y points down
    if event.motion in AXES[0]:
        x = along
    elif event.motion in AXES[1]:
        y = along
    elif event.motion in AXES[2]:
        radius = event.scale * (0.09 + 0.26 * phase)
    centres = (np.arange(SIDE) + 0.5) / SIDE
    right, down = centres[None, :] - x, centres[:, None] - y
    cos, sin = np.cos(event.tilt), np.sin(event.tilt)
    distance = _distance(event.shape, right * cos + down * sin, down * cos - right * sin, radius)
    cover = np.clip(0.5 - distance * SIDE, 0, 1)[..., None]  # an edge one pixel wide
    background = _render_background(scene.background, scene.noise)
    return np.rint(background + cover * (COLOURS[event.colour] - background)).astype(np.uint8)


def _distance(
    shape: str, x: Float[np.ndarray, "S S"], y: Float[np.ndarray, "S S"], radius: float
) -> Float[np.ndarray, "S S"]:
    """Returns the signed distance from the outline, negative inside (a lower bound at corners)."""
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "triangle":  # point up; y points down
        slopes = np.sqrt(0.8) * abs(x) - np.sqrt(0.2) * (y + 1.05 * radius)
        return np.maximum(slopes, y - 0.9 * radius)
    bar = 0.33 * radius
    upright = np.maximum(abs(x) - bar, abs(y) - 1.05 * radius)
    return np.minimum(upright, np.maximum(abs(y) - bar, abs(x) - 1.05 * radius))


@functools.lru_cache(maxsize=4)
def _render_background(background: tuple[int, int, int], noise: int) -> Float[np.ndarray, "S S 3"]:
    rng = np.random.default_rng(noise)
    ramp = np.linspace(-15, 15, SIDE)
    slopes = rng.uniform(-1, 1) * ramp[None, :, None] + rng.uniform(-1, 1) * ramp[:, None, None]
    grain = rng.normal(0, rng.uniform(0, 4), (SIDE, SIDE, 1))
    return np.clip(background + slopes / 2 + grain, 0, 255)


def render_video(scene: Scene, path: PathLike) -> None:
    """Writes the scene as an MP4 (H.264) file, atomically and with deterministic bytes."""
    # x264's macroblock tree reads uninitialised memory on such small frames: bytes would vary.
    options = {"crf": "12", "preset": "veryfast", "x264-params": "mbtree=0"}
    content = io.BytesIO()
    with av.open(content, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FPS, options=options)
        stream.width = stream.height = SIDE
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1  # for the same bytes every time
        for number in range(SECONDS * FPS):
            image = av.VideoFrame.from_ndarray(render_frame(scene, number / FPS), format="rgb24")
            container.mux(stream.encode(image))
        container.mux(stream.encode())
    write_atomically(path, content.getvalue())


def check_recipe(folder: Path, advice: str) -> None:
    """Raises InputError with `advice` if the folder holds a data set of another recipe."""
    settings = folder / "rendered.json"
    recipe = json.loads(settings.read_bytes())["recipe"] if settings.exists() else RECIPE
    if recipe != RECIPE:
        problem = f"{folder} was rendered by another version (recipe {recipe}, not {RECIPE})"
        raise InputError(f"{problem}: {advice}")


def render_dataset(
    folder: Path, *, num_train: int = 4000, num_val: int = 60, num_test: int = 220, seed: int = 0
) -> Path:
    """Renders the data set on all cores unless it exists, and returns its folder.

    Writes `videos/train_00000.mp4`, ..., `short_queries.jsonl`, one line per short sentence with
    all videos of the test split that it fits, and finally `captions.jsonl`, one line per video. A
    run that was killed resumes with the missing videos. Raises InputError if the arguments changed.
    """
    listing, settings = folder / "captions.jsonl", folder / "rendered.json"
    counts: dict[Split, int] = {"train": num_train, "val": num_val, "test": num_test}
    arguments = {**counts, "seed": seed, "recipe": RECIPE}
    if not settings.exists():
        (folder / "videos").mkdir(parents=True, exist_ok=True)
        write_atomically(settings, json.dumps(arguments) + "\n")
    if (stored := json.loads(settings.read_bytes())) != arguments:
        problem = f"{folder} was rendered with {stored}, not {arguments}"
        raise InputError(f"{problem}: delete it or choose another")
    if listing.exists():
        return folder
    missing, lines = {}, []
    for split, count in counts.items():
        scenes = draw_scenes(split, count, seed)
        for number, scene in enumerate(scenes):
            path = folder / "videos" / f"{split}_{number:05d}.mp4"
            if not path.exists():
                missing[path] = scene
            line = {"video": path.name, "captions": scene.captions, "split": split}
            lines.append(json.dumps(line) + "\n")
    queries = []
    for text, numbers in draw_queries(scenes, seed).items():  # of test, the last split
        line = {"text": text, "videos": [f"test_{number:05d}.mp4" for number in numbers]}
        queries.append(json.dumps(line) + "\n")
    write_atomically(folder / "short_queries.jsonl", "".join(queries))
    bar = progress(len(missing), "rendering videos", "clip")
    with worker_pool(len(missing) // 8 + 1) as pool, bar:
        for _ in pool.map(render_video, missing.values(), missing, chunksize=8):
            bar.update()
    write_atomically(listing, "".join(lines))
    return folder
