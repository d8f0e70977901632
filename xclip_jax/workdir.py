"""Creates, locks and checks the work directory of a run."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from flax import traverse_util

from xclip_jax.cli import InputError, read_json, write_atomically
from xclip_jax.config import FREE_FIELDS, RunConfig, get_config
from xclip_jax.data.builder import Dataset
from xclip_jax.distributed import is_first_process, wait_for_all
from xclip_jax.models.config import ModelConfig, upgrade_value

RECORD = "provenance"  # entry of config.json beside the fields, see xclip_jax.provenance
LABELS = ("name", "mode")  # fields that do not describe what was trained


def claim_workdir(workdir: Path, config: RunConfig, dataset: Dataset) -> None:
    """Creates a work directory with its config.json, or checks it as `check_same_run` does."""
    path = workdir / "config.json"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if is_first_process() and not path.exists():
            write_atomically(path, json.dumps(_all_fields(config, dataset), indent=1) + "\n")
    except OSError as error:
        raise InputError(f"work directory {workdir} cannot be written: {error}") from None
    wait_for_all("config.json")
    check_same_run(workdir, config, dataset)


@contextlib.contextmanager
def lock_workdir(workdir: Path) -> Iterator[None]:
    """Locks a work directory for this run, or raises InputError if another one is using it."""
    try:
        with FileLock(workdir / "train.lock", timeout=0) if is_first_process() else nullcontext():
            yield
    except Timeout:
        raise InputError(f"another process trains in {workdir}: wait until it ends") from None


def check_same_run(
    workdir: Path, config: RunConfig, dataset: Dataset, option: str = "--workdir"
) -> None:
    """Checks that a work directory's run has the same config and data, except FREE_FIELDS.

    Raises InputError if config.json is corrupted or of another run. The message names the fields
    and the command-line option that sets `workdir`.
    """
    path = workdir / "config.json"
    try:
        saved = read_settings(workdir)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is corrupted: {error}; choose another {option}") from None
    changed = [
        f"{field} was {saved.get(field)!r}, is {value!r}"
        for field, value in _all_fields(config, dataset).items()
        if not _is_free(field) and (field not in saved or _differ(field, saved[field], value))
    ]
    if changed:
        advice = f"use the same config or choose another {option}"
        raise InputError(f"{workdir} has another config: {', '.join(changed)}; {advice}")


def read_saved(workdir: Path) -> dict[str, Any]:
    """Returns the content of config.json.

    Raises FileNotFoundError if there is none, InputError if it is corrupted.
    """
    path = workdir / "config.json"
    saved = read_json(path)
    if not isinstance(saved, dict) or not isinstance(saved.get(RECORD, {}), dict):
        raise InputError(f"{path}: must be an object of fields")
    return saved


def read_settings(workdir: Path) -> dict[str, Any]:
    """Returns {dotted field: value} of config.json, fields added since at their defaults.

    Raises FileNotFoundError if there is none, InputError if it is corrupted.
    """
    saved = read_saved(workdir)
    try:
        fields = {k: upgrade_value(k, value) for k, value in saved.items() if k != RECORD}
    except TypeError as error:
        raise InputError(f"{workdir / 'config.json'}: {error}") from None
    return default_settings() | fields


def current_settings(workdir: Path, config: RunConfig) -> dict[str, Any]:
    """Returns the settings of a run's training with the FREE_FIELDS of `config`, without LABELS.

    Those of `config` if there is no config.json, as beside a copied model. Raises InputError if it
    is corrupted.
    """
    saved, current = {}, _flatten(config)
    with contextlib.suppress(FileNotFoundError):
        saved = read_settings(workdir)
    settings = {k: v if _is_free(k) else saved.get(k, v) for k, v in current.items()}
    return {k: v for k, v in settings.items() if k not in LABELS}


def ignored_settings(workdir: Path, config: RunConfig) -> list[str]:
    """Returns the fields of `config` that an evaluation takes from the run, where they differ.

    None if there is no config.json. Raises InputError if it is corrupted.
    """
    trained = current_settings(workdir, config)
    fields = {k: v for k, v in _flatten(config).items() if not k.startswith("data.")}
    return [
        f"{field}={value!r} (trained with {trained[field]!r})"
        for field, value in fields.items()
        if _differ(field, trained.get(field, value), value)
    ]


def changed_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings that differ from the defaults, without LABELS."""
    defaults = default_settings().items()
    return {k: settings[k] for k, v in defaults if settings.get(k, v) != v and k not in LABELS}


def default_settings() -> dict[str, Any]:
    """Returns {dotted field: default value}."""
    return _flatten(get_config())


def _is_free(field: str) -> bool:
    """Returns True if a run may be resumed with another value of a field."""
    return f"{field}.".startswith(tuple(f"{free}." for free in FREE_FIELDS))


def _differ(field: str, value: Any, other: Any) -> bool:
    """Returns True if two values of a field are not the same on this machine's devices."""
    if field == "model.dtype":
        value, other = (ModelConfig(dtype=dtype).compute_dtype for dtype in (value, other))
    return value != other


def _flatten(config: Any) -> dict[str, Any]:
    """Returns {dotted field: plain value} of a config."""
    return traverse_util.flatten_dict(plain_fields(config), sep=".")


def _all_fields(config: RunConfig, dataset: Dataset) -> dict[str, Any]:
    """Returns {dotted field: plain value} of a config and the fingerprint of the data."""
    return _flatten(config) | {"data.fingerprint": dataset.fingerprint}


def plain_fields(section: Any) -> dict[str, Any]:
    """Returns a config, or a section of it, as nested dicts and lists of plain values."""
    return json.loads(section.to_json())
