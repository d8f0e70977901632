"""Declares the fields of a model, for both the config's `model` section and model.json."""

import dataclasses
import itertools
import math
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import jax
from ml_collections import ConfigDict

from xclip_jax.similarity import GRANULARITIES, Aggregation, Granularity


class Rule(NamedTuple):
    """Constraint on the value of a config field, attached to its type with `Annotated`."""

    is_valid: Callable[[Any], bool]
    allowed: str  # completes "must be ..."


Natural = Annotated[int, Rule(lambda x: x >= 0, "a whole number of at least 0")]
Positive = Annotated[int, Rule(lambda x: x >= 1, "a whole number of at least 1")]
# Rejects sizes that fit no memory before anything is allocated.
Size = Annotated[int, Rule(lambda x: 1 <= x <= 2**16, "a whole number from 1 to 65536")]
NonNegativeFloat = Annotated[float, Rule(lambda x: 0 <= x < math.inf, "a number of at least 0")]
PositiveFloat = Annotated[float, Rule(lambda x: 0 < x < math.inf, "a number above 0")]
Head = Literal["xclip", "mean_pooling", "seq_lstm", "seq_transformer", "tight_transformer"]
Activation = Literal["quick_gelu", "gelu", "gelu_tanh", "silu", "relu"]
Granularities = Annotated[
    tuple[Granularity, ...],
    Rule(
        lambda names: names and all(names.count(n) == 1 and n in GRANULARITIES for n in names),
        f"one or more of {', '.join(GRANULARITIES)}, each once",
    ),
]


def _is_rgb(values: Any) -> bool:
    return len(values) == 3 and all(type(x) in (int, float) and math.isfinite(x) for x in values)


Rgb = Annotated[tuple[float, ...], Rule(_is_rgb, "three numbers, for red, green and blue")]
PositiveRgb = Annotated[
    tuple[float, ...], Rule(lambda x: _is_rgb(x) and min(x) > 0, "three numbers above 0")
]


@dataclasses.dataclass(frozen=True)
class PreprocessConfig:
    """Preprocessing of frames: a resize to S x S, then (x - mean) / std of RGB in [0, 1]."""

    mean: Rgb = (0.48145466, 0.4578275, 0.40821073)  # of RGB in [0, 1]; by default CLIP's
    std: PositiveRgb = (0.26862954, 0.26130258, 0.27577711)
    # crop: the short side becomes S, then the centre is taken. squash: both sides become S.
    resize: Literal["crop", "squash"] = "crop"
    interpolation: Literal["bicubic", "bilinear", "lanczos"] = "bicubic"
    spread: bool = False  # max_frames frames, spread over the whole video; else one a second


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """Blocks of a Transformer."""

    width: Size = 512  # E
    layers: Size = 12  # L
    heads: Positive = 8  # N
    mlp_width: Natural = 0  # hidden width of the MLPs; 0: 4 E
    activation: Activation | None = None  # of the MLPs; None: model.activation
    epsilon: PositiveFloat = 1e-5  # of the layer norms
    gated: bool = False  # MLPs with a gate (SwiGLU with the activation silu)
    inner_norms: bool = False  # also normalise attention and MLP before their last products
    logit_cap: NonNegativeFloat = 0.0  # c of c tanh(x / c) of attention logits x; 0: no cap


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig(BlockConfig):
    """The image or video tower, by default CLIP's B/32. Other families: models/families.py."""

    image_size: Size = 224  # S, side of a frame in pixels
    patch_size: Positive = 32  # side of a patch in pixels
    uncovered: Natural = 0  # pixels at the right and the bottom that no patch covers
    width: Size = 768
    heads: Positive = 12
    class_token: bool = True
    patch_bias: bool = False
    pre_norm: bool = True  # a layer norm before the blocks
    # Of the last block's vectors: that of the class token, or an attention pool. A video tower has
    # a pool of scaled attention (models/videoprism.py).
    pool: Literal["class_token", "attention", "scaled_attention"] = "class_token"
    pool_heads: Natural = 0  # of the attention pool; 0: heads
    pool_mlp_width: Natural = 0  # of the attention pool; 0: mlp_width
    projection: Literal["none", "linear", "bias"] = "linear"  # to D; bias: linear with a bias
    # Rotary positions of patches besides the learned ones: which coordinate has the first angles.
    rotary: Literal["none", "rows_first", "columns_first"] = "none"
    rotary_grid: Natural = 0  # scale coordinates as if there were so many rows; 0: do not
    # At another image_size; antialias: bilinear with antialiasing.
    position_resize: Literal["bicubic", "bilinear", "antialias"] = "bicubic"
    # A video tower (models/videoprism.py): learned positions of so many frames, layers over the
    # frames at each patch's place, then over all patches of all frames. 0: an image tower.
    num_frames: Natural = 0
    temporal_layers: Natural = 0
    joint_layers: Natural = 0

    @property
    def grid(self) -> int:
        """Number of patches in a row or column."""
        return self.image_size // self.patch_size

    @property
    def num_positions(self) -> int:
        """Number of patches, and of the class token if any."""
        return self.grid**2 + self.class_token


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig(BlockConfig):
    """The text tower, by default CLIP's."""

    vocab_size: Natural = 49408  # CLIP's byte-level BPE; 0: size of the data set's tokenizer
    context_length: Size = 77  # positions of the text tower and of the temporal encoder
    causal: bool = True  # a position attends to earlier ones only, else to all, padding included
    # Position of the sentence: the largest id, the first that is `end_id`, the last of W, or that
    # of a class token after them (models/videoprism.py).
    pool: Literal["argmax", "end", "last", "class_token"] = "argmax"
    end_id: Natural = 0
    start_token: bool = True  # texts begin with a start token
    end_token: bool = True  # texts end with an end token
    projection: Literal["none", "linear", "bias"] = "linear"  # to D; bias: linear with a bias


@dataclasses.dataclass(frozen=True)
class TemporalConfig:
    """The temporal encoder, whose sizes also apply to the Transformers of heads and fusion."""

    type: Literal["none", "transformer", "lstm"] = "transformer"  # Table 8
    # L of the transformer; 0: by the preset
    layers: Annotated[int, Rule(lambda x: 0 <= x <= 2**16, "a whole number from 0 to 65536")] = 0
    heads: Positive = 8  # N of the transformer
    residual: bool | None = None  # add CLIP's frame features to the output; None: by the preset


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Architecture of an X-CLIP model (https://arxiv.org/abs/2207.07285) or of a baseline."""

    preset: Literal["paper", "official"] = "paper"  # the paper or its PyTorch release
    # xclip, or a head of CLIP4Clip (https://arxiv.org/abs/2104.08860)
    head: Head = "xclip"
    towers: Literal["both", "vision", "text"] = "both"  # one: a half of a model, see convert
    embed_dim: Size = 512  # D, width of the joint embedding space
    activation: Activation = "quick_gelu"  # of every transformer that states no other
    max_scale: NonNegativeFloat = 100.0  # limit of the factor from cosines to logits; 0: none
    max_words: int = 32  # W, tokens of a text, start and end included; longer texts are truncated
    max_frames: Size = 12  # F, frames of a video; longer videos are sampled uniformly
    granularities: Granularities = GRANULARITIES  # similarities that are averaged (Table 6)
    # AOSM, an alternative of Table 7, or a token interaction of later papers (similarity.py).
    aggregation: Aggregation = "attention"
    tau: PositiveFloat = 0.01  # temperature of AOSM (Table 9)
    tau_learned: bool = False  # train the temperature, from `tau` on
    logit_bias: bool = False  # learned offset of logits, of the sigmoid loss; loss.kind sets it
    fusion: Literal["mean", "transformer"] = "mean"  # of the granularities (Eq. 14, Table 14)
    # None in the next four: by the preset.
    # Frames that texts are compared with: the temporal encoder's output (Eq. 1) or CLIP's.
    frame_features: Literal["temporal", "clip"] | None = None
    words: Literal["word_tokens", "all_tokens"] | None = None  # all_tokens: with start and end
    padding: Literal["masked", "competes"] | None = None  # competes: padding takes part in AOSM
    matrices: bool | None = None  # the release's eight learned matrices, tied to the lengths
    # Compute type of the towers; auto: float32 on CPU, bfloat16 on accelerators.
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    # Type in which training stores CLIP's matrices and their moments. float16: as the release.
    param_dtype: Literal["float32", "float16"] = "float32"
    # Recomputation in the backward pass: of whole layers, or of all but their matrix products;
    # auto: the least with which the step fits the devices (fitting.py).
    remat: Literal["auto", "none", "layers", "dots"] = "auto"
    vision: VisionConfig = VisionConfig()
    text: TextConfig = TextConfig()
    temporal: TemporalConfig = TemporalConfig()
    preprocess: PreprocessConfig = PreprocessConfig()

    @property
    def compute_dtype(self) -> str:
        """The compute type on this machine's devices."""
        if self.dtype != "auto":
            return self.dtype
        return "float32" if jax.default_backend() == "cpu" else "bfloat16"

    @property
    def has_granularities(self) -> bool:
        """True if scores are means of granularities, not outputs of a Transformer for each pair."""
        return self.fusion == "mean" and self.head != "tight_transformer"

    def resolve(self) -> "ModelConfig":
        """Returns a copy in which all fields that preset and head determine are set."""
        return _replace(_replace(self, PRESETS[self.preset], only_unset=True), HEADS[self.head])

    def blocks(self, part: Literal["vision", "text", "temporal"]) -> BlockConfig:
        """Returns the blocks of a part, with their activation set.

        Those of `temporal` are also the blocks of Transformers over pairs.
        """
        t = self.temporal
        options: Any = {"epsilon": self.text.epsilon, "logit_cap": self.text.logit_cap}
        encoder = BlockConfig(width=self.embed_dim, layers=t.layers, heads=t.heads, **options)
        blocks = {"vision": self.vision, "text": self.text, "temporal": encoder}[part]
        return dataclasses.replace(blocks, activation=blocks.activation or self.activation)

    def cells_per_pair(self, num_words: int, num_frames: int) -> int:
        """Returns the approximate number of floats in memory to score one text-video pair."""
        if self.has_granularities:
            return num_words * num_frames
        tokens = num_frames + (1 if self.head == "tight_transformer" else 2 + num_words)
        return 8 * self.embed_dim * tokens


Checks = Iterator[tuple[str, Any, str]]  # (field, is valid, allowed values)
_TYPES = {int: "a whole number", float: "a number", bool: "True or False", str: "a text"}
_TYPES |= {tuple: "a tuple", ConfigDict: "a group of fields"}


def check_types(config: Any, section: Any, prefix: str = "") -> Checks:
    """Checks each field against the type and rules that a dataclass, `section`, declares.

    A group of fields, a ConfigDict or a dataclass, is checked before its fields.
    """
    for name, hint in get_type_hints(section, include_extras=True).items():
        field, value, suffix, rules = prefix + name, getattr(config, name), "", ()
        if type(None) in get_args(hint):  # X | None, or X | Literal["auto"] | None
            hint, *others = get_args(hint)
            is_automatic = len(others) > 1 and isinstance(value, str) and value == "auto"
            if value is None or is_automatic:
                continue
            suffix = " or auto" if len(others) > 1 else " (or None: by the preset)"
        if get_origin(hint) is Annotated:
            hint, *rules = get_args(hint)
        if get_origin(hint) is Literal:
            yield field, value in get_args(hint), f"one of {', '.join(get_args(hint))}{suffix}"
            continue
        is_group = dataclasses.is_dataclass(hint)
        kind = ConfigDict if is_group else get_origin(hint) or hint
        is_kind = isinstance(value, kind) and isinstance(value, bool) == (kind is bool)
        is_kind |= is_group and isinstance(value, hint)
        yield field, is_kind, _TYPES[kind] + suffix
        for rule in rules:
            yield field, rule.is_valid(value), rule.allowed + suffix
        if is_group:
            yield from check_types(value, hint, f"{field}.")


def check_sizes(m: ModelConfig) -> Checks:
    """Checks fields that depend on others, once all have their declared types."""
    side = m.vision.image_size
    covered = side - m.vision.uncovered
    yield "vision.uncovered", m.vision.uncovered < m.vision.patch_size, "below vision.patch_size"
    fits = covered > 0 and covered % m.vision.patch_size == 0
    yield "vision.patch_size", fits, f"a divisor of {covered}"
    towers = [("vision", m.vision, m.vision.width), ("text", m.text, m.text.width)]
    if m.temporal.type == "transformer" or not m.has_granularities:
        towers.append(("temporal", m.temporal, m.embed_dim))
    for name, tower, width in towers:
        yield f"{name}.heads", width % tower.heads == 0, f"a divisor of the width {width}"
    v, t = m.vision, m.text
    pools = v.width % (v.pool_heads or v.heads) == 0
    yield "vision.pool_heads", pools, f"a divisor of the width {v.width}"
    pools = ("scaled_attention",) if v.num_frames else ("attention",)
    pools += ("class_token",) if v.class_token and not v.num_frames else ()
    yield "vision.pool", v.pool in pools, f"{' or '.join(pools)} in this tower"
    layered = bool(v.temporal_layers) == bool(v.num_frames)
    yield "vision.temporal_layers", layered, "above 0 if and only if vision.num_frames is"
    yield "vision.joint_layers", v.num_frames or not v.joint_layers, "0 without vision.num_frames"
    turns = v.rotary == "none" or v.width // v.heads % 4 == 0
    yield "vision.rotary", turns, "none where a head is not a multiple of 4 wide"
    projects = v.projection != "none" and v.num_frames
    yield "vision.projection", not projects, "none in a video tower"
    yield "text.causal", t.causal or t.pool != "class_token", "True with a class token"
    for name, tower in (("vision", v), ("text", t)):
        fits = tower.projection != "none" or tower.width == m.embed_dim
        allowed = f"linear or bias to project width {tower.width} to {m.embed_dim}"
        yield f"{name}.projection", fits, allowed
    is_id = not t.vocab_size or t.end_id < t.vocab_size
    yield "text.end_id", is_id, f"below text.vocab_size = {t.vocab_size}"
    whole = m.towers == "both" or (m.head == "mean_pooling" and m.fusion == "mean")
    yield "towers", whole, "both unless model.head = mean_pooling"
    attends = m.aggregation == "attention"
    yield "aggregation", attends or not m.matrices, "attention where model.matrices = True"
    aggregates = m.has_granularities and m.granularities != ("video_sentence",)
    learns = not m.tau_learned or (attends and aggregates)
    yield "tau_learned", learns, "False where nothing is aggregated by attention"
    is_used = aggregates or m.aggregation not in ("weighted", "maxsim")
    yield "aggregation", is_used, "attention where neither words nor frames are aggregated"
    longest, context = m.text.context_length, "model.text.context_length"
    yield "max_words", 3 <= m.max_words <= longest, f"from 3 to {context} = {longest}"
    padded = t.pool != "last" or m.max_words == longest
    yield "max_words", padded, f"{context} = {longest} where model.text.pool = last"


# The paper's text and what its PyTorch release computes (docs/paper-vs-code.md).
PRESETS = {
    "paper": {
        **{"frame_features": "temporal", "words": "word_tokens", "padding": "masked"},
        **{"matrices": False, "temporal": {"layers": 3, "residual": False}},
    },
    "official": {
        **{"frame_features": "clip", "words": "all_tokens", "padding": "competes"},
        **{"matrices": True, "temporal": {"layers": 4, "residual": True}},
    },
}
# CLIP4Clip's heads: the cosine of sentence and video, or a Transformer for each pair.
_COSINE = {"granularities": ("video_sentence",), "fusion": "mean", "matrices": False}
HEADS = {
    "xclip": {},
    "mean_pooling": {**_COSINE, "temporal": {"type": "none"}},
    "seq_lstm": {**_COSINE, "temporal": {"type": "lstm", "residual": True}},
    "seq_transformer": {**_COSINE, "temporal": {"type": "transformer", "residual": True}},
    "tight_transformer": {**_COSINE, "temporal": {"type": "none"}},
}
# Missing in earlier model.json.
_ADDED_FIELDS = {"preprocess": {}, "tau_learned": False, "logit_bias": False}
_ADDED_FIELDS |= {"param_dtype": "float32", "towers": "both", "max_scale": 100.0}
_FORMER_FIELDS = ("frame_features", "words", "padding", "matrices", "temporal.residual")
_FORMER_VALUES = {"": None, "none": False, "learned": True, "no": False, "yes": True}


def upgrade_value(field: str, value: Any) -> Any:
    """Returns the current form of a value in an earlier config.json or model.json."""
    former = field.removeprefix("model.") in _FORMER_FIELDS
    return _FORMER_VALUES.get(value, value) if former else value


def read_model_config(fields: Any) -> ModelConfig:
    """Returns the ModelConfig of config.model or of model.json.

    The config is resolved: no field is None. Entries that are not its fields are ignored.

    Raises:
        KeyError, TypeError: a field is missing, or a section has an unknown one.
        ValueError: model.json states another image size in its entry preprocess.
    """
    names = [field.name for field in dataclasses.fields(ModelConfig)]
    fields = {**_ADDED_FIELDS, **fields}
    values = {name: upgrade_value(f"model.{name}", fields[name]) for name in names}
    sections = {"vision": VisionConfig, "text": TextConfig, "temporal": TemporalConfig}
    for name, section in sections.items():
        upgraded = {k: upgrade_value(f"model.{name}.{k}", v) for k, v in values[name].items()}
        values[name] = section(**upgraded)
    preprocess, side = dict(values["preprocess"]), values["vision"].image_size
    if (stated := preprocess.pop("image_size", side)) != side:  # model.json repeats it
        raise ValueError(f"preprocess.image_size = {stated!r}: must be {side!r}")
    for name in {"mean", "std"} & preprocess.keys():
        preprocess[name] = tuple(preprocess[name])
    values["preprocess"] = PreprocessConfig(**preprocess)
    values["granularities"] = tuple(values["granularities"])
    return ModelConfig(**values).resolve()


def check_model(config: ModelConfig) -> None:
    """Checks a ModelConfig, or raises ValueError that names the first wrong field."""
    checks = itertools.chain(check_types(config, ModelConfig), check_sizes(config))
    for field, is_valid, allowed in checks:
        if not is_valid:
            value = operator.attrgetter(field)(config)
            raise ValueError(f"{field} = {value!r:.99}: must be {allowed}")


def _replace(config: Any, values: Mapping[str, Any], *, only_unset: bool = False) -> Any:
    """Returns a copy of a config with all `values` set, or only those that were None or 0."""
    changes = {}
    for name, value in values.items():
        current = getattr(config, name)
        if isinstance(value, Mapping):
            changes[name] = _replace(current, value, only_unset=only_unset)
        elif not only_unset or current is None or (current == 0 and current is not False):
            changes[name] = value
    return dataclasses.replace(config, **changes)
