"""The demo's data: short clips of moving coloured shapes, rendered, encoded to H.264, captioned.

One shape moves ("a small red circle goes from left to right"), or two show up one after the other
("a small red circle is replaced by a big blue cross"). Every scene that has a direction in time
comes with its mirror in time, which has exactly the same frames in the opposite order: no single
frame and no average of frames tells the two apart. Who wears which shape is also swapped, so that
the words of a caption regardless of their order do not suffice. Colours and shapes are few, so that
clips which differ in motion or order alone often meet in a batch.

The combinations of val and test (object and motion; the two objects of a pair) are left out of
training; every colour, shape, motion and most pairs of them are in it.
"""

import functools
import itertools
import json
import os
import random
from dataclasses import dataclass, field, replace
from pathlib import Path

import av
import numpy as np

from xclip_jax.cli import InputError, progress
from xclip_jax.workers import worker_pool

SIDE, FPS, SECONDS = 64, 8, 6  # the frames at 0, 1, ..., 5 s are what a reader samples
LAST = SECONDS - 1.0  # all motion ends here, so that time mirrors around LAST / 2
RECIPE = 2  # raise it when the same seed gives other videos or captions

COLOURS = {
    "red": (215, 35, 35),
    "yellow": (240, 210, 30),
    "green": (30, 150, 50),
    "blue": (45, 70, 225),
}
SHAPES = ("circle", "triangle", "cross")
RADII = {"small": 0.15, "medium": 0.21, "large": 0.27}  # of the side; only medium goes unsaid
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
    """What one object does; `place`, `scale` and `tilt` are what no caption tells."""

    colour: str
    shape: str
    size: str
    motion: str
    place: tuple[float, float] = (0.5, 0.5)  # x, y in sides; a motion overrides one of them
    scale: float = 1.0
    tilt: float = 0.0  # radians

    @property
    def object(self) -> tuple[str, str]:
        return self.colour, self.shape


@dataclass(frozen=True)
class Scene:
    """One clip: one event over its whole length, or two of half of it each."""

    events: tuple[Event, ...]
    background: tuple[int, int, int] = (40, 40, 40)
    noise: int = 0  # seeds the background's grain
    captions: tuple[str, ...] = field(default=(), compare=False)

    @property
    def kind(self) -> str:
        """'motion' (one object) or 'order' (two objects at rest)."""
        return "motion" if len(self.events) == 1 else "order"

    @property
    def combination(self) -> tuple:
        """What is shared with no other split: (colour, shape, motion), or the two objects."""
        if self.kind == "order":
            return tuple(event.object for event in self.events)
        return (*self.events[0].object, self.events[0].motion)


def mirror(scene: Scene) -> Scene:
    """The scene backwards: its frame at t is the given one's at LAST - t. Has no captions yet."""
    backwards = (replace(event, motion=OPPOSITE[event.motion]) for event in scene.events[::-1])
    return replace(scene, events=tuple(backwards), captions=())


# Which scenes there are, and whose


def split_of(scene: Scene) -> str:
    """The split that owns the scene's combination: three eighths are test's, an eighth val's."""
    colours, shapes = zip(*(event.object for event in scene.events), strict=True)
    if scene.kind == "order":  # blind to who wears which shape
        number = _pair_number(colours, list(COLOURS)) + _pair_number(shapes, SHAPES)
    else:
        axis = next(i for i, axis in enumerate(AXES) if scene.events[0].motion in axis)
        number = list(COLOURS).index(colours[0]) + SHAPES.index(shapes[0]) + axis
    return {0: "test", 3: "test", 6: "test", 1: "val"}.get(number % 8, "train")


def _pair_number(pair, names):
    pairs = itertools.combinations_with_replacement(names, 2)
    return list(pairs).index(tuple(sorted(pair, key=names.index)))


# Drawing scenes and words


def scenes(split: str, count: int, seed: int = 0) -> list[Scene]:
    """The first `count` scenes of a split ('train', 'val' or 'test'), a mirror after its original.

    Pure: the same arguments give the same scenes, and a smaller count a prefix. Scenes of train
    have three captions, and some say the same; those of val and test have one, which fits no other.

    Raises:
      InputError: an unknown split, or more scenes than val or test can tell apart.
    """
    if split not in ("train", "val", "test"):
        raise InputError(f"split = {split!r}, must be train, val or test")
    rng = random.Random(f"{split} {seed}")
    found, said = [], set()
    for _ in range(100 * count if split == "train" else 30_000):  # val and test can run out
        if len(found) >= count:
            break
        family = _family(rng)
        if split_of(family[0]) != split:
            continue
        if split == "train" or said.isdisjoint(family):
            said.update(way for scene in family for way in (scene, mirror(scene)))
            ways = [way for scene in family for way in _ways(scene, rng)]
            many = 3 if split == "train" else 1
            found += [replace(way, captions=_captions(way, many, rng)) for way in ways]
    if len(found) < count:
        raise InputError(f"{count} {split} scenes asked for, only {len(found)} distinct ones found")
    return found[:count]


def _family(rng):
    """One object, small and large; or two, and the same with their shapes swapped."""
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


def _ways(scene, rng):
    """The same scene as far as words go, elsewhere and before another background; its mirror."""
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
    return dict.fromkeys((scene, mirror(scene)))  # at rest, alone, it is its own mirror


def _captions(scene, count, rng) -> tuple[str, ...]:
    found = {}
    while len(found) < count:
        found[_caption(scene, rng)] = None
    return tuple(found)


def _caption(scene, rng):
    words = {}
    for letter, event in zip("ab", scene.events, strict=False):
        size = rng.choice(SIZE_WORDS.get(event.size, ("",)))
        thing = f"a {size} {event.colour} {rng.choice(SHAPE_WORDS[event.shape])}"
        words[letter] = " ".join(thing.split())
        words[f"does_{letter}"] = rng.choice(MOTION_WORDS[event.motion])
    return rng.choice(TEMPLATES[scene.kind]).format(**words)


# Pixels


def frame(scene: Scene, time: float) -> np.ndarray:
    """The scene at `time` seconds: SIDE x SIDE x 3, uint8."""
    event, progress = _now(scene, min(max(time, 0.0), LAST))
    x, y, radius = _pose(event, progress)
    centres = (np.arange(SIDE) + 0.5) / SIDE
    right, down = centres[None, :] - x, centres[:, None] - y
    cos, sin = np.cos(event.tilt), np.sin(event.tilt)
    away = _distance(event.shape, right * cos + down * sin, down * cos - right * sin, radius)
    cover = np.clip(0.5 - away * SIDE, 0, 1)[..., None]  # one pixel wide edge
    backdrop = _backdrop(scene.background, scene.noise)
    return np.rint(backdrop + cover * (COLOURS[event.colour] - backdrop)).astype(np.uint8)


def _now(scene, time):
    """The event under way and how far it has come, 0 to 1. Each of two has three whole seconds."""
    if len(scene.events) == 1:
        return scene.events[0], time / LAST
    span = (LAST - 1) / 2
    if time < LAST / 2:
        return scene.events[0], min(time / span, 1.0)
    return scene.events[1], max(1.0 - (LAST - time) / span, 0.0)


def _pose(event, progress):
    """x, y and radius in sides. A way leads from border to border, and y points down."""
    radius = RADII[event.size] * event.scale
    if event.motion in ("left", "up", "shrink"):
        progress = 1.0 - progress
    if event.motion in ("grow", "shrink"):
        return *event.place, event.scale * (0.09 + 0.26 * progress)
    along = radius + progress * (1 - 2 * radius)
    x, y = event.place
    if event.motion in ("right", "left"):
        return along, y, radius
    return (x, along, radius) if event.motion in ("up", "down") else (x, y, radius)


def _distance(shape, x, y, radius):
    """Signed distance from the outline, negative inside (a lower bound outside corners)."""
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "triangle":  # point up; y points down
        slopes = np.sqrt(0.8) * abs(x) - np.sqrt(0.2) * (y + 1.05 * radius)
        return np.maximum(slopes, y - 0.9 * radius)
    bar = 0.33 * radius
    upright = np.maximum(abs(x) - bar, abs(y) - 1.05 * radius)
    return np.minimum(upright, np.maximum(abs(y) - bar, abs(x) - 1.05 * radius))


@functools.lru_cache(maxsize=4)
def _backdrop(background, noise):
    rng = np.random.default_rng(noise)
    ramp = np.linspace(-15, 15, SIDE)
    slopes = rng.uniform(-1, 1) * ramp[None, :, None] + rng.uniform(-1, 1) * ramp[:, None, None]
    grain = rng.normal(0, rng.uniform(0, 4), (SIDE, SIDE, 1))
    return np.clip(background + slopes / 2 + grain, 0, 255)


def render(scene: Scene, path: str | Path) -> None:
    """Writes the scene as an mp4 (H.264) file, under its name only once it is whole.

    The same scene gives the same bytes. Raises OSError if the file cannot be written.
    """
    path = Path(path)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        _encode(scene, part)
        os.replace(part, path)
    except av.FFmpegError as error:  # whose own class does not travel between processes
        raise OSError(f"{path}: {error}") from None
    finally:
        part.unlink(missing_ok=True)


def _encode(scene, path):
    # x264's macroblock tree reads memory it never wrote in so small a picture: bytes would vary.
    options = {"crf": "12", "preset": "veryfast", "x264-params": "mbtree=0"}
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FPS, options=options)
        stream.width = stream.height = SIDE
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1  # for the same bytes every time
        for number in range(SECONDS * FPS):
            image = av.VideoFrame.from_ndarray(frame(scene, number / FPS), format="rgb24")
            container.mux(stream.encode(image))
        container.mux(stream.encode())


# The data set


def make(
    directory: str | Path,
    num_train: int = 4000,
    num_val: int = 60,
    num_test: int = 220,
    seed: int = 0,
) -> Path:
    """Renders the set on all cores, unless it is there, and returns its directory.

    Writes `videos/train_00000.mp4`, ... and last `captions.jsonl`, a line a video:
    {"video": "train_00000.mp4", "captions": [...], "split": "train"}. A killed run goes on with the
    videos that are missing.

    Raises:
      InputError: the directory holds a set made with other arguments.
    """
    directory = Path(directory)
    counts = {"train": num_train, "val": num_val, "test": num_test}
    _claim(directory, {**counts, "seed": seed, "recipe": RECIPE})
    listing = directory / "captions.jsonl"
    if listing.exists():
        return directory
    todo, lines = {}, []
    for split, count in counts.items():
        for number, scene in enumerate(scenes(split, count, seed)):
            name = f"{split}_{number:05d}.mp4"
            todo[directory / "videos" / name] = scene
            lines.append({"video": name, "captions": scene.captions, "split": split})
    _render_all({path: scene for path, scene in todo.items() if not path.exists()})
    _write(listing, "".join(json.dumps(line) + "\n" for line in lines))
    return directory


def _claim(directory, arguments):
    """Videos are known by their numbers: those of two seeds must not mix in one directory."""
    note = directory / "rendered.json"
    if not note.exists():
        (directory / "videos").mkdir(parents=True, exist_ok=True)
        _write(note, json.dumps(arguments) + "\n")
    if (made := json.loads(note.read_text(encoding="utf-8"))) != arguments:
        raise InputError(f"{directory} holds {made}, not {arguments}: delete it or name another")


def _render_all(scene_of):
    with worker_pool(len(scene_of) // 8 + 1) as pool:
        done = pool.map(render, scene_of.values(), scene_of, chunksize=8)
        with progress(len(scene_of), "rendering videos", "clip") as bar:
            for _ in done:
                bar.update()


def _write(path, text):
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
