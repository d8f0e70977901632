"""Tests of validating configs, of the files in configs/ and of files of earlier versions."""

import functools
import importlib.util
import itertools
import math
import operator
import re
from pathlib import Path

import pytest
from absl import flags
from ml_collections import ConfigDict, config_flags

import xclip_jax.config
from xclip_jax.cli import CommandParser, InputError, parse_with_config
from xclip_jax.config import BEST, FREE_FIELDS, get_config, validate
from xclip_jax.data.benchmarks import DATASETS
from xclip_jax.models import read_model_config
from xclip_jax.paper import paper_results

PACKAGE = Path(xclip_jax.config.__file__).parent

WHOLE = (0, -3, None, True)
MISTAKES = {
    "mode": ("trian", "", None),
    "model.preset": ("offical",),
    "model.head": ("meanP",),
    "model.activation": ("tanh",),
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
    "model.max_frames": WHOLE,
    "model.max_words": (2, 78, -1, None),
    "model.vision.image_size": WHOLE,
    "model.vision.patch_size": (*WHOLE, 30, 448),
    "model.vision.pool": ("mean", "scaled_attention"),
    "model.vision.temporal_layers": (-1, 2),
    "model.vision.joint_layers": (-1, 2),
    "model.vision.projection": ("", "none"),
    "model.vision.logit_cap": (-1.0, math.nan, None),
    "model.text.projection": ("",),
    "model.preprocess.spread": (None,),
    "model.vision.width": WHOLE,
    "model.vision.layers": WHOLE,
    "model.vision.heads": (*WHOLE, 7),
    "model.text.context_length": WHOLE,
    "model.text.width": WHOLE,
    "model.text.layers": WHOLE,
    "model.text.heads": (*WHOLE, 7),
    "model.text.vocab_size": (-1, None),
    "model.temporal.layers": (-1, None),
    "model.frame_features": ("both",),
    "model.words": ("words",),
    "model.padding": ("yes",),
    "model.fusion": ("sum",),
    "init.clip": (None,),
    "optimizer.name": ("adam",),
    "optimizer.freeze_layers": (-2, None),
    "loss.scale": (-1.0, math.nan),
    "model.temporal.heads": (*WHOLE, 7),
    "model.remat": (None, "", "some"),
    "train.batch_size": WHOLE,
    "train.micro_batch": (-1, 2.5, True, "some", ""),
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
    setattr(functools.reduce(getattr, parents, config), name, value)


def leaves(config, prefix=""):
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def test_defaults_are_valid():
    validate(get_config())


@pytest.mark.parametrize("field", MISTAKES)
def test_error_names_field_value_and_what_is_allowed(field):
    for value in MISTAKES[field]:
        config = get_config()
        set_field(config, field, value)
        with pytest.raises(InputError) as caught:
            validate(config)
        message = str(caught.value)
        assert message.startswith(f"config.{field} = {value!r}: must be "), message
        assert len(message.split(": must be ")[1]) > 3


def test_error_lists_the_choices():
    for field, value, named in (
        ("model.aggregation", "max", "attention, max-max, mean-mean, mean-max, max-mean"),
        ("model.temporal.type", "gru", "none, transformer, lstm"),
        ("model.vision.patch_size", 30, "a divisor of 224"),
        ("model.max_words", 78, "from 3 to model.text.context_length = 77"),
        ("model.temporal.heads", 7, "a divisor of the width 512"),
    ):
        config = get_config()
        set_field(config, field, value)
        with pytest.raises(InputError, match=re.escape(named)):
            validate(config)


SENTENCE = {"model.granularities": ("video_sentence",)}


@pytest.mark.parametrize(
    ("fields", "allowed"),
    [
        ({"model.tau_learned": True, **SENTENCE}, "False where nothing is aggregated"),
        ({"model.tau_learned": True, "model.head": "mean_pooling"}, "False where nothing is aggre"),
        ({"model.aggregation": "weighted", **SENTENCE}, "attention where neither words nor"),
        ({"model.aggregation": "maxsim", "model.fusion": "transformer"}, "attention where neither"),
        ({"loss.each_granularity": True, **SENTENCE}, "False where there are not several"),
        ({"loss.cdcr": 0.1, "model.head": "mean_pooling"}, "0 where words and frames are not"),
        ({"eval.hubness_bias": 1}, "0, or from 100 to 5000"),
    ],
)
def test_switch_without_effect_is_an_error(fields, allowed):
    config = get_config()
    for field, value in fields.items():
        set_field(config, field, value)
    message = f"config.{next(iter(fields))} = .*: must be {allowed}"
    with pytest.raises(InputError, match=message):
        validate(config)


def test_heads_of_an_unused_temporal_transformer_are_not_checked():
    config = get_config()
    config.model.temporal.type = "lstm"
    config.model.temporal.heads = 7
    validate(config)


@pytest.mark.parametrize("field", ["bogus", "model.bogus", "model.vision.bogus", "train.lr"])
def test_unknown_field_is_an_error(field):
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
        ("model.temporal.residual", "maybe"),
        ("model.matrices", 1),
    ],
)
def test_setting_another_type_is_an_error(field, value):
    with pytest.raises(TypeError, match="Could not override"):
        set_field(get_config(), field, value)


def test_integer_is_accepted_for_a_float():
    config = get_config()
    config.model.tau = 1
    validate(config)
    assert isinstance(config.model.tau, float)


def test_free_fields_exist():
    for field in FREE_FIELDS:
        operator.attrgetter(field)(get_config())


def sources():
    """Returns the source of every module that may read the config."""
    return [p.read_text() for p in PACKAGE.rglob("*.py") if p != PACKAGE / "config.py"]


def unread(fields):
    """Returns the fields that no source reads as `parent.name` or by an alias of the parent."""
    text = "\n".join(sources())
    aliases = {"model": "c|m|config", "vision": "c", "text": "c", "optimizer": "c"}

    def is_read(field):
        group, _, name = f"config.{field}".rpartition(".")
        parent = group.rpartition(".")[2]
        owners = "|".join({parent, aliases.get(parent, parent)})
        return re.search(rf"\b({owners})\.{name}\b", text)

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


def test_optional_fields_are_set_on_the_command_line(monkeypatch):
    options = ["temporal.residual=True", "matrices=false", "words=all_tokens"]
    argv = ["program", *(f"--config.model.{option}" for option in options)]
    monkeypatch.setattr("sys.argv", argv)  # where ml_collections looks for the fields' names
    values = flags.FlagValues()
    config_flags.DEFINE_config_dict("config", get_config(), flag_values=values)
    values(argv)
    model = values.config.model
    assert (model.temporal.residual, model.matrices, model.words) == (True, False, "all_tokens")
    validate(values.config)


@pytest.mark.parametrize(("text", "value"), [("auto", "auto"), ("30", 30), ("0", 0)])
def test_micro_batch_is_a_number_or_auto(monkeypatch, tmp_path, text, value):
    argv = ["program", f"--config.train.micro_batch={text}"]
    monkeypatch.setattr("sys.argv", argv)
    values = flags.FlagValues()
    config_flags.DEFINE_config_dict("config", get_config(), flag_values=values)
    values(argv)
    (tmp_path / "c.py").write_text("from xclip_jax.config import get_config\n")
    line = [f"--config={tmp_path / 'c.py'}", argv[1]]
    _, parsed, _ = parse_with_config(CommandParser(), line)
    written = get_config()
    written.train.micro_batch = value
    for config in (values.config, parsed, written):
        assert config.train.micro_batch == value
        validate(config)
        config.train.micro_batch = 4  # also over auto
    assert get_config().train.micro_batch is None


def test_model_fields_of_earlier_versions_are_upgraded():
    fields = get_config().model.to_dict()
    automatic = {"frame_features": "", "words": "", "padding": "", "matrices": ""}
    temporal = {**fields["temporal"], "residual": ""}
    former = read_model_config({**fields, **automatic, "temporal": temporal})
    assert former == read_model_config(fields)
    for old, new in (("yes", True), ("no", False)):
        fields["temporal"]["residual"] = old
        fields["matrices"] = "learned" if new else "none"
        read = read_model_config({**fields, "preset": "paper" if new else "official", "step": 7})
        assert (read.temporal.residual, read.matrices) == (new, new)


CONFIGS = Path(__file__).resolve().parents[1] / "configs"
BENCHMARKS = [name for name in DATASETS if name != "captions"]


def load(name):
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_combination_of_arguments_is_valid(name):
    variants = DATASETS[name].variants
    paths = set()
    for words in itertools.product(
        ("", "vit_b32", "vit_b16"), ("", "paper", "official", "best"), ("", *variants)
    ):
        c = load(name).get_config(",".join(filter(None, words)))
        validate(c)
        backbone, preset, variant = words
        assert c.model.vision.patch_size == (16 if backbone == "vit_b16" else 32)
        assert c.init.clip == f"models/clip_b{c.model.vision.patch_size}"
        assert c.model.preset == ("official" if preset == "official" else "paper")
        assert c.data.variant == (variant or (variants[0] if variants else ""))
        assert c.data.dataset == name
        changed = [w for w in words if w not in ("", "vit_b32", "paper", *variants[:1])]
        assert c.name == "_".join([name, *changed])
        paths.add(c.data.path)
    assert len(paths) == max(1, len(variants))


def test_preset_best_is_paper_with_other_fields():
    best, paper = load("msrvtt").get_config("best"), load("msrvtt").get_config()
    paper.name = best.name
    assert best != paper
    paper.update_from_flattened_dict(BEST)
    assert best == paper


# Of the paper; of the release's scripts for B/32 and for B/16: (batch, epochs).
SETTINGS = {
    "msrvtt": ((300, 3), (300, 5), (80, 5)),
    "msvd": ((300, 3), (300, 5), (80, 5)),
    "lsmdc": ((300, 3), (300, 5), (80, 5)),
    "didemo": ((64, 20), (64, 20), (16, 20)),
    "activitynet": ((64, 20), (112, 20), (32, 20)),
}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_benchmark_settings_are_those_of_paper_and_release(name):
    for arguments, expected in zip(
        ("", "official", "official,vit_b16"), SETTINGS[name], strict=True
    ):
        c = load(name).get_config(arguments)
        assert (c.train.batch_size, c.train.epochs) == expected
        long = name in ("didemo", "activitynet")
        assert (c.model.max_words, c.model.max_frames) == ((64, 64) if long else (32, 12))
        official = arguments.startswith("official")
        assert c.optimizer.name == ("bert_adam" if official else "adamw")
        assert c.optimizer.freeze_layers == (0 if official else -1)
        assert (c.optimizer.lr, c.optimizer.encoder_lr) == (1e-4, 1e-7)


@pytest.mark.parametrize("arguments", ["vit_l14", "vit_b32,vit_b16", "official,paper", "9k,7k"])
def test_unknown_or_repeated_argument_is_an_error(arguments):
    with pytest.raises(
        InputError, match=f"{arguments}: after the colon, must be at most one word of each group: "
    ):
        load("msrvtt").get_config(arguments)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_docstring_has_the_papers_numbers(name):
    variant = (*DATASETS[name].variants, "")[0]
    for patch_size, backbone in ((32, "ViT-B/32"), (16, "ViT-B/16")):
        vision = load(name).get_config(f"vit_b{patch_size}").model.vision
        ((row, metrics),) = paper_results(name, variant, vision).items()
        assert row == backbone
        texts = [
            " / ".join(str(metrics[way][m]) for m in ("R@1", "R@5", "MnR"))
            for way in ("text_to_video", "video_to_text")
        ]
        line = f"{backbone}    text to video {texts[0]}    video to text {texts[1]}"
        assert line in load(name).__doc__
    assert paper_results(name, "another", vision) == {}
