"""Renders the demo's data set: H.264 clips of moving coloured shapes, with captions.

One shape moves ("a small red circle goes from left to right"), or two appear one after the other
("a small red circle is replaced by a big blue cross"). Every scene with a direction in time also
occurs mirrored in time, with exactly the same frames in the opposite order: no single frame and no
average of frames distinguishes the two. Shapes are also swapped between objects, so that the words
of a caption without their order do not suffice. Colours and shapes are few, so that clips which
differ only in motion or order often are in one batch.

The combinations of val and test (object and motion, or the two objects of a pair) do not occur in
train, but each of their colours, shapes and motions does, and most pairs of these.
"""

import functools
import itertools
import json
import os
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import av
import numpy as np
from av.error import FFmpegError
from jaxtyping import Float, UInt8

from xclip_jax.cli import InputError, progress
from xclip_jax.data.annotations import Split
from xclip_jax.workers import worker_pool

SIDE, FPS, SECONDS = 64, 8, 6  # the frames at 0, 1, ..., 5 s are what a reader samples
LAST = SECONDS - 1.0  # all motion ends here: a mirrored scene is mirrored around LAST / 2
RECIPE = 2  # to be increased when the same seed gives other videos or captions

COLOURS = {
    "red": (215, 35, 35),
    "yellow": (240, 210, 30),
    "green": (30, 150, 50),
    "blue": (45, 70, 225),
}
SHAPES = ("circle", "triangle", "cross")
RADII = {
    "small": 0.15,
    "medium": 0.21,
    "large": 0.27,
}  # of the side; captions do not mention medium
OPPOSITE = {
    **{"right": "left", "left": "right", "up": "down", "down": "up"},
    **{"grow": "shrink", "shrink": "grow", "still": "still"},
}
AXES = (("right", "left"), ("up", "down"), ("grow", "shrink"), ("still",))

SIZE_WORDS = {"small": ("small", "little"), "large": ("large", "big")}
SHAPE_WORDS = {shape: (shape,) for shape in SHAPES} | {"circle": ("circle", "disc")}
MOTION_WORDS = {
    "right": ("moves right", "slides to the right", "goes from left to right"),
    "left": ("moves left", "slides to the left", "goes from right to left"),
    "up": ("moves up", "rises", "goes from bottom to top"),
    "down": ("moves down", "falls", "goes from top to bottom"),
    "grow": ("grows", "gets bigger", "becomes larger"),
    "shrink": ("shrinks", "gets smaller", "becomes smaller"),
    "still": ("stays still", "does not move", "stays in place"),
}
TEMPLATES = {
    "motion": ("{a} {does_a}", "there is {a} that {does_a}", "in this clip {a} {does_a}"),
    "order": (
        "first {a} appears, then {b}",
        "{a} is shown and then {b}",
        "{a} is replaced by {b}",
        "{a} gives way to {b}",
    ),
}


@dataclass(frozen=True)
class Event:
    """The motion of one object.

    Attributes:
        colour, shape, size, motion: keys of the tables above.
        place: x and y of the centre, as fractions of the side; a motion overrides one of them.
        scale: factor of the radius. No caption mentions place, scale or tilt.
        tilt: radians.
    """

    colour: str
    shape: str
    size: str
    motion: str
    place: tuple[float, float] = (0.5, 0.5)
    scale: float = 1.0
    tilt: float = 0.0

    @property
    def colour_and_shape(self) -> tuple[str, str]:
        """The identity of the object."""
        return self.colour, self.shape


@dataclass(frozen=True)
class Scene:
    """A clip: one event of its full length, or two events of half its length each."""

    events: tuple[Event, ...]
    background: tuple[int, int, int] = (40, 40, 40)
    noise: int = 0  # seed of the background's noise
    captions: tuple[str, ...] = field(default=(), compare=False)

    @property
    def kind(self) -> str:
        """'motion' for one object, 'order' for two objects at rest."""
        return "motion" if len(self.events) == 1 else "order"

    @property
    def combination(self) -> tuple:
        """(colour, shape, motion) or the two objects, which occur in one split only."""
        if self.kind == "order":
            return tuple(event.colour_and_shape for event in self.events)
        return (*self.events[0].colour_and_shape, self.events[0].motion)


def mirror(scene: Scene) -> Scene:
    """Returns the scene reversed in time (the frame at t is that at LAST - t), without captions."""
    events = (replace(event, motion=OPPOSITE[event.motion]) for event in scene.events[::-1])
    return replace(scene, events=tuple(events), captions=())


def assign_split(scene: Scene) -> Split:
    """Returns the split of a scene's combination: test (3/8), val (1/8) or train."""
    colours = [event.colour for event in scene.events]
    shapes = [event.shape for event in scene.events]
    if scene.kind == "order":  # independent of which object has which shape
        number = _pair_number(colours, [*COLOURS]) + _pair_number(shapes, SHAPES)
    else:
        axis = next(i for i, axis in enumerate(AXES) if scene.events[0].motion in axis)
        number = list(COLOURS).index(colours[0]) + SHAPES.index(shapes[0]) + axis
    if number % 8 == 1:
        return "val"
    return "test" if number % 8 in (0, 3, 6) else "train"


def _pair_number(pair: Sequence[str], names: Sequence[str]) -> int:
    """Returns the index of the unordered pair among all of `names`."""
    pairs = map(list, itertools.combinations_with_replacement(names, 2))
    return list(pairs).index(sorted(pair, key=names.index))


def draw_scenes(split: Split, count: int, seed: int = 0) -> list[Scene]:
    """Returns the first `count` scenes of a split, each followed by its mirror.

    The same arguments give the same scenes, and a smaller count gives a prefix. Scenes of
    train have three captions, and some share captions; those of val and test have one, which
    describes no other scene.

    Raises:
      InputError: the split has fewer distinct scenes.
    """
    rng = random.Random(f"{split} {seed}")
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
            num_captions = 3 if split == "train" else 1
            scenes += [replace(v, captions=_draw_captions(v, num_captions, rng)) for v in variants]
    if len(scenes) < count:
        raise InputError(f"{count} {split} scenes requested, only {len(scenes)} are distinct")
    return scenes[:count]


def _draw_related_scenes(rng: random.Random) -> list[Scene]:
    """Returns scenes of one object, small and large, or of two objects and with shapes swapped."""
    colour, shape = rng.choice([*COLOURS]), rng.choice(SHAPES)
    if rng.choices(("motion", "order"))[0] == "order":
        (c1, s1), (c2, s2) = rng.sample([*itertools.product(COLOURS, SHAPES)], 2)
        swaps = dict.fromkeys([(s1, s2), (s2, s1)] if c1 != c2 else [(s1, s2)])
        size1, size2 = rng.choices(("small", "large"), k=2)
        return [
            Scene((Event(c1, a, size1, "still"), Event(c2, b, size2, "still"))) for a, b in swaps
        ]
    motion, *_ = rng.choice(AXES)
    sizes = ("medium",) if motion == "grow" else ("small", "large")
    return [Scene((Event(colour, shape, size, motion),)) for size in sizes]


def _draw_variants(scene: Scene, rng: random.Random) -> Iterable[Scene]:
    """Returns the scene with another place and background, and its mirror."""
    events = tuple(
        replace(
            event,
            place=(rng.uniform(0.36, 0.64), rng.uniform(0.36, 0.64)),
            scale=rng.uniform(0.92, 1.08),
            tilt=rng.uniform(-0.15, 0.15),
        )
        for event in scene.events
    )
    grey = rng.choice((rng.randint(15, 65), rng.randint(180, 225)))
    background = tuple(grey + rng.randint(-12, 12) for _ in range(3))
    scene = replace(scene, events=events, background=background, noise=rng.randrange(1 << 30))
    return dict.fromkeys((scene, mirror(scene)))  # one object at rest is its own mirror


def _draw_captions(scene: Scene, count: int, rng: random.Random) -> tuple[str, ...]:
    captions: dict[str, None] = {}
    while len(captions) < count:
        captions[_draw_caption(scene, rng)] = None
    return tuple(captions)


def _draw_caption(scene: Scene, rng: random.Random) -> str:
    words = {}
    for letter, event in zip("ab", scene.events, strict=False):
        size = rng.choice(SIZE_WORDS.get(event.size, ("",)))
        thing = f"a {size} {event.colour} {rng.choice(SHAPE_WORDS[event.shape])}"
        words[letter] = " ".join(thing.split())
        words[f"does_{letter}"] = rng.choice(MOTION_WORDS[event.motion])
    return rng.choice(TEMPLATES[scene.kind]).format(**words)


def render_frame(scene: Scene, time: float) -> UInt8[np.ndarray, "S S 3"]:
    """Returns the image of the scene at `time` seconds, RGB, S = SIDE."""
    event, phase = _event_at(scene, min(max(time, 0.0), LAST))
    x, y, radius = _position(event, phase)
    centres = (np.arange(SIDE) + 0.5) / SIDE
    right, down = centres[None, :] - x, centres[:, None] - y
    cos, sin = np.cos(event.tilt), np.sin(event.tilt)
    distance = _distance(event.shape, right * cos + down * sin, down * cos - right * sin, radius)
    cover = np.clip(0.5 - distance * SIDE, 0, 1)[..., None]  # an edge one pixel wide
    background = _render_background(scene.background, scene.noise)
    return np.rint(background + cover * (COLOURS[event.colour] - background)).astype(np.uint8)


def _event_at(scene: Scene, time: float) -> tuple[Event, float]:
    """Returns the event at a time and its phase from 0 to 1 (two events take half each)."""
    if len(scene.events) == 1:
        return scene.events[0], time / LAST
    span = (LAST - 1) / 2
    if time < LAST / 2:
        return scene.events[0], min(time / span, 1.0)
    return scene.events[1], max(1.0 - (LAST - time) / span, 0.0)


def _position(event: Event, phase: float) -> tuple[float, float, float]:
    """Returns x, y (downwards) and radius as fractions of the side, moving border to border."""
    radius = RADII[event.size] * event.scale
    if event.motion in ("left", "up", "shrink"):
        phase = 1.0 - phase
    if event.motion in ("grow", "shrink"):
        return *event.place, event.scale * (0.09 + 0.26 * phase)
    along = radius + phase * (1 - 2 * radius)
    x, y = event.place
    if event.motion in ("right", "left"):
        return along, y, radius
    return (x, along, radius) if event.motion in ("up", "down") else (x, y, radius)


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


def render_video(scene: Scene, path: str | os.PathLike) -> None:
    """Writes the scene as an MP4 (H.264) file, atomically and with deterministic bytes.

    Raises:
      OSError: the file cannot be written.
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        _encode(scene, partial)
        os.replace(partial, path)
    except FFmpegError as error:  # which cannot be pickled
        raise OSError(f"{path}: {error}") from None
    finally:
        partial.unlink(missing_ok=True)


def _encode(scene: Scene, path: Path) -> None:
    # x264's macroblock tree reads uninitialised memory on such small frames: bytes would vary.
    options = {"crf": "12", "preset": "veryfast", "x264-params": "mbtree=0"}
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FPS, options=options)
        stream.width = stream.height = SIDE
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1  # for the same bytes every time
        for number in range(SECONDS * FPS):
            image = av.VideoFrame.from_ndarray(render_frame(scene, number / FPS), format="rgb24")
            container.mux(stream.encode(image))
        container.mux(stream.encode())


def render_dataset(
    folder: str | os.PathLike,
    *,
    num_train: int = 4000,
    num_val: int = 60,
    num_test: int = 220,
    seed: int = 0,
) -> Path:
    """Renders the data set on all cores unless it exists, and returns its folder.

    Writes `videos/train_00000.mp4`, ... and finally `captions.jsonl`, one line per video:
    {"video": "train_00000.mp4", "captions": [...], "split": "train"}. A run that was killed
    resumes with the missing videos.

    Raises:
      InputError: the folder holds a data set rendered with other arguments.
    """
    folder = Path(folder)
    counts: dict[Split, int] = {"train": num_train, "val": num_val, "test": num_test}
    _check_arguments(folder, {**counts, "seed": seed, "recipe": RECIPE})
    listing = folder / "captions.jsonl"
    if listing.exists():
        return folder
    missing, lines = {}, []
    for split, count in counts.items():
        for number, scene in enumerate(draw_scenes(split, count, seed)):
            path = folder / "videos" / f"{split}_{number:05d}.mp4"
            if not path.exists():
                missing[path] = scene
            lines.append({"video": path.name, "captions": scene.captions, "split": split})
    with worker_pool(len(missing) // 8 + 1) as pool:
        rendered = pool.map(render_video, missing.values(), missing, chunksize=8)
        with progress(len(missing), "rendering videos", "clip") as bar:
            for _ in rendered:
                bar.update()
    _write(listing, "".join(json.dumps(line) + "\n" for line in lines))
    return folder


def _check_arguments(folder: Path, arguments: dict[str, int]) -> None:
    """Stores the arguments, or raises InputError if the folder was rendered with others."""
    path = folder / "rendered.json"
    if not path.exists():
        (folder / "videos").mkdir(parents=True, exist_ok=True)
        _write(path, json.dumps(arguments) + "\n")
    if (stored := json.loads(path.read_text(encoding="utf-8"))) != arguments:
        raise InputError(
            f"{folder} was rendered with {stored}, not {arguments}: delete it or choose another"
        )


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
