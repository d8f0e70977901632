"""Imports PyTorch checkpoints of any supported kind into model directories, without PyTorch."""

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.numpy import load_file

from xclip_jax.checkpoint import init_params, save_model
from xclip_jax.cli import InputError, first_line, list_some
from xclip_jax.convert.mapping import BUFFERS, UNREAD, from_hugging_face, to_params
from xclip_jax.convert.settings import Settings, read_hugging_face, read_object, read_open_clip
from xclip_jax.convert.torch_archive import Archive, read_archive
from xclip_jax.data import text
from xclip_jax.models import ModelConfig, XClip
from xclip_jax.models.config import PreprocessConfig, TemporalConfig, TextConfig, VisionConfig

HUB_FILES = ["config.json", "preprocessor_config.json", "model*.safetensors"]
HUB_FILES += ["model.safetensors.index.json", *text.HUB_FILES]
MAX_IMAGE_SIZE = 4096  # in pixels, far above any CLIP: limits what a corrupted file allocates
_MATRICES = {
    "max_words": ("word_logit_weight", "word_mat_weight", "word_mat_weight2"),
    "max_frames": ("frame_logit_weight", "frame_mat_weight", "frame_mat_weight2"),
}
_HEADS: dict[str, Any] = {  # by the module of a tensor; the last that occurs counts
    "": "mean_pooling",
    "lstm_visual": "seq_lstm",
    "transformerClip": "seq_transformer",
    "global_mat_weight": "xclip",
    "cross": "tight_transformer",  # X-CLIP saves its matrices with this head, too
}
_HUB_ID = r"[\w.-]+/[\w.-]+"  # how the hub names models
_PREFIXES = ("module.", "model.")  # before the names of wrapped models
OPENAI = "OpenAI's CLIP"  # also in the official models
OPEN_CLIP_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")


@dataclass(frozen=True)
class Options:
    """Options of `convert`, by default determined by the checkpoint."""

    vocab: str | Path | None = None  # tokenizer, as in `load_tokenizer`; else the source's, if any
    head: Literal["mean_pooling", "xclip"] | None = None  # of plain CLIP; else mean_pooling
    # A file beside the weights may state the next four. Where none does, the activation is
    # required, except for OpenAI's and the official weights, and so are heads of towers wider than
    # 1024; those of others are width / 64, and images are normalised as for CLIP.
    activation: Literal["quick_gelu", "gelu"] | None = None
    vision_heads: int | None = None
    text_heads: int | None = None
    preprocess: PreprocessConfig | None = None
    # The lengths of the learned matrices, if any.
    max_words: int | None = None
    max_frames: int | None = None
    crop_matrices: bool = False  # crop learned matrices to shorter lengths

    def __post_init__(self) -> None:
        for name in ("vision_heads", "text_heads", "max_words", "max_frames"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise InputError(f"--{name}={value}: must be at least 1")
        if self.crop_matrices and not (self.max_words or self.max_frames):
            raise InputError("--crop_matrices requires --max_words or --max_frames")


class Source(NamedTuple):
    """A checkpoint as it was read, before its architecture is inferred."""

    kind: str  # a description to print
    official: bool  # True for X-CLIP and CLIP4Clip, False for plain CLIP
    tensors: dict[str, np.ndarray]  # by official name
    options: Options = Options()  # with what the source sets


@dataclass(frozen=True, kw_only=True)
class Imported:
    """A model read from a PyTorch checkpoint."""

    kind: str  # a description of the checkpoint to print
    config: ModelConfig
    params: Any
    tokenizer: text.Tokenizer | None
    unread: dict[str, np.ndarray]  # weights that the release saves and never uses
    skipped: list[str]  # tensors that are no weights


def import_model(source: str | Path, options: Options = Options()) -> Imported:
    """Reads a checkpoint file, a Hugging Face folder or a hub id as a model.

    Raises InputError if the source cannot be read, is of an unknown kind or does not fit.
    """
    read = read_source(source, options)
    config, vocab, tokenizer = infer(read), read.options.vocab, None
    shapes = jax.eval_shape(lambda: init_params(XClip(config), 0))
    params, unused = to_params(read.tensors, shapes)
    unread = {name: unused.pop(name) for name in UNREAD if name in unused}
    skipped = [name for name in unused if BUFFERS.fullmatch(name)]
    if unknown := sorted(unused.keys() - skipped):
        raise InputError(f"{source}: unknown weights: {list_some(unknown)}")
    if vocab is not None:
        tokenizer, size = text.load_tokenizer(vocab, config.max_words), config.text.vocab_size
        if (ids := tokenizer.vocab_size) > size:
            raise InputError(f"{vocab} has {ids} ids, but the text tower has {size}")
    model = {"config": config, "params": params, "tokenizer": tokenizer}
    return Imported(kind=read.kind, **model, unread=unread, skipped=skipped)


def convert(source: str | Path, output: str | Path, options: Options = Options()) -> None:
    """Converts a checkpoint to a model directory, atomically, and prints a summary.

    Args:
        source: checkpoint file, Hugging Face folder or hub id.
        output: folder to write.
        options: settings that the checkpoint does not store.

    Raises InputError as `import_model`.
    """
    model = import_model(source, options)
    config, tokenizer = model.config, model.tokenizer
    extra = {"tokenizer": tokenizer, "unread": model.unread, "extra": {"step": 0}}
    save_model(output, config, model.params, **extra)
    v, t, temporal = config.vision, config.text, config.temporal.type
    layers = f", {config.temporal.layers} layers" if temporal == "transformer" else ""
    ids = "none: texts cannot be encoded; convert again with --vocab"
    ids = ids if tokenizer is None else f"{tokenizer.vocab_size} ids"
    total = sum(leaf.size for leaf in jax.tree.leaves(model.params))
    mean, std = (", ".join(f"{x:.3g}" for x in vars(config.preprocess)[n]) for n in ("mean", "std"))
    print(f"{model.kind}: {total / 1e6:.1f} M parameters")
    print(f"""\
  activation   {config.activation}
  images       mean {mean}; standard deviation {std}
  image tower  {v.image_size} px, patch {v.patch_size}, width {v.width}, {v.layers} layers, \
{v.heads} heads
  text tower   {t.vocab_size} ids, {t.context_length} positions, width {t.width}, {t.layers} \
layers, {t.heads} heads
  head         {config.head} (preset {config.preset}; temporal encoder {temporal}{layers})
  lengths      {config.max_words} words, {config.max_frames} frames
  tokenizer    {ids}""")
    if model.unread:
        print(f"  kept unread  {', '.join(model.unread)} (saved by the release, never used)")
    if model.skipped:
        print(f"  skipped      {', '.join(model.skipped).replace('clip.', '')} (no weights)")
    print(f"wrote {output}")


def is_importable(source: str | Path) -> bool:
    """Returns True for a file, a folder as `convert` takes it, and what may be a hub id."""
    path = Path(source)
    if path.is_dir():
        # A work directory has a config.json of its own.
        if (path / "checkpoints").is_dir() or (path / "train.lock").exists():
            return False
        return any((path / name).is_file() for name in ("config.json", *OPEN_CLIP_FILES))
    return path.is_file() or re.fullmatch(_HUB_ID, str(source)) is not None


def read_source(path: str | Path, options: Options = Options()) -> Source:
    """Reads a checkpoint file, a Hugging Face folder or a hub id.

    Raises InputError if the checkpoint is missing, cannot be read or is of an unknown kind.
    """
    location = Path(path)
    if not str(path).strip():
        raise InputError("--input is empty")
    if location.is_dir():
        return _read_folder(location, options)
    if location.is_file():
        return _classify(_load(location), location, options)
    if not re.fullmatch(_HUB_ID, str(path)):
        raise InputError(f"{path}: no such file or folder")
    try:
        location = Path(snapshot_download(str(path), allow_patterns=HUB_FILES))
    except Exception as error:  # many types, from no network to no such repository
        raise InputError(
            f"{path}: no such file or folder, nor on the Hugging Face hub ({first_line(error)}). "
            "Download config.json, model.safetensors and the tokenizer's files from "
            f"https://huggingface.co/{path} into a folder and pass that"
        ) from None
    return _read_folder(location, options)


def _load(path: Path) -> Archive:
    if path.suffix != ".safetensors":
        return read_archive(path)
    try:
        return Archive(load_file(path))
    except (SafetensorError, ValueError, TypeError, KeyError, OverflowError) as error:
        raise InputError(f"{path}: not a complete safetensors file: {error}") from None


def _strip_prefixes(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Removes what torch.compile, DataParallel and averaged models put before all names."""
    pairs = ((name.replace("_orig_mod.", ""), array) for name, array in tensors.items())
    tensors = {name: array for name, array in pairs if name != "n_averaged"}
    while prefix := next((p for p in _PREFIXES if all(n.startswith(p) for n in tensors)), None):
        tensors = {name.removeprefix(prefix): array for name, array in tensors.items()}
        if not tensors:
            break
    return tensors


def _classify(archive: Archive, path: Path, options: Options) -> Source:
    """Returns the Source of a single file: official, OpenAI's or open_clip's."""
    tensors, kind = archive.tensors, "TorchScript archive" if archive.torchscript else "state dict"
    kind = "safetensors file" if path.suffix == ".safetensors" else f"PyTorch {kind}"
    tensors = _strip_prefixes(tensors)
    if "vision_model.embeddings.class_embedding" in tensors:
        return _complete_hugging_face(path.parent, tensors, options)
    if any(name.startswith(("visual.layer1.", "clip.visual.layer1.")) for name in tensors):
        raise InputError("CLIP with a ResNet image tower is not supported, only ViT")
    if "clip.visual.conv1.weight" in tensors:
        model = "X-CLIP" if "global_mat_weight" in tensors else "CLIP4Clip"
        settings = Settings("quick_gelu", source=OPENAI)
        return Source(f"official {model} {kind}", True, tensors, _complete(options, settings))
    # open_clip's CustomTextCLIP has a prefix; its other models come in training checkpoints.
    open_clip = archive.nested or "text.token_embedding.weight" in tensors
    if "text.token_embedding.weight" in tensors:
        tensors = {name.removeprefix("text."): array for name, array in tensors.items()}
    if "visual.conv1.weight" not in tensors:
        names = ", ".join(list(tensors)[:3]) or "nothing"
        raise InputError(f"not a CLIP model: visual.conv1.weight is missing, found {names:.300}")
    settings = read_open_clip(path.parent) or Settings()
    model = "open_clip" if open_clip or settings.source else "CLIP"
    if "input_resolution" in tensors:
        model, settings = "CLIP", Settings("quick_gelu", source=OPENAI)
    width = len(tensors["visual.conv1.weight"])
    tensors = {f"clip.{name}": array for name, array in tensors.items()}
    return Source(f"{model} {kind}", False, tensors, _complete(options, settings, width))


def _read_folder(folder: Path, options: Options) -> Source:
    """Returns the Source of a folder as published by Hugging Face or open_clip."""
    has_tokenizer = any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json"))
    options = replace(options, vocab=options.vocab or (folder if has_tokenizer else None))
    for name in OPEN_CLIP_FILES:
        if (folder / name).is_file() and not (folder / "config.json").exists():
            return _classify(_load(folder / name), folder / name, options)
    read_hugging_face(folder)  # an error in it comes before one of the weights
    return _complete_hugging_face(folder, _strip_prefixes(_load_shards(folder)), options)


def _complete_hugging_face(
    folder: Path, tensors: dict[str, np.ndarray], options: Options
) -> Source:
    token = tensors.get("vision_model.embeddings.class_embedding")
    width = None if token is None else token.size
    options = _complete(options, read_hugging_face(folder), width)
    return Source("Hugging Face CLIP", False, from_hugging_face(tensors), options)


def _complete(options: Options, settings: Settings, width: int | None = None) -> Options:
    """Returns the options with what is stated beside the weights, which no flag may contradict.

    `width` is that of the image tower's weights.
    """
    values, stated = {}, settings.vision_width
    if width and stated and width != stated:
        problem = f"{settings.source} describes an image tower of width {stated}"
        raise InputError(f"{problem}, the weights have {width}")
    for field in dataclasses.fields(Settings):
        stated, flag = getattr(settings, field.name), getattr(options, field.name, None)
        if stated is None or field.name in ("source", "vision_width"):
            continue
        if flag not in (None, stated) and field.name == "preprocess":
            raise InputError("--image_mean, --image_std: the file beside the weights has others")
        if flag not in (None, stated):
            raise InputError(f"--{field.name}={flag}: {settings.source} has {stated}: omit it")
        values[field.name] = stated
    return replace(options, **values)


def _load_shards(folder: Path) -> dict[str, np.ndarray]:
    """Returns the tensors of a Hugging Face folder, whose weights may be in several files."""
    for stem in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{stem}.index.json"
        if (folder / stem).is_file():
            return _load(folder / stem).tensors
        if index.is_file():
            try:
                names = set(read_object(index)["weight_map"].values())
                shards = [folder / Path(name).name for name in sorted(names)]
            except (KeyError, AttributeError, TypeError):
                raise InputError(f"{index}: not a valid index of shards") from None
            tensors = {}
            for shard in shards:
                part = _load(shard).tensors
                if repeated := sorted(tensors.keys() & part.keys()):
                    raise InputError(f"{shard}: {repeated[0]} is also in another shard")
                tensors |= part
            return tensors
    raise InputError(f"{folder} holds neither model.safetensors nor pytorch_model.bin")


def infer(source: Source) -> ModelConfig:
    """Returns the architecture of a checkpoint, inferred from the shapes of its tensors.

    Learned matrices in `source` are cropped if its options say so. Raises InputError if sizes are
    missing or do not fit together.
    """
    _, official, tensors, options = source

    def shape(name: str, dimensions: int) -> tuple[int, ...]:
        array = tensors.get(f"clip.{name}")
        if array is None or array.ndim != dimensions or not array.size:
            problem = "missing" if array is None else f"of shape {array.shape}"
            raise InputError(f"{name} is {problem}: cannot infer the sizes of CLIP")
        return array.shape

    def sizes(tower: str, width: int, prefix: str) -> dict[str, int]:
        layers, name = _count(tensors, prefix), f"{tower}_heads"
        heads = getattr(options, name) or max(1, width // 64)
        if not layers:
            raise InputError(f"the {tower} tower has no layers")
        if width > 1024 and not getattr(options, name):
            problem = f"heads are not stored, and the {tower} tower has width {width}"
            raise InputError(f"{problem}: set --{name} (ViT-H: 16)")
        if width % heads:
            size = f"the {tower} tower has width {width}"
            advice = f"correct --{name} or the file beside the weights"
            raise InputError(f"{size}, not divisible by {heads} heads: {advice}")
        return {"width": width, "layers": layers, "heads": heads}

    width, _, patch, _ = shape("visual.conv1.weight", 4)
    side = patch * math.isqrt(shape("visual.positional_embedding", 2)[0] - 1)
    text_width, embed_dim = shape("text_projection", 2)
    if not 0 < side <= MAX_IMAGE_SIZE:
        raise InputError(f"image size {side}: must be from 1 to {MAX_IMAGE_SIZE} px")
    vision = VisionConfig(side, patch, **sizes("vision", width, "clip.visual.transformer"))
    vocab_size, context = shape("token_embedding.weight", 2)[0], shape("positional_embedding", 2)[0]
    words = TextConfig(vocab_size, context, **sizes("text", text_width, "clip.transformer"))
    modules = {name.partition(".")[0] for name in tensors}
    if options.head and official:
        raise InputError(f"--head={options.head}: the checkpoint has its own head: omit --head")
    head = [name for module, name in _HEADS.items() if module in modules or not module][-1]
    if options.activation is None:
        allowed = "--activation=quick_gelu (OpenAI) or --activation=gelu (most of open_clip)"
        raise InputError(f"the weights do not state their activation: set {allowed}")
    temporal = "transformer" if "transformerClip" in modules else "none"
    temporal = "lstm" if "lstm_visual" in modules else temporal
    layers = max(_count(tensors, "transformerClip"), _count(tensors, "cross.transformer"))
    return ModelConfig(
        preset="official" if official else "paper",
        head=options.head or head,
        embed_dim=embed_dim,
        activation=options.activation,
        preprocess=options.preprocess or PreprocessConfig(),
        **_fit_lengths(source, words.context_length),
        vision=vision,
        text=words,
        temporal=TemporalConfig(temporal, layers or 1, max(1, embed_dim // 64)),
    ).resolve()


def _fit_lengths(source: Source, context: int) -> dict[str, Any]:
    """Returns max_words and max_frames, and crops the learned matrices to them if allowed."""
    _, official, tensors, options = source
    limits = {"max_words": (3, 32 if official else context), "max_frames": (1, 12)}  # the release's
    lengths, is_tight = {}, any(name.startswith("cross.") for name in tensors)
    for option, (minimum, default) in limits.items():
        fixed = len(tensors.get(_MATRICES[option][0], ()))
        # The tight head has a position for the sentence, too.
        maximum = context - (is_tight and option == "max_frames")
        lengths[option] = length = getattr(options, option) or fixed or min(default, maximum)
        if fixed and (length > fixed or (length < fixed and not options.crop_matrices)):
            hint = "; --crop_matrices crops them" if length < fixed else ""
            matrices = f"the learned matrices are for length {fixed}{hint}"
            raise InputError(f"--{option}={length}: {matrices}")
        if not minimum <= length <= maximum:
            allowed = f"from {minimum} to {maximum}, by the text tower's {context} positions"
            raise InputError(f"--{option}={length}: must be {allowed}")
        for name in tensors.keys() & set(_MATRICES[option] if length < fixed else ()):
            tensors[name] = tensors[name][:length, :length]
    return lengths


def _count(tensors: Mapping[str, np.ndarray], prefix: str) -> int:
    """Returns the number of layers, which is the highest layer index plus 1."""
    pattern = re.compile(rf"{re.escape(prefix)}\.resblocks\.(\d{{1,4}})\.")
    return 1 + max((int(m[1]) for name in tensors if (m := pattern.match(name))), default=-1)
