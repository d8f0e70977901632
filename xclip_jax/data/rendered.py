"""Renders the demo's data set: H.264 clips of moving coloured shapes, with captions.

One shape moves ("a small red circle goes from left to right"), or two appear one after the other
("a small red circle is replaced by a big blue cross"). Every scene with a direction in time also
occurs mirrored in time, with exactly the same frames in the opposite order: no single frame and no
average of frames distinguishes the two. Shapes are also swapped between objects, so that the words
of a caption without their order do not suffice. Colours and shapes are few, so that clips which
differ only in motion or order often are in one batch. The combinations of val and test (object and
motion, or two objects) do not occur in train, but each of their colours, shapes and motions does.
"""

import functools
import io
import itertools
import json
import random
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import av
import numpy as np
from jaxtyping import Float, UInt8

from xclip_jax.cli import InputError, PathLike, progress, write_atomically
from xclip_jax.data.annotations import Split
from xclip_jax.workers import worker_pool

SIDE, FPS, SECONDS = 64, 8, 6  # the frames at 0, 1, ..., 5 s are what a reader samples
LAST = SECONDS - 1.0  # all motion ends here: a mirrored scene is mirrored around LAST / 2
RECIPE = 2  # to be increased when the same seed gives other videos or captions

COLOURS = {"red": (215, 35, 35), "yellow": (240, 210, 30), "green": (30, 150, 50)}
COLOURS |= {"blue": (45, 70, 225)}
SHAPES = ("circle", "triangle", "cross")
RADII = {"small": 0.15, "medium": 0.21, "large": 0.27}  # of the side; captions omit "medium"
AXES = (("right", "left"), ("up", "down"), ("grow", "shrink"), ("still",))
OPPOSITE = {motion: other for axis in AXES for motion, other in zip(axis, axis[::-1], strict=True)}
_PAIRS_OF_COLOURS = [*map(list, itertools.combinations_with_replacement(range(len(COLOURS)), 2))]
_PAIRS_OF_SHAPES = [*map(list, itertools.combinations_with_replacement(range(len(SHAPES)), 2))]

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
TEMPLATES: dict[str, tuple[str, ...]] = {}
TEMPLATES["motion"] = ("{a} {does_a}", "there is {a} that {does_a}", "in this clip {a} {does_a}")
TEMPLATES["order"] = ("first {a} appears, then {b}", "{a} is shown and then {b}")
TEMPLATES["order"] += ("{a} is replaced by {b}", "{a} gives way to {b}")


@dataclass(frozen=True)
class Event:
    """The motion of one object. No caption mentions its place, scale or tilt."""

    colour: str  # a key of COLOURS
    shape: str  # one of SHAPES
    size: str  # a key of RADII
    motion: str  # a key of OPPOSITE
    place: tuple[float, float] = (0.5, 0.5)  # x and y of the centre, as fractions of the side
    scale: float = 1.0  # factor of the radius
    tilt: float = 0.0  # radians


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


def mirror(scene: Scene) -> Scene:
    """Returns the scene reversed in time (the frame at t is that at LAST - t), without captions."""
    events = (replace(event, motion=OPPOSITE[event.motion]) for event in scene.events[::-1])
    return replace(scene, events=tuple(events), captions=())


def assign_split(scene: Scene) -> Split:
    """Returns the split of a scene's combination: test (3/8), val (1/8) or train."""
    colours = sorted(list(COLOURS).index(event.colour) for event in scene.events)
    shapes = sorted(SHAPES.index(event.shape) for event in scene.events)
    if scene.kind == "order":  # independent of which object has which shape
        number = _PAIRS_OF_COLOURS.index(colours) + _PAIRS_OF_SHAPES.index(shapes)
    else:
        axis = next(i for i, axis in enumerate(AXES) if scene.events[0].motion in axis)
        number = colours[0] + shapes[0] + axis
    if number % 8 == 1:
        return "val"
    return "test" if number % 8 in (0, 3, 6) else "train"


def draw_scenes(split: Split, count: int, seed: int = 0) -> list[Scene]:
    """Returns the first `count` scenes of a split, each followed by its mirror.

    Scenes of train have three captions, and some share captions. Those of val and test have one,
    which describes no other scene. Raises InputError if the split has fewer than `count` scenes.
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
        place = (rng.uniform(0.36, 0.64), rng.uniform(0.36, 0.64))
        scale, tilt = rng.uniform(0.92, 1.08), rng.uniform(-0.15, 0.15)
        events.append(replace(event, place=place, scale=scale, tilt=tilt))
    grey = rng.choice((rng.randint(15, 65), rng.randint(180, 225)))
    background = tuple(grey + rng.randint(-12, 12) for _ in range(3))
    noise = rng.randrange(1 << 30)
    scene = replace(scene, events=tuple(events), background=background, noise=noise)
    return dict.fromkeys((scene, mirror(scene)))  # one object at rest is its own mirror


def _draw_captions(scene: Scene, count: int, rng: random.Random) -> tuple[str, ...]:
    captions: dict[str, None] = {}
    while len(captions) < count:
        words = {}
        for letter, event in zip("ab", scene.events, strict=False):
            size = rng.choice(SIZE_WORDS.get(event.size, ("",)))
            thing = f"a {size} {event.colour} {rng.choice(SHAPE_WORDS[event.shape])}"
            words[letter] = " ".join(thing.split())
            words[f"does_{letter}"] = rng.choice(MOTION_WORDS[event.motion])
        captions[rng.choice(TEMPLATES[scene.kind]).format(**words)] = None
    return tuple(captions)


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


def render_dataset(
    folder: Path, *, num_train: int = 4000, num_val: int = 60, num_test: int = 220, seed: int = 0
) -> Path:
    """Renders the data set on all cores unless it exists, and returns its folder.

    Writes `videos/train_00000.mp4`, ... and finally `captions.jsonl`, one line per video. A run
    that was killed resumes with the missing videos. Raises InputError if the arguments changed.
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
        for number, scene in enumerate(draw_scenes(split, count, seed)):
            path = folder / "videos" / f"{split}_{number:05d}.mp4"
            if not path.exists():
                missing[path] = scene
            line = {"video": path.name, "captions": scene.captions, "split": split}
            lines.append(json.dumps(line) + "\n")
    bar = progress(len(missing), "rendering videos", "clip")
    with worker_pool(len(missing) // 8 + 1) as pool, bar:
        for _ in pool.map(render_video, missing.values(), missing, chunksize=8):
            bar.update()
    write_atomically(listing, "".join(lines))
    return folder
