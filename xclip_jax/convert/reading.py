"""Reads checkpoint files, folders and hub ids of any supported kind, without PyTorch."""

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from huggingface_hub import errors, snapshot_download
from safetensors import SafetensorError
from safetensors.numpy import load_file

from xclip_jax.checkpoint import MODEL_FILES
from xclip_jax.cli import InputError
from xclip_jax.convert import layouts
from xclip_jax.convert.hugging_face import read_hugging_face
from xclip_jax.convert.open_clip import read_open_clip
from xclip_jax.convert.settings import Settings, read_object
from xclip_jax.convert.torch_archive import Archive, read_archive
from xclip_jax.convert.videoprism import read_videoprism
from xclip_jax.data import text
from xclip_jax.models.config import PreprocessConfig
from xclip_jax.models.families import CLIP, PE, PE_PREPROCESS, SIGLIP

# What is taken from a repository of the hub: settings and tokenizer, then the weights of one kind,
# as many hold several, in the first of these formats that there is.
HUB_FILES = ["config.json", "preprocessor_config.json", "open_clip_config.json", *text.HUB_FILES]
HUGGING_FACE_FILES = (["model*.safetensors", "model.safetensors.index.json"], ["pytorch_model*"])
OTHER_FILES = (["open_clip_model.safetensors"], ["open_clip_pytorch_model.bin"])
OTHER_FILES += (["PE-*.pt"], ["longclip*.pt"], ["flax_*.npz"])
HUB_ID = r"[\w.-]+/[\w.-]+"  # how the hub names models
_PREFIXES = ("module.", "model.")  # before the names of wrapped models
OPENAI = "OpenAI's CLIP"  # also in the official models
OPEN_CLIP_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
_HF_PATCH = "vision_model.embeddings.patch_embedding.weight"
_HF_TOKENS = "text_model.embeddings.token_embedding.weight"
FLAGS = {"activation": "activation", "vision_heads": "vision.heads", "text_heads": "text.heads"}


@dataclass(frozen=True)
class Options:
    """Options of `convert`, by default determined by the checkpoint."""

    vocab: str | Path | None = None  # tokenizer, as in `load_tokenizer`; else the source's, if any
    head: Literal["mean_pooling", "xclip"] | None = None  # of plain CLIP; else mean_pooling
    # A file beside the weights may state the next four. Where none does, the activation is
    # required, except for families that the weights tell, and so are heads of towers wider than
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
    settings: Settings = Settings()  # what is stated beside the weights


def is_importable(source: str | Path) -> bool:
    """Returns True for a file, a folder as `convert` takes it, and what may be a hub id."""
    path = Path(source)
    if path.is_dir():
        # A work directory has a config.json of its own.
        if (path / "checkpoints").is_dir() or (path / "train.lock").exists():
            return False
        names = ("config.json", *OPEN_CLIP_FILES)
        return any((path / n).is_file() for n in names) or bool(_single_files(path))
    return path.is_file() or re.fullmatch(HUB_ID, str(source)) is not None


def locate(
    source: str | Path, revision: str | None = None, token: str | bool | None = None
) -> Path:
    """Returns the file or folder of a checkpoint or model, which a hub id is downloaded to.

    `revision` and `token` are as in huggingface_hub. Raises InputError if there is none.
    """
    location = Path(source)
    if not str(source).strip():
        raise InputError("--input is empty")
    if location.exists():
        return location
    if not re.fullmatch(HUB_ID, str(source)):
        raise InputError(f"{source}: no such file or folder")
    try:
        return _download(str(source), revision, token)
    except Exception as error:  # many types, from no network to no such repository
        raise InputError(
            f"{source}: no such file or folder, nor on the Hugging Face hub "
            f"({explain(error)}). Download its settings, weights and tokenizer "
            f"from https://huggingface.co/{source} into a folder and pass that"
        ) from None


def explain(error: Exception) -> str:
    """Returns why a request to the Hugging Face hub failed, in one line."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        return "access has to be requested on its page there"
    if isinstance(error, errors.RevisionNotFoundError):
        return "it has no such revision"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "no such repository, or a private one that the token does not open"
    if status in (401, 403):
        reason = {401: "is not valid", 403: "does not allow this"}[status]
        return f"the token {reason}: see https://huggingface.co/settings/tokens"
    return " ".join(str(error).split())[:300] or type(error).__name__


def _download(hub_id: str, revision: str | None, token: str | bool | None) -> Path:
    """Downloads what is needed of a repository, returns the folder."""
    fetch = functools.partial(snapshot_download, hub_id, revision=revision, token=token)
    folder = Path(fetch(allow_patterns=["model.json", *HUB_FILES]))
    if (folder / "model.json").is_file():
        return Path(fetch(allow_patterns=list(MODEL_FILES)))
    for patterns in HUGGING_FACE_FILES if _is_hugging_face(folder) else OTHER_FILES:
        fetch(allow_patterns=patterns)
        if any(any(folder.glob(pattern)) for pattern in patterns):
            break
    return folder


def _is_hugging_face(folder: Path) -> bool:
    """Returns True if config.json is of a model of transformers, and not of its VideoPrism.

    That is beside the original file, and computes other vectors of texts.
    """
    path = folder / "config.json"
    kind = read_object(path).get("model_type") if path.exists() else None
    return kind is not None and not str(kind).startswith("videoprism")


def read_source(path: str | Path, options: Options = Options()) -> Source:
    """Reads a checkpoint file, a Hugging Face folder or a hub id.

    Raises InputError if the checkpoint is missing, cannot be read or is of an unknown kind.
    """
    location = locate(path)
    _refuse_model(path, location)
    if location.is_dir():
        return _read_folder(location, options)
    return _read_file(location, options)


def _refuse_model(path: str | Path, location: Path) -> None:
    """Raises InputError if the files are of this package: a model directory or an export of one."""
    if not (location / "model.json").is_file():
        is_export = location.suffix == ".safetensors" and location.with_name("model.json").is_file()
    elif (location / "params").is_dir():
        advice = "use it as it is (hf download HUB_ID --local-dir=DIR copies one of the hub)"
        raise InputError(f"{path}: is a model directory already: {advice}")
    else:
        is_export = True
    if is_export:
        advice = "pass the checkpoint that the model was converted from"
        raise InputError(f"{path}: is an export to PyTorch, as it has a model.json: {advice}")


def _single_files(folder: Path) -> list[Path]:
    """Returns the files of a folder that may each hold a model of PE-Core, CLIP or VideoPrism."""
    arrays = list(folder.glob("flax_*.npz")) or list(folder.glob("*.npz"))
    return sorted([*folder.glob("*.pt"), *arrays])


def _read_file(path: Path, options: Options) -> Source:
    """Returns the Source of a single file, of VideoPrism with the tokenizer beside it."""
    if path.suffix != ".npz":
        return classify(_load(path), path, options)
    tensors, settings = read_videoprism(path)
    vocab = path.with_name(text.SENTENCEPIECE)
    options = replace(options, vocab=options.vocab or (vocab if vocab.is_file() else None))
    return _complete("VideoPrism-LvT npz", False, tensors, options, settings)


def _load(path: Path) -> Archive:
    if not path.is_file():
        raise InputError(f"{path} is missing")
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


def classify(archive: Archive, path: Path, options: Options) -> Source:
    """Returns the Source of a single file."""
    tensors, kind = archive.tensors, "TorchScript archive" if archive.torchscript else "state dict"
    kind = "safetensors file" if path.suffix == ".safetensors" else f"PyTorch {kind}"
    tensors = _strip_prefixes(tensors)
    if _HF_PATCH in tensors or _HF_TOKENS in tensors:
        return _complete_hugging_face(path.parent, tensors, options)
    if any(name.startswith(("visual.layer1.", "clip.visual.layer1.")) for name in tensors):
        raise InputError("CLIP with a ResNet image tower is not supported, only ViT")
    if "clip.visual.conv1.weight" in tensors:
        model = "X-CLIP" if "global_mat_weight" in tensors else "CLIP4Clip"
        settings = Settings(CLIP, source=OPENAI)
        return _complete(f"official {model} {kind}", True, tensors, options, settings)
    # open_clip's CustomTextCLIP has a prefix; its other models come in training checkpoints.
    open_clip = archive.nested or "text.token_embedding.weight" in tensors
    if "text.token_embedding.weight" in tensors:
        tensors = {name.removeprefix("text."): array for name, array in tensors.items()}
    settings = read_open_clip(path.parent) or Settings()
    model = "open_clip" if open_clip or settings.source else "CLIP"
    if any(name.startswith("visual.trunk.") for name in tensors):
        if not settings.source:
            needed = "put open_clip_config.json of the model beside it, which names the tower"
            raise InputError(f"{path}: a model with an image tower of timm: {needed}")
        tensors = layouts.from_timm(tensors)
    if "visual.conv1.weight" not in tensors:
        names = ", ".join(list(tensors)[:3]) or "nothing"
        raise InputError(f"not a CLIP model: visual.conv1.weight is missing, found {names:.300}")
    if "positional_embedding_res" in tensors:
        tensors = layouts.from_long_clip(tensors)
        model, settings = "Long-CLIP", Settings(CLIP, source="Long-CLIP")
    if "input_resolution" in tensors:
        model, settings = "CLIP", Settings(CLIP, source=OPENAI)
    if "visual.attn_pool.probe" in tensors and not settings.source:
        model, settings = "PE-Core", _perception_encoder(tensors)
    tensors = {_official(name): array for name, array in tensors.items()}
    tensors = layouts.split_pool(tensors)
    return _complete(f"{model} {kind}", False, tensors, options, settings)


def _official(name: str) -> str:
    return name if name == "logit_bias" else f"clip.{name}"


def _perception_encoder(tensors: Mapping[str, np.ndarray]) -> Settings:
    """Returns the settings of PE-Core, whose heads are 96 wide in G, which has no class token."""
    head_width = 64 if "visual.class_embedding" in tensors else 96
    heads = {"vision.heads": max(1, len(tensors["visual.conv1.weight"]) // head_width)}
    heads["text.heads"] = max(1, len(tensors.get("ln_final.weight", ())) // 64)
    return Settings(PE | heads, preprocess=PreprocessConfig(**PE_PREPROCESS), source="PE-Core")


def _read_folder(folder: Path, options: Options) -> Source:
    """Returns the Source of a folder as published by Hugging Face, open_clip or PE-Core."""
    names = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model")
    has_tokenizer = any((folder / name).is_file() for name in names)
    options = replace(options, vocab=options.vocab or (folder if has_tokenizer else None))
    if not _is_hugging_face(folder):
        files = [folder / name for name in OPEN_CLIP_FILES] + _single_files(folder)
        if files := [file for file in files if file.is_file()]:
            if files[0].suffix in (".pt", ".npz") and len(files) > 1:
                names = ", ".join(file.name for file in files)
                raise InputError(f"{folder} holds several models: pass a file, one of {names:.300}")
            return _read_file(files[0], options)
    read_hugging_face(folder)  # an error in it comes before one of the weights
    return _complete_hugging_face(folder, _strip_prefixes(_load_shards(folder)), options)


def _complete_hugging_face(
    folder: Path, tensors: dict[str, np.ndarray], options: Options
) -> Source:
    settings = read_hugging_face(folder)
    model = "SigLIP" if settings.fields.keys() >= SIGLIP.keys() else "CLIP"
    if model == "SigLIP" and not options.vocab and (folder / "tokenizer_config.json").is_file():
        raise InputError(f"{folder}: tokenizer.json is missing, download it beside the other files")
    tensors = layouts.from_hugging_face(tensors)
    return _complete(f"Hugging Face {model}", False, tensors, options, settings)


def _complete(
    kind: str, official: bool, tensors: dict[str, np.ndarray], options: Options, settings: Settings
) -> Source:
    """Returns the Source with what is stated beside the weights, which no flag may contradict."""
    patches, stated = tensors.get("clip.visual.conv1.weight"), settings.vision_width
    if patches is not None and stated and len(patches) != stated:
        problem = f"{settings.source} describes an image tower of width {stated}"
        raise InputError(f"{problem}, the weights have {len(patches)}")
    for flag, field in FLAGS.items():
        value, stated = getattr(options, flag), settings.fields.get(field)
        if None not in (value, stated) and value != stated:
            raise InputError(f"--{flag}={value}: {settings.source} has {stated}: omit it")
    if settings.preprocess and options.preprocess not in (None, settings.preprocess):
        known = f"mean {settings.preprocess.mean} and deviation {settings.preprocess.std}"
        raise InputError(f"--image_mean, --image_std: the model takes {known}: omit them")
    options = replace(options, preprocess=settings.preprocess or options.preprocess)
    return Source(kind, official, tensors, options, settings)


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
