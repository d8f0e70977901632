"""A work directory belongs to one config: going on with another one is refused by name."""

import json
import os

from xclip_jax.config import FREE_FIELDS
from xclip_jax.distributed import is_first, wait_for_all
from xclip_jax.errors import InputError


def claim_workdir(workdir, config, dataset):
    """Makes the work directory and its config.json, or checks that it belongs to this run.

    Raises:
        InputError: it cannot be written, or was made with a config or data that change the course
            of training; the fields are named.
    """
    path = workdir / "config.json"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if is_first() and not path.exists():
            partial = path.with_suffix(".part")
            described = flatten(json.loads(config.to_json())) | fixed_fields(config, dataset)
            partial.write_text(json.dumps(described, indent=1) + "\n")
            os.replace(partial, path)
    except OSError as error:
        raise InputError(f"work directory {workdir} cannot be written: {error}") from None
    wait_for_all("config.json")
    check_same_run(workdir, config, dataset)


def fixed_fields(config, dataset):
    """{dotted field: value} of all that changes the course of training, the data's content too."""
    flat = flatten(json.loads(config.to_json()))
    fixed = {k: v for k, v in flat.items() if not any(is_below(k, free) for free in FREE_FIELDS)}
    return fixed | {"data.fingerprint": dataset.fingerprint}


def check_same_run(workdir, config, dataset):
    """Raises InputError if a work directory's config.json is damaged or of another run."""
    path, fixed = workdir / "config.json", fixed_fields(config, dataset)
    try:
        before = dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} is damaged: {error}; choose another --workdir") from None
    changed = [k for k in fixed if k not in before or before[k] != fixed[k]]
    if changed:
        named = ", ".join(f"{k} = {before.get(k)!r} then, {fixed[k]!r} now" for k in changed)
        raise InputError(
            f"{workdir} was made by a run with another config: {named}; "
            "go on with the same config or choose another --workdir"
        )


def flatten(tree, prefix=""):
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def is_below(field, parent):
    """Whether a dotted field is `parent` or lies below it."""
    return field == parent or field.startswith(parent + ".")
