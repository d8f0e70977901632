"""Every field of a run with its default; the files in configs/ change only what differs.

`validate` is called once at the start and answers a mistake with the field, its value and what is
allowed. Defaults are the paper's settings for MSR-VTT with ViT-B/32
(https://arxiv.org/abs/2207.07285, Sec. 4).
"""

import json
import math

from ml_collections import ConfigDict

from xclip_jax.cli import InputError
from xclip_jax.data.benchmarks import DATASETS
from xclip_jax.models import HEADS, PRESETS, resolve
from xclip_jax.models.clip import ACTIVATIONS, REMAT
from xclip_jax.models.temporal import TEMPORAL_ENCODERS
from xclip_jax.optimizer import OPTIMIZERS
from xclip_jax.similarity import AGGREGATIONS, GRANULARITIES

# A run may be resumed with other values of these: they do not change the course of training.
FREE_FIELDS = (
    "mode",
    "mesh",
    "log",
    "report",
    "eval",
    "data.path",
    "train.micro_batch",
    "train.checkpoint_every",
    "loss.block_cells",
    "model.remat",
)


def get_config():
    """The default configuration, locked: an unknown field is an error."""
    c = ConfigDict()
    c.name = "xclip"  # of the run: its work directory is runs/NAME
    c.mode = "train"  # train (and evaluate) | eval: only evaluate the selected weights
    c.seed = 0  # initial weights and the order of the data

    c.model = model = ConfigDict()
    model.preset = "paper"  # which reading of X-CLIP: paper | official (the PyTorch release)
    # xclip | CLIP4Clip's mean_pooling, seq_lstm, seq_transformer, tight_transformer
    model.head = "xclip"
    model.embed_dim = 512  # D, width of the joint space
    model.activation = "quick_gelu"  # of every transformer: quick_gelu | gelu
    model.max_words = 32  # W, tokens a text, start and end included; longer texts are cut
    model.max_frames = 12  # F, frames a video; more are thinned out uniformly
    model.granularities = GRANULARITIES  # which similarities are averaged (Table 6)
    model.aggregation = (
        "attention"  # attention | max-max | mean-mean | mean-max | max-mean (Table 7)
    )
    model.tau = 0.01  # temperature of AOSM (Table 9)
    model.fusion = "mean"  # of the granularities (Eq. 14), or transformer (Table 14)
    # The next four: "" as the preset says.
    model.frame_features = ""  # frames that texts are compared with: temporal (Eq. 1) | clip
    model.words = ""  # word_tokens | all_tokens: start and end tokens count as words too
    model.padding = ""  # masked | competes: padded words and frames take part in AOSM
    model.matrices = ""  # none | learned: the release's eight matrices, tied to the lengths
    model.dtype = "float32"  # compute type of the towers: float32 | bfloat16
    # Less memory, more time: none | layers (computed again in the backward pass) | dots (but for
    # their matrix products)
    model.remat = "none"
    model.vision = vision = ConfigDict()
    vision.image_size = 224  # S, side of a frame in pixels
    vision.patch_size = 32  # side of a patch in pixels
    vision.width = 768  # E of the image tower
    vision.layers = 12  # L of the image tower
    vision.heads = 12  # N of the image tower
    model.text = text = ConfigDict()
    text.vocab_size = 49408  # CLIP's byte-level BPE; 0: the size of the data set's tokenizer
    text.context_length = 77  # positions the text tower and the temporal encoder have
    text.width = 512  # E of the text tower
    text.layers = 12  # L of the text tower
    text.heads = 8  # N of the text tower
    model.temporal = temporal = ConfigDict()
    temporal.type = "transformer"  # none | transformer | lstm (Table 8)
    temporal.layers = 0  # of the transformer, also of heads and fusions; 0: as the preset says
    temporal.heads = 8  # of the transformer, also of heads and fusions
    temporal.residual = ""  # yes | no: CLIP's frames are added to the output; "": by the preset

    c.data = data = ConfigDict()
    data.path = ""  # folder that xclip_jax.prepare wrote
    data.dataset = ""  # what it must hold: a --dataset of xclip_jax.prepare; "": anything
    data.variant = ""  # and which --split of it; "": any
    data.rendered = 0  # training scenes of the demo, rendered and prepared there if it is missing
    data.train_split = "train"  # split to train on
    data.val_split = "val"  # split to validate on, if the data set has it; "": none
    data.test_split = "test"  # split of the final table, if the data set has it; else train_split
    data.max_videos = 0  # train on so many videos, drawn once for all seeds; 0: on all
    data.captions = "all"  # all: each caption its own pair | random: one a video and epoch

    c.train = train = ConfigDict()
    train.batch_size = 300  # B, pairs a step, over all devices
    train.micro_batch = 0  # pairs the towers see at once (gradient caching); 0: the batch
    train.epochs = 3  # passes over the pairs; 0: the weights it starts from are evaluated
    # Which weights are kept: val (the best on val_split; the last where there is none) | last |
    # test (the best on test_split, as the PyTorch release does; the results say so).
    train.select = "val"
    train.eval_every = 0  # steps between validations; 0: once an epoch
    train.checkpoint_every = 500  # steps between checkpoints besides those of the evaluations

    c.loss = loss = ConfigDict()
    loss.same_video = "negative"  # two captions of a video in a batch: negative | ignore
    loss.block_cells = 0  # word-frame cells a device holds at once in the loss; 0: 2^26
    loss.scale = 0.0  # factor of Eq. 17; 0: as the preset says, 1 (paper) or 0.5 (official)

    c.init = init = ConfigDict()
    init.clip = ""  # model directory whose CLIP towers training starts from; "": random weights

    c.optimizer = optimizer = ConfigDict()
    optimizer.name = "adamw"  # adamw | bert_adam (the release's)
    optimizer.freeze_layers = -1  # of CLIP: -1 none; 0 the embeddings; n also the first n blocks
    optimizer.lr = 1e-4  # peak learning rate of what is new
    optimizer.encoder_lr = 1e-7  # peak learning rate of CLIP's towers and the logit scale
    optimizer.warmup = 0.1  # share of the steps with rising rate; then a cosine to 0
    optimizer.weight_decay = 0.2  # decoupled (AdamW), matrices only; 0: plain Adam
    optimizer.b1 = 0.9  # Adam's decay of the gradient's mean
    optimizer.b2 = 0.98  # Adam's decay of the gradient's square
    optimizer.eps = 1e-6  # Adam's epsilon
    optimizer.clip_norm = 1.0  # largest global norm of the gradient

    c.eval = evaluation = ConfigDict()
    evaluation.batch_size = 64  # texts or videos encoded at once
    evaluation.dual_softmax = False  # also print the metrics with dual softmax
    evaluation.qb_norm = 0  # and with QB-Norm by a bank of so many training captions; 0: without
    evaluation.block_cells = 0  # word-frame cells computed at once; 0: what suits the device

    c.mesh = mesh = ConfigDict()
    mesh.data = -1  # devices along which only the batch is split; -1: as many as there are
    mesh.fsdp = 1  # devices along which large parameters and their optimizer state are split too

    c.log = log = ConfigDict()
    log.every = 10  # steps between lines of metrics.jsonl
    log.profile_from = 0  # first step of a profile for TensorBoard; 0: none
    log.profile_to = 0  # its last step
    log.tensorboard = True  # write TensorBoard files too

    c.report = report = ConfigDict()
    report.attention_pairs = 4  # word-by-frame heat maps in the report
    return c.lock()


def validate(c):
    """Raises InputError naming the field, its value and what is allowed, for the first mistake."""
    _types(c, get_config())
    _one_of(c, "mode", ("train", "eval"))
    _one_of(c, "model.preset", PRESETS)
    _one_of(c, "model.head", HEADS)
    _one_of(c, "model.fusion", ("mean", "transformer"))
    for field, allowed in _BY_PRESET.items():
        _one_of(c, field, ("", *allowed))
    _one_of(c, "model.activation", ACTIVATIONS)
    _one_of(c, "model.aggregation", AGGREGATIONS)
    _one_of(c, "model.dtype", ("float32", "bfloat16"))
    _one_of(c, "model.remat", ("none", *REMAT))
    _one_of(c, "model.temporal.type", TEMPORAL_ENCODERS)
    _one_of(c, "data.captions", ("all", "random"))
    _one_of(c, "data.dataset", ("", *DATASETS))
    _one_of(c, "data.variant", ("", *(DATASETS[c.data.dataset].variants if c.data.dataset else ())))
    _one_of(c, "train.select", ("val", "last", "test"))
    _one_of(c, "loss.same_video", ("negative", "ignore"))
    _one_of(c, "optimizer.name", OPTIMIZERS)
    _check(c, "optimizer.freeze_layers", lambda x: x >= -1, "-1 or a number of layers")
    _check(c, "loss.scale", lambda x: 0 <= x < math.inf, "a number of at least 0")
    _granularities(c)
    for field in _POSITIVE_INTEGERS:
        _check(c, field, lambda x: x >= 1, "a whole number of at least 1")
    for field in _NATURAL_NUMBERS:
        _check(c, field, lambda x: x >= 0, "a whole number of at least 0")
    for field in ("model.tau", "optimizer.lr", "optimizer.encoder_lr", "optimizer.eps"):
        _check(c, field, lambda x: 0 < x < math.inf, "a number above 0")
    _check(c, "optimizer.clip_norm", lambda x: x > 0, "a number above 0")
    _check(c, "optimizer.weight_decay", lambda x: 0 <= x < math.inf, "a number of at least 0")
    for field in ("optimizer.b1", "optimizer.b2", "optimizer.warmup"):
        _check(c, field, lambda x: 0 <= x < 1, "a number from 0 to below 1")
    for field in _WIDTHS:
        _check(c, field, lambda x: x <= 2**16, "at most 65536")
    _check(c, "mesh.data", lambda x: x == -1 or x >= 1, "-1 (all devices) or a number of devices")
    at_least = f"at least log.profile_from = {c.log.profile_from}"
    both = "at least 1 where log.profile_to is set"
    _check(c, "log.profile_from", lambda x: x > 0 or not c.log.profile_to, both)
    _check(c, "log.profile_to", lambda x: x >= c.log.profile_from, at_least)
    _sizes(c.model)


_BY_PRESET = {
    "model.frame_features": ("temporal", "clip"),
    "model.words": ("word_tokens", "all_tokens"),
    "model.padding": ("masked", "competes"),
    "model.matrices": ("none", "learned"),
    "model.temporal.residual": ("yes", "no"),
}
_POSITIVE_INTEGERS = (
    *(f"model.{name}" for name in ("embed_dim", "max_frames")),
    *(f"model.vision.{name}" for name in ("image_size", "patch_size", "width", "layers", "heads")),
    *(f"model.text.{name}" for name in ("context_length", "width", "layers", "heads")),
    "model.temporal.heads",
    "mesh.fsdp",
    *(f"train.{name}" for name in ("batch_size", "checkpoint_every")),
    "eval.batch_size",
    "log.every",
)
_WIDTHS = (  # what no memory could hold is refused before it is tried
    *("model.embed_dim", "model.max_frames", "train.batch_size", "model.vision.image_size"),
    *("model.vision.width", "model.vision.layers", "model.text.width", "model.text.layers"),
    *("model.text.context_length", "model.temporal.layers"),
)
_NATURAL_NUMBERS = (
    "seed",
    "data.max_videos",
    "train.epochs",
    "train.eval_every",
    "train.micro_batch",
    "loss.block_cells",
    "model.text.vocab_size",
    "model.temporal.layers",
    "eval.block_cells",
    "eval.qb_norm",
    "data.rendered",
    "report.attention_pairs",
    "log.profile_from",
    "log.profile_to",
)


def field_value(config, field):
    """The value of a dotted field such as `model.vision.width`."""
    for name in field.split("."):
        config = config[name]
    return config


def _fail(field, value, allowed):
    raise InputError(f"config.{field} = {value!r}: must be {allowed}")


def _check(c, field, test, allowed):
    value = field_value(c, field)
    if not test(value):
        _fail(field, value, allowed)


def _one_of(c, field, allowed):
    _check(c, field, lambda value: value in allowed, f"one of {', '.join(allowed)}")


def _types(config, defaults, prefix=""):
    """Refuses what ml_collections lets pass: None in any field, a bool for a number."""
    for name, default in defaults.items():
        value = config[name]
        is_bool = isinstance(value, bool), isinstance(default, bool)
        if not isinstance(value, type(default)) or is_bool[0] != is_bool[1]:
            _fail(prefix + name, value, _TYPES[type(default)])
        if isinstance(default, ConfigDict):
            _types(value, default, f"{prefix}{name}.")


_TYPES = {
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    str: "a text",
    tuple: "a tuple",
    ConfigDict: "a group of fields",
}


def _granularities(c):
    names = c.model.granularities
    known = all(name in GRANULARITIES for name in names)
    if not (names and known and len(set(names)) == len(names)):
        _fail("model.granularities", names, f"one or more of {', '.join(GRANULARITIES)}")


def _sizes(m):
    """Checks how the sizes of the model fit together."""
    if m.vision.image_size % m.vision.patch_size:
        _fail("model.vision.patch_size", m.vision.patch_size, f"a divisor of {m.vision.image_size}")
    towers = {"vision": m.vision.width, "text": m.text.width}
    head = resolve(json.loads(m.to_json()))
    pairwise = "transformer" in (head["fusion"], head["temporal"]["type"])
    if pairwise or m.head == "tight_transformer":
        towers["temporal"] = m.embed_dim
    for tower, width in towers.items():
        if width % m[tower].heads:
            _fail(f"model.{tower}.heads", m[tower].heads, f"a divisor of the width {width}")
    if head["matrices"] == "learned" and m.aggregation != "attention":
        _fail("model.aggregation", m.aggregation, "attention where model.matrices are learned")
    if not 3 <= m.max_words <= m.text.context_length:
        allowed = f"from 3 to model.text.context_length = {m.text.context_length}"
        _fail("model.max_words", m.max_words, allowed)
    if m.max_frames > m.text.context_length:
        allowed = f"at most model.text.context_length = {m.text.context_length}"
        _fail("model.max_frames", m.max_frames, allowed)


BACKBONES = {"vit_b32": 32, "vit_b16": 16}  # -> patch size


def benchmark(dataset, arguments, paper, official, official_b16, max_words=32, max_frames=12):
    """The config of a benchmark.

    Args:
        dataset: a --dataset of xclip_jax.prepare.
        arguments: words after the config file's name, with commas between them: a backbone, a
            preset, a variant of the data set; e.g. "vit_b16,official". Defaults: the first of each.
        paper, official, official_b16: (batch size, epochs) of the paper, and of the release's
            scripts for each backbone.
        max_words, max_frames: lengths.

    Raises:
        InputError: an unknown word, or two of a kind.
    """
    kinds = tuple(BACKBONES), tuple(PRESETS), DATASETS[dataset].variants
    backbone, preset, variant = chosen = _choose(arguments, kinds)
    unusual = [
        word for word, kind in zip(chosen, kinds, strict=True) if word not in ("", *kind[:1])
    ]
    c = get_config()
    c.name = "_".join([dataset, *unusual])
    c.data.dataset, c.data.variant = dataset, variant
    c.data.path = f"data/{dataset}" + (f"_{variant}" if variant in unusual else "")
    c.init.clip = f"models/clip_{backbone.removeprefix('vit_')}"
    c.model.vision.patch_size = BACKBONES[backbone]
    c.model.update(max_words=max_words, max_frames=max_frames)
    batch_size, epochs = paper
    if preset == "official":
        batch_size, epochs = official_b16 if backbone == "vit_b16" else official
        c.model.preset = "official"
        c.optimizer.update(name="bert_adam", freeze_layers=0)
    c.train.update(batch_size=batch_size, epochs=epochs)
    return c


def _choose(arguments, kinds):
    """For each kind the word that is given, or its first (or ""), whatever the words' order."""
    words = [word for word in arguments.split(",") if word]
    known = [word for kind in kinds for word in kind]
    chosen = [[word for word in words if word in kind] for kind in kinds]
    if not set(words) <= set(known) or any(len(few) > 1 for few in chosen):
        raise InputError(
            f"--config=FILE:{arguments}: after the colon, at most one of each of "
            + "; ".join(", ".join(kind) for kind in kinds if kind)
        )
    defaults = [kind[0] if kind else "" for kind in kinds]
    return [few[0] if few else default for few, default in zip(chosen, defaults, strict=True)]
