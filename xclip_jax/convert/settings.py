"""Settings that files beside a checkpoint state, and checks of their values."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from xclip_jax.cli import InputError, read_json
from xclip_jax.models.config import PreprocessConfig


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of a checkpoint that its weights do not store."""

    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of ModelConfig, dotted
    sizes: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # those that weights tell
    preprocess: PreprocessConfig | None = None
    vision_width: int | None = None  # of the image tower
    source: str = ""  # the file that states them, or what tells them
    clean: Literal["lower", "canonicalize"] | None = None  # of a SentencePiece tokenizer's texts


def read_object(path: Path) -> dict[str, Any]:
    """Reads a JSON object from a file, or raises InputError."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise InputError(f"{path}: must be a JSON object")
    return value


def read_sizes(section: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """Returns the sizes that a section states, by their fields."""
    stated = {
        field: section[name] for field, name in names.items() if section.get(name) is not None
    }
    # A square may be stated by both sides.
    return {k: v[0] if isinstance(v, list) and v == v[:1] * 2 else v for k, v in stated.items()}


def make_preprocess(path: Path, values: dict[str, Any], **options: Any) -> PreprocessConfig:
    """Returns a PreprocessConfig of mean and std, of which None is CLIP's, and other options."""
    numbers = {}
    for name, value in values.items():
        if value is None:
            continue
        is_list = isinstance(value, list) and len(value) == 3
        if not is_list or not all(map(is_number, value)) or not is_rgb(value, name):
            rule = "three numbers above 0, at most 1" if name == "std" else "three numbers, 0 to 1"
            raise InputError(f"{path}: {name} is {value!r:.99}: must be {rule}")
        numbers[name] = tuple(map(float, value))
    return PreprocessConfig(**numbers, **options)


def is_number(value: Any) -> bool:
    """Returns True for a finite int or float, which JSON may hold as such, and not for a bool."""
    return type(value) in (int, float) and math.isfinite(value)


def is_rgb(values: Sequence[float], name: str) -> bool:
    """Returns True if values may be the mean or deviation (`name`: "mean", "std") of pixels."""
    return min(values) >= 0 and max(values) <= 1 and not (name == "std" and 0 in values)


def check_value(path: Path, name: str, value: Any, is_supported: bool, supported: str) -> None:
    """Raises InputError, with what is supported, if a value of the file `path` is not."""
    if not is_supported:
        raise InputError(f"{path}: {name} is {value!r:.99}, supported is {supported}")


def check_positive(path: Path, name: str, value: Any) -> None:
    """Raises InputError if a value of the file `path` is no size."""
    if type(value) is not int or not 1 <= value <= 2**16:
        raise InputError(f"{path}: {name} is {value!r:.99}, must be a whole number from 1 to 65536")


def section_of(path: Path, config: dict[str, Any], name: str) -> dict[str, Any]:
    """Returns an object within the file `path`, {} if it is missing, or raises InputError."""
    value = config.get(name) or {}
    if not isinstance(value, dict):
        raise InputError(f"{path}: {name} must be an object")
    return value
