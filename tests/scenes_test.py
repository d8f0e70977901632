"""Tests of the demo's sentences: what they mention, and which scenes they fit."""

import random

import pytest

from xclip_jax.data import rendered, scenes
from xclip_jax.data.scenes import Event, Scene, Sentence, fits

RED_LEFT = Scene((Event("red", "circle", "small", "left"),))
RED_RIGHT = scenes.mirror(RED_LEFT)
GROWING = Scene((Event("red", "circle", "medium", "grow"),))
ORDER = Scene((Event("red", "circle", "large", "still"), Event("blue", "cross", "small", "still")))
ALL = (RED_LEFT, RED_RIGHT, GROWING, ORDER, scenes.mirror(ORDER))


def event(colour="", shape="", size="", motion=""):
    return Event(colour, shape, size, motion)


@pytest.fixture(scope="module")
def train():
    return rendered.draw_scenes("train", 300)


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        ([event("red")], ALL),
        ([event("red", "circle", "small")], [RED_LEFT, RED_RIGHT]),
        ([event("red", "circle", "", "left")], [RED_LEFT]),
        ([event(motion="grow")], [GROWING]),
        ([event(motion="still")], []),
        ([event("blue")], [ORDER, ALL[-1]]),
        ([event("red"), event("blue")], [ORDER]),
        ([event("", "cross"), event("", "circle")], [ALL[-1]]),
        ([event("red", "circle", "large"), event("blue", "cross", "large")], []),
        ([event("green")], []),
    ],
)
def test_sentence_fits_scenes_that_agree_with_all_it_mentions(events, expected):
    sentence = Sentence("", tuple(events))
    assert [scene for scene in ALL if fits(sentence, scene)] == list(expected)


@pytest.mark.parametrize("short", [False, True])
def test_words_of_a_sentence_are_those_of_its_meaning(train, short):
    rng = random.Random(0)
    vocabularies = {"colour": {c: (c,) for c in scenes.COLOURS}, "shape": scenes.SHAPE_WORDS}
    vocabularies["size"] = {size: scenes.SIZE_WORDS[size] for size in ("small", "large")}
    for scene in train:
        sentence = scenes.draw_sentence(scene, rng, short=short)
        assert fits(sentence, scene)
        words = sentence.text.replace("plus sign", "cross").replace(",", "").split()
        for name, vocabulary in vocabularies.items():
            synonyms = {word: value for value, words in vocabulary.items() for word in words}
            found = [synonyms[word] for word in words if word in synonyms]
            said = [value for e in sentence.events if (value := getattr(e, name))]
            assert sorted(found) == sorted(said), sentence
        for one in sentence.events:
            assert short or (one.colour and one.shape and (one.motion or scene.kind == "order"))
        assert short or len(sentence.events) == len(scene.events)


def test_order_of_the_meaning_is_the_order_in_time():
    first, second = ORDER.events
    for template in scenes.ORDER_TEMPLATES:
        text = template.format(a="red", b="blue")
        is_reversed = text.index("blue") < text.index("red")
        assert is_reversed == any(word in text for word in ("follows", "appears after")), text
    rng = random.Random(0)
    for _ in range(50):
        sentence = scenes.draw_sentence(ORDER, rng)
        assert [e.colour for e in sentence.events] == [first.colour, second.colour]
        is_reversed = sentence.text.index("blue") < sentence.text.index("red")
        assert is_reversed == any(word in sentence.text for word in ("follows", "appears after"))


def test_queries_list_all_scenes_they_fit():
    found = rendered.draw_scenes("test", 60)
    queries = rendered.draw_queries(found)
    assert len(queries) == 60
    assert rendered.draw_queries(found) == queries
    assert all(queries.values())
    for text, right in queries.items():
        colours = {word for word in text.replace(",", "").split() if word in scenes.COLOURS}
        assert all(colours <= {event.colour for event in found[i].events} for i in right)
