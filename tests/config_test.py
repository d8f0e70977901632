"""Every field is read, every mistake is named, and nothing unknown gets in."""

import math
import re
from pathlib import Path

import pytest
from ml_collections import ConfigDict

import xclip_jax.config
from xclip_jax.cli import InputError
from xclip_jax.config import FREE_FIELDS, field_value, get_config, validate

PACKAGE = Path(xclip_jax.config.__file__).parent

WHOLE = (0, -3, None, True)
MISTAKES = {
    "mode": ("trian", "", None),
    "model.preset": ("offical",),
    "model.head": ("meanP",),
    "model.activation": ("relu",),
    "model.aggregation": ("max", "max_max"),
    "model.dtype": ("float16", "int8"),
    "model.temporal.type": ("gru",),
    "model.granularities": ((), ("video",), ("frame_word", "frame_word"), (1,), ([],), None),
    "data.captions": ("first",),
    "loss.same_video": ("drop",),
    "model.tau": (0.0, -1.0, math.nan, math.inf, None),
    "optimizer.lr": (0.0, math.nan, math.inf),
    "optimizer.encoder_lr": (0.0, -1e-3),
    "optimizer.eps": (0.0,),
    "optimizer.clip_norm": (0.0, math.nan),
    "optimizer.weight_decay": (-0.1, math.nan, math.inf),
    "optimizer.b1": (1.0, -0.1),
    "optimizer.b2": (1.0, math.nan),
    "optimizer.warmup": (1.0, -0.5),
    "mesh.data": (0, -2, True),
    "model.embed_dim": WHOLE,
    "model.max_frames": (*WHOLE, 78),
    "model.max_words": (2, 78, -1, None),
    "model.vision.image_size": WHOLE,
    "model.vision.patch_size": (*WHOLE, 30, 448),
    "model.vision.width": WHOLE,
    "model.vision.layers": WHOLE,
    "model.vision.heads": (*WHOLE, 7),
    "model.text.context_length": WHOLE,
    "model.text.width": WHOLE,
    "model.text.layers": WHOLE,
    "model.text.heads": (*WHOLE, 7),
    "model.text.vocab_size": (-1, None),
    "model.temporal.layers": (-1, None),
    "model.temporal.residual": ("maybe", None),
    "model.frame_features": ("both",),
    "model.words": ("words",),
    "model.padding": ("yes",),
    "model.matrices": ("identity",),
    "model.fusion": ("sum",),
    "init.clip": (None,),
    "optimizer.name": ("adam",),
    "optimizer.freeze_layers": (-2, None),
    "loss.scale": (-1.0, math.nan),
    "model.temporal.heads": (*WHOLE, 7),
    "model.remat": (None, "", "some"),
    "train.batch_size": WHOLE,
    "train.epochs": (-1, None, True),
    "data.max_videos": (-1, None, True),
    "train.eval_every": (-1, None),
    "train.checkpoint_every": WHOLE,
    "eval.batch_size": WHOLE,
    "eval.block_cells": (-1,),
    "log.every": WHOLE,
    "log.tensorboard": (None,),
    "report.attention_pairs": (-1, True),
    "seed": (-1, None),
    "data.rendered": (-1, True),
    "data.path": (None,),
    "model.vision": (None,),
    "optimizer": (None,),
}


def set_field(config, field, value):
    *parents, name = field.split(".")
    setattr(field_value(config, ".".join(parents)) if parents else config, name, value)


def leaves(config, prefix=""):
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def test_defaults_are_valid():
    validate(get_config())


@pytest.mark.parametrize("field", MISTAKES)
def test_a_mistake_is_answered_with_field_value_and_what_is_allowed(field):
    for value in MISTAKES[field]:
        config = get_config()
        set_field(config, field, value)
        with pytest.raises(InputError) as caught:
            validate(config)
        message = str(caught.value)
        assert message.startswith(f"config.{field} = {value!r}: must be "), message
        assert len(message.split(": must be ")[1]) > 3


def test_messages_name_the_choices():
    for field, value, named in (
        ("model.aggregation", "max", "attention, max-max, mean-mean, mean-max, max-mean"),
        ("model.temporal.type", "gru", "none, transformer, lstm"),
        ("model.vision.patch_size", 30, "a divisor of 224"),
        ("model.max_frames", 78, "at most model.text.context_length = 77"),
        ("model.temporal.heads", 7, "a divisor of the width 512"),
    ):
        config = get_config()
        set_field(config, field, value)
        with pytest.raises(InputError, match=re.escape(named)):
            validate(config)


def test_heads_of_an_unused_temporal_encoder_may_be_anything():
    config = get_config()
    config.model.temporal.type = "lstm"
    config.model.temporal.heads = 7
    validate(config)


@pytest.mark.parametrize("field", ["bogus", "model.bogus", "model.vision.bogus", "train.lr"])
def test_unknown_fields_are_refused(field):
    with pytest.raises(AttributeError, match="does not exist"):
        set_field(get_config(), field, 1)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("train.epochs", "3"),
        ("train.epochs", 2.5),
        ("model.tau", "cold"),
        ("log.tensorboard", 1),
        ("mode", 3),
        ("model.granularities", "frame_word"),
        ("model.vision", 3),
    ],
)
def test_wrong_types_are_refused_at_once(field, value):
    with pytest.raises(TypeError, match="Could not override"):
        set_field(get_config(), field, value)


def test_a_whole_number_does_for_a_number():
    config = get_config()
    config.model.tau = 1
    validate(config)
    assert isinstance(config.model.tau, float)


def test_free_fields_exist():
    for field in FREE_FIELDS:
        field_value(get_config(), field)


def sources():
    """Everything that may read the config, as text: the package without config.py."""
    return [p.read_text() for p in PACKAGE.rglob("*.py") if p != PACKAGE / "config.py"]


def unread(fields):
    """Those fields of which no source reads `parent.name`, `parent["name"]` or an alias of it.

    `model.*` is handed down as a dict, to build_model and to the towers' dataclasses: there a read
    is `["name"]` or a field of one of those dataclasses.
    """
    text = "\n".join(sources())
    aliases = {"optimizer": "o", "model": "a"}

    def is_read(field):
        group, _, name = f"config.{field}".rpartition(".")
        parent = group.rpartition(".")[2]
        owners = "|".join({parent, aliases.get(parent, parent)})
        patterns = [rf"\b({owners})\.{name}\b", rf'\b({owners})\["{name}"\]']
        if field.startswith("model."):
            patterns += [rf'\["{parent}"\]\["{name}"\]', rf"^    {name}: (int|str|float)\b"]
        return any(re.search(pattern, text, re.MULTILINE) for pattern in patterns)

    return {field for field in fields if not is_read(field)}


def test_every_field_is_read():
    config = get_config()
    assert not unread(leaves(config))
    with config.unlocked():
        config.bogus = 1
        config.train.bogus = config.model.bogus = config.model.vision.bogus = 1
        config.loss.lr = 1.0  # read elsewhere, but not as loss.lr
    assert unread(leaves(config)) == {
        "bogus",
        "train.bogus",
        "model.bogus",
        "model.vision.bogus",
        "loss.lr",
    }
