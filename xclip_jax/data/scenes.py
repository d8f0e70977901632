"""Describes the demo's scenes, one or two coloured shapes, in sentences as people type them.

A full sentence mentions all that distinguishes the scenes: size (unless it is medium), colour,
shape, and the motion of one object ("a small red ball moves to the left") or the order of two ("a
big blue cross follows a small red circle"). A short one omits some of it ("something red", "an
object that rises", "a ball, then a cross") and may fit many scenes.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

COLOURS = {"red": (215, 35, 35), "yellow": (240, 210, 30), "green": (30, 150, 50)}
COLOURS |= {"blue": (45, 70, 225), "purple": (150, 50, 170)}
SHAPES = ("circle", "triangle", "cross")
RADII = {"small": 0.2, "medium": 0.26, "large": 0.33}  # of the side; sentences omit "medium"
AXES = (("right", "left"), ("up", "down"), ("grow", "shrink"), ("still",))
ATTRIBUTES = ("colour", "shape", "size", "motion")  # of an event, which sentences may mention
OPPOSITE = {motion: other for axis in AXES for motion, other in zip(axis, axis[::-1], strict=True)}

SIZE_WORDS = {"small": ("small", "little", "tiny"), "large": ("large", "big"), "medium": ("",)}
SHAPE_WORDS = {"circle": ("circle", "ball", "disc"), "triangle": ("triangle",)}
SHAPE_WORDS |= {"cross": ("cross", "plus sign")}
OBJECT_WORDS = ("something", "something", "object", "shape")  # of any shape
MOTION_WORDS = {
    "right": ("moves right", "moves to the right", "slides to the right", "goes right"),
    "left": ("moves left", "moves to the left", "slides to the left", "goes left"),
    "up": ("moves up", "rises", "goes up", "goes from bottom to top"),
    "down": ("moves down", "falls", "goes down", "goes from top to bottom"),
    "grow": ("grows", "gets bigger", "becomes larger"),
    "shrink": ("shrinks", "gets smaller", "becomes smaller"),
    "still": ("stays still", "stays in place", "does not move"),
}
MOTION_WORDS["right"] += ("goes from left to right",)
MOTION_WORDS["left"] += ("goes from right to left",)
PARTICIPLES = {"moves": "moving", "slides": "sliding", "goes": "going", "rises": "rising"}
PARTICIPLES |= {"falls": "falling", "grows": "growing", "gets": "getting", "becomes": "becoming"}
PARTICIPLES |= {"shrinks": "shrinking", "stays": "staying", "does not move": "not moving"}

# Of one object with its motion, of one object, of two in the order {a}, {b}.
MOTION_TEMPLATES = ("{a} {does}", "{a} that {does}", "there is {a} that {does}", "{a} {doing}")
MOTION_TEMPLATES += ("{a} is {doing}", "{doing}, {a}", "a video of {a} {doing}")
OBJECT_TEMPLATES = ("{a}", "there is {a}", "a video of {a}")
ORDER_TEMPLATES = ("first {a}, then {b}", "{a}, then {b}", "{a} and then {b}")
ORDER_TEMPLATES += ("{a} is replaced by {b}", "{a} turns into {b}", "{a} followed by {b}")
ORDER_TEMPLATES += ("{b} follows {a}", "{b} appears after {a}", "after {a}, {b} appears")

# (number of objects, what is said of each) of short sentences by kind of scene, with weights.
SHORT: dict[str, dict[tuple[int, str], int]] = {
    "motion": {
        **{(1, "colour shape motion"): 6, (1, "colour motion"): 3, (1, "shape motion"): 3},
        **{(1, "motion"): 2, (1, "size colour shape"): 1, (1, "colour shape"): 2},
        **{(1, "colour"): 1, (1, "shape"): 1},
    },
    "order": {
        **{(2, "colour shape"): 8, (2, "colour"): 3, (2, "shape"): 3},
        **{(1, "size colour shape"): 1, (1, "colour shape"): 2, (1, "colour"): 1, (1, "shape"): 1},
    },
}
FULL = {"motion": (1, "size colour shape motion"), "order": (2, "size colour shape")}


@dataclass(frozen=True)
class Event:
    """The motion of one object. No sentence mentions its place, scale or tilt.

    In the meaning of a sentence, "" stands for what the sentence does not mention.
    """

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


@dataclass(frozen=True)
class Sentence:
    """A sentence and its meaning: one or two events, in order, with "" for what it omits."""

    text: str
    events: tuple[Event, ...]


def fits(sentence: Sentence, scene: Scene) -> bool:
    """Returns True if a sentence is true of a scene.

    One about an object without its motion fits every scene in which the object occurs. One with a
    motion fits scenes of one object only.
    """
    mentioned, events = sentence.events, scene.events
    if len(mentioned) == 1 and not mentioned[0].motion:
        return any(_agree(mentioned[0], event) for event in events)
    return len(mentioned) == len(events) and all(map(_agree, mentioned, events))


def _agree(mentioned: Event, event: Event) -> bool:
    return all(getattr(mentioned, name) in ("", getattr(event, name)) for name in ATTRIBUTES)


def draw_sentence(scene: Scene, rng: random.Random, *, short: bool = False) -> Sentence:
    """Returns a random full or short sentence that fits the scene."""
    choices = SHORT[scene.kind] if short else {FULL[scene.kind]: 1}
    count, said = rng.choices([*choices], [*choices.values()])[0]
    templates = ORDER_TEMPLATES if count == 2 else OBJECT_TEMPLATES
    events = scene.events if count == len(scene.events) else (rng.choice(scene.events),)
    words = {letter: _name(event, said, rng) for letter, event in zip("ab", events, strict=False)}
    if "motion" in said:
        templates = MOTION_TEMPLATES
        words["does"] = rng.choice(MOTION_WORDS[events[0].motion])
        verb = next(verb for verb in PARTICIPLES if words["does"].startswith(verb))
        words["doing"] = words["does"].replace(verb, PARTICIPLES[verb], 1)
    text = rng.choice(templates).format(**words)
    return Sentence(text, tuple(_mention(event, said) for event in events))


def _mention(event: Event, said: str) -> Event:
    """Returns an event with "" for what is not said of it."""
    said = said.replace("size", "") if event.size == "medium" else said
    values: Any = {name: getattr(event, name) for name in ATTRIBUTES if name in said}
    return Event(**dict.fromkeys(ATTRIBUTES, "") | values)


def _name(event: Event, said: str, rng: random.Random) -> str:
    """Returns a noun phrase with its article: "a small red ball", "something red", "an object"."""
    size = rng.choice(SIZE_WORDS[event.size]) if "size" in said else ""
    colour = event.colour if "colour" in said else ""
    noun = rng.choice(SHAPE_WORDS[event.shape] if "shape" in said else OBJECT_WORDS)
    words = ["something", size, colour] if noun == "something" else ["a", size, colour, noun]
    return " ".join(filter(None, words)).replace("a object", "an object")


def draw_captions(scene: Scene, kinds: Sequence[bool], rng: random.Random) -> tuple[str, ...]:
    """Returns different sentences that fit the scene, short ones where `kinds` is True."""
    texts: dict[str, None] = {}
    for count, short in enumerate(kinds, 1):
        while len(texts) < count:
            texts[draw_sentence(scene, rng, short=short).text] = None
    return tuple(texts)
