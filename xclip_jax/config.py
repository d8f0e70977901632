"""Defines all config fields and their defaults, which the files in configs/ override.

Fields are declared once, in the dataclasses below: `get_config` makes the ConfigDict of the command
line from them, and `validate` checks it against their types. Defaults are the paper's settings for
MSR-VTT with ViT-B/32 (https://arxiv.org/abs/2207.07285, Sec. 4).
"""

import dataclasses
import importlib.util
import itertools
import operator
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin, get_type_hints

from ml_collections import ConfigDict, config_dict

from xclip_jax.cli import InputError
from xclip_jax.data.benchmarks import DATASETS
from xclip_jax.metrics import MAX_CAPTIONS, MIN_CAPTIONS
from xclip_jax.models import ModelConfig, read_model_config
from xclip_jax.models.config import (
    PRESETS,
    Checks,
    Natural,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Rule,
    Size,
    check_sizes,
    check_types,
)
from xclip_jax.models.families import PUBLISHED

# Sections and fields that do not affect training: a run may be resumed with other values.
FREE_FIELDS = ("mode", "mesh", "log", "report", "eval", "data.path", "train.micro_batch")
FREE_FIELDS += ("train.checkpoint_every", "loss.block_cells", "model.remat")
BankSize = Annotated[
    int,
    Rule(
        lambda x: x == 0 or MIN_CAPTIONS <= x <= MAX_CAPTIONS,
        f"0, or from {MIN_CAPTIONS} to {MAX_CAPTIONS}",
    ),
]
Fraction = Annotated[float, Rule(lambda x: 0 <= x < 1, "a number from 0 to below 1")]


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Prepared data and its splits."""

    path: str = ""  # folder that xclip_jax.prepare wrote
    dataset: str = ""  # the --dataset it was prepared with; "": any
    variant: str = ""  # the --split it was prepared with; "": any
    rendered: Natural = 0  # training scenes of the demo, rendered if `path` does not exist
    train_split: str = "train"  # split to train on
    val_split: str = "val"  # split to validate on, if the data set has it; "": none
    test_split: str = "test"  # split of the final table, if the data set has it; else train_split
    max_videos: Natural = 0  # videos to train on, drawn once for all seeds; 0: all
    # all: each caption of a video is a pair of its own; random: one pair per video and epoch
    captions: Literal["all", "random"] = "all"


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Batch size, training length, validation and checkpoints."""

    batch_size: Size = 300  # B, pairs per step, over all devices
    # Pairs encoded at once (gradient caching); 0: the whole batch; None or auto: as many as fit the
    # devices (fitting.py).
    micro_batch: Natural | Literal["auto"] | None = None
    epochs: Natural = 3  # passes over the pairs; 0: the initial weights are evaluated
    # val: best on val_split, or the last without one; last; test: best on test_split, as in the
    # PyTorch release (marked in the results).
    select: Literal["val", "last", "test"] = "val"
    # R@1 by which weights are selected: the mean of both directions, or text to video alone, as in
    # the release.
    select_by: Literal["mean", "text_to_video"] = "mean"
    # Decay of the moving average of the weights, which is evaluated and exported; 0: without. It
    # starts at the initial weights: 1 / (1 - decay) should be far below the number of steps.
    ema: Fraction = 0.0
    eval_every: Natural = 0  # steps between validations; 0: once per epoch
    checkpoint_every: Positive = 500  # steps between checkpoints besides those at validations


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The contrastive loss."""

    kind: Literal["softmax", "sigmoid"] = "softmax"  # Eq. 15-17, or the loss of SigLIP
    each_granularity: bool = False  # deep supervision: the mean of one loss for each
    cdcr: NonNegativeFloat = 0.0  # weight of channel decorrelation (DRL: 0.11 to 0.16); 0: without
    same_video: Literal["negative", "ignore"] = "negative"  # two captions of a video in a batch
    block_cells: Natural = 0  # word-frame cells a device holds at once; 0: 2^26
    # Factor of either loss (Eq. 17), without CDCR; 0: by the preset, 1 (paper) or 0.5 (official)
    scale: NonNegativeFloat = 0.0


@dataclasses.dataclass(frozen=True)
class InitConfig:
    """Initial weights."""

    clip: str = ""  # model directory with the initial CLIP towers; "": random weights


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer, learning rates and frozen layers."""

    name: Literal["adamw", "bert_adam"] = "adamw"  # bert_adam: the PyTorch release's
    # CLIP's layers to freeze; -1: none; 0: the embeddings; n: also the first n blocks
    freeze_layers: Annotated[int, Rule(lambda x: x >= -1, "-1 or a number of layers")] = -1
    lr: PositiveFloat = 1e-4  # peak learning rate of new parameters
    encoder_lr: PositiveFloat = 1e-7  # peak learning rate of CLIP's towers and the logit scale
    # Layer l of a tower's L has this to the power of L + 1 - l as factor of that rate, embeddings
    # as layer 0; the last norm, the projection and the logit scale have 1.
    layer_decay: Annotated[float, Rule(lambda x: 0 < x <= 1, "a number above 0, at most 1")] = 1.0
    # The paper states Adam, a cosine and both rates. The next six values are the release's.
    warmup: Fraction = 0.1  # fraction of the steps with rising rate, before a cosine to 0
    # Decoupled; adamw: of matrices and embeddings, bert_adam: of all but biases; 0: plain Adam
    weight_decay: NonNegativeFloat = 0.2
    b1: Fraction = 0.9  # Adam's decay of the mean of gradients
    b2: Fraction = 0.98  # Adam's decay of the mean of squared gradients
    eps: PositiveFloat = 1e-6  # Adam's epsilon
    # largest global norm of the gradient
    clip_norm: Annotated[float, Rule(lambda x: x > 0, "a number above 0")] = 1.0


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Evaluation during and after training."""

    batch_size: Positive = 64  # texts or videos encoded at once
    dual_softmax: bool = False  # also print the metrics with dual softmax
    qb_norm: Natural = 0  # training captions in the bank of QB-Norm; 0: without
    queries: str = ""  # file below data.path of sentences with several right videos; "": none
    # Training captions in the bank of the hubness bias, as many as search takes; 0: without
    hubness_bias: BankSize = 0
    block_cells: Natural = 0  # word-frame cells computed at once; 0: depends on the device


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """The device mesh."""

    # devices along which only the batch is split; -1: all
    data: Annotated[int, Rule(lambda x: x == -1 or x >= 1, "-1 or a number of devices")] = -1
    fsdp: Positive = 1  # devices along which large parameters are split too


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """Logs of training."""

    every: Positive = 10  # steps between lines of metrics.jsonl
    profile_from: Natural = 0  # first step of a profile for TensorBoard; 0: none
    profile_to: Natural = 0  # last step of the profile
    tensorboard: bool = True  # write TensorBoard files too
    wandb: str = ""  # project of Weights & Biases to log to; "": none


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    """The report on the test split."""

    attention_pairs: Natural = 4  # word-by-frame heat maps


Seed = Annotated[int, Rule(lambda x: 0 <= x < 2**32, "a whole number from 0 to 4294967295")]


@dataclasses.dataclass(frozen=True)
class Config:
    """All fields of a run."""

    name: str = "xclip"  # the work directory is runs/NAME
    mode: Literal["train", "eval"] = "train"  # eval: only evaluate the selected weights
    seed: Seed = 0  # of the initial weights and the order of the data
    model: ModelConfig = ModelConfig()  # noqa: RUF009  (it is frozen)
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    loss: LossConfig = LossConfig()
    init: InitConfig = InitConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    eval: EvalConfig = EvalConfig()
    mesh: MeshConfig = MeshConfig()
    log: LogConfig = LogConfig()
    report: ReportConfig = ReportConfig()


# A run's config is a ConfigDict with the fields of Config, which is its type to a type checker.
if TYPE_CHECKING:
    RunConfig = Config
else:
    RunConfig = ConfigDict


def get_config(section: Any = Config()) -> Any:
    """Returns the default RunConfig, locked: setting an unknown field is an error."""
    config = ConfigDict()
    for name, hint in get_type_hints(type(section)).items():
        value = getattr(section, name)
        if dataclasses.is_dataclass(value):
            value = get_config(value)
        elif value is None:  # a placeholder keeps the type, which the command line needs
            kind, *others = get_args(hint)
            kind = str if get_origin(kind) is Literal else kind
            value = config_dict.placeholder(object if len(others) > 1 else kind)
        config[name] = value
    return config.lock()


def validate(config: RunConfig) -> None:
    """Checks the types and values of all fields.

    Raises InputError that names the first wrong field, its value and what is allowed.
    """
    checks = itertools.chain(check_types(config, Config), _check_sizes(config))
    for field, is_valid, allowed in checks:
        if not is_valid:
            value = operator.attrgetter(field)(config)
            raise InputError(f"config.{field} = {value!r}: must be {allowed}")


def _check_sizes(config: RunConfig) -> Checks:
    """Checks fields that depend on others, once all have their declared types."""
    data, log, m = config.data, config.log, read_model_config(config.model)
    bert_adam = config.optimizer.name == "bert_adam"
    yield "data.dataset", data.dataset in ("", *DATASETS), f"one of {', '.join(DATASETS)}"
    variants = DATASETS[data.dataset].variants if data.dataset else ()
    yield "data.variant", data.variant in ("", *variants), f"one of {', '.join(variants)}"
    needed = "at least 1 where log.profile_to is set"
    yield "log.profile_from", log.profile_from or not log.profile_to, needed
    at_least = f"at least log.profile_from = {log.profile_from}"
    yield "log.profile_to", log.profile_to >= log.profile_from, at_least
    needed = "float32 unless optimizer.name = bert_adam"
    yield "model.param_dtype", bert_adam or m.param_dtype == "float32", needed
    several = m.has_granularities and len(m.granularities) > 1
    needed = "False where there are not several granularities"
    yield "loss.each_granularity", several or not config.loss.each_granularity, needed
    compares = m.has_granularities and "frame_word" in m.granularities
    yield "loss.cdcr", compares or not config.loss.cdcr, "0 where words and frames are not compared"
    yield "model.logit_bias", not m.logit_bias, "False (loss.kind = sigmoid sets it)"
    installed = not log.wandb or importlib.util.find_spec("wandb") is not None
    needed = "'' where Weights & Biases is not installed (pip install -e '.[wandb]')"
    yield "log.wandb", installed, needed
    for field, is_valid, allowed in check_sizes(m):
        yield f"model.{field}", is_valid, allowed


BACKBONES = {"vit_b32": 32, "vit_b16": 16}  # -> patch size
# The preset `best` of config files: fields changed from `paper` (docs/studies.md).
BEST: dict[str, Any] = {"model.granularities": ("video_sentence", "frame_word"), "model.tau": 0.1}


def set_encoders(c: Any, word: str) -> None:
    """Sets where a RunConfig starts from: a key of BACKBONES, OpenAI's CLIP, or of PUBLISHED."""
    if word in BACKBONES:
        c.init.clip = f"models/clip_{word.removeprefix('vit_')}"
        c.model.vision.patch_size = BACKBONES[word]
    else:
        c.init.clip = f"models/{word}"


def benchmark(
    dataset: str,
    arguments: str,
    *,
    paper: tuple[int, int],
    official: tuple[int, int],
    official_b16: tuple[int, int],
    max_words: int = 32,
    max_frames: int = 12,
) -> Any:
    """Returns the RunConfig of a benchmark.

    Args:
        dataset: a --dataset of xclip_jax.prepare.
        arguments: words after the config file's name, separated by commas: encoders (BACKBONES or
            PUBLISHED), a preset, a variant of the data set, e.g. "vit_b16,official". By default the
            first of each.
        paper, official, official_b16: batch size and epochs of the paper, and of the PyTorch
            release's scripts for ViT-B/32 and ViT-B/16.
        max_words, max_frames: as in config.model.

    Raises InputError if a word is unknown, or two words are of the same kind.
    """
    kinds = [(*BACKBONES, *PUBLISHED), (*PRESETS, "best"), DATASETS[dataset].variants or ("",)]
    words = [word for word in arguments.split(",") if word]
    chosen = [[word for word in words if word in kind] for kind in kinds]
    if sum(map(len, chosen)) < len(words) or any(len(group) > 1 for group in chosen):
        groups = "; ".join(", ".join(kind) for kind in kinds if kind != ("",))
        rule = "after the colon, must be at most one word of each group"
        raise InputError(f"--config=FILE:{arguments}: {rule}: {groups}")
    backbone, preset, variant = ((*w, *kind)[0] for w, kind in zip(chosen, kinds, strict=True))
    defaults = [kind[0] for kind in kinds]
    changed = [word for word in (backbone, preset, variant) if word not in defaults]
    c = get_config()
    c.name = "_".join([dataset, *changed])
    path = f"data/{dataset}" + (f"_{variant}" if variant in changed else "")
    c.data.update(dataset=dataset, variant=variant, path=path)
    c.model.update(max_words=max_words, max_frames=max_frames)
    set_encoders(c, backbone)
    batch_size, epochs = paper
    if preset == "official":
        batch_size, epochs = official_b16 if backbone == "vit_b16" else official
        c.model.update(preset="official", param_dtype="float16", dtype="float32")
        c.optimizer.update(name="bert_adam", freeze_layers=0)
        c.train.select_by = "text_to_video"
    if preset == "best":
        c.update_from_flattened_dict(BEST)
    c.train.update(batch_size=batch_size, epochs=epochs)
    return c
