"""Reads and writes the files of a run: checkpoints, model directories and work directories."""

import asyncio
import dataclasses
import json
import logging
import operator
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util
from orbax.checkpoint import checkpoint_managers as policies
from safetensors.numpy import save_file

from xclip_jax.cli import InputError, first_line, write_atomically
from xclip_jax.config import FREE_FIELDS, RunConfig
from xclip_jax.data.builder import Dataset
from xclip_jax.data.text import Tokenizer, load_tokenizer
from xclip_jax.distributed import gather_objects, is_first_process, wait_for_all
from xclip_jax.models import ModelConfig, XClip, read_model_config
from xclip_jax.models.config import upgrade_value

UNSCORED = -1.0  # score of a checkpoint without validation: below every recall
UNREAD_FILE = "unread.safetensors"
PyTree = Any
Manager = ocp.CheckpointManager


def open_checkpoints(directory: Path) -> Manager:
    """Opens the checkpoints of a work directory: the newest two and the best one are kept.

    Steps with unreadable metrics, which Orbax cannot open, are deleted unless all steps have them.
    """
    if is_first_process():
        steps = [path for path in directory.glob("*") if path.name.isdigit()]
        corrupted = []
        for path in steps:
            try:
                json.loads((path / "metrics" / "metrics").read_text())
            except FileNotFoundError:
                pass
            except ValueError:
                corrupted.append(path)
        for path in corrupted if len(corrupted) < len(steps) else []:
            logging.warning("checkpoint %s is corrupted: its metrics cannot be read", path.name)
            shutil.rmtree(path)
    wait_for_all("readable checkpoints")
    _ignore_reads_after_failure()
    score = operator.itemgetter("score")
    best = policies.BestN(get_metric_fn=score, n=1, keep_checkpoints_without_metrics=False)
    options = ocp.CheckpointManagerOptions(
        preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(2), best]),
        best_fn=score,  # Orbax writes metrics only if this is set
        cleanup_tmp_directories=True,
    )
    return Manager(directory.absolute(), options=options)


def _ignore_reads_after_failure() -> None:
    """Suppresses the tracebacks of pending reads after a failed restore closed its event loop."""
    report, closed_loop = sys.unraisablehook, asyncio.BaseEventLoop.call_soon_threadsafe.__code__

    def report_others(error: Any) -> None:
        if not error.exc_traceback or error.exc_traceback.tb_frame.f_code is not closed_loop:
            report(error)

    sys.unraisablehook = report_others


def save_checkpoint(manager: Manager, step: int, state: PyTree, score: float | None = None) -> None:
    """Starts writing the state after `step` steps, with its validation score (higher is better)."""
    metrics = {"score": UNSCORED if score is None else float(score)}
    args = ocp.args.Composite(state=ocp.args.StandardSave(state))  # type: ignore[call-arg]
    manager.save(step, args=args, metrics=metrics, force=True)


def restore_checkpoint(manager: Manager, like: PyTree, best: bool = False) -> tuple[int, PyTree]:
    """Returns (step, state) of the newest or the best intact checkpoint.

    Corrupted ones, with files that are missing or unreadable or contain NaN or infinite numbers,
    are skipped; those newer than the newest intact one are deleted. Of equally good checkpoints the
    newest is returned. `like` is a tree of arrays or ShapeDtypeStructs with the shardings to
    restore to. Raises InputError if no checkpoint can be restored; all remain on disk.
    """
    manager.wait_until_finished()
    scores = dict.fromkeys(manager.all_steps(), UNSCORED)
    for step in scores if best else ():
        scores[step] = (manager.metrics(step) or {}).get("score", UNSCORED)
    corrupted = {}
    for step in sorted(scores, key=lambda step: (scores[step], step), reverse=True):
        if reason := _find_corruption(manager, step, like):
            corrupted[step] = reason
            continue
        for other, reason in corrupted.items():
            logging.warning("checkpoint %d is corrupted, using %d: %s", other, step, reason)
            if not best:
                manager.delete(other)  # so that its step can be saved again
        like = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(like))  # type: ignore[call-arg]
        return step, manager.restore(step, args=args)["state"]
    raise InputError(
        f"no checkpoint in {manager.directory} can be restored: all are corrupted or of another "
        f"model ({next(iter(corrupted.values()), 'none')}); delete it or choose another --workdir"
    )


def _find_corruption(manager: Manager, step: int, like: PyTree) -> str | None:
    """Returns, in all processes, why a checkpoint cannot be restored, or None."""
    reason = None
    if is_first_process():  # if one fails in a joint restore, the others wait forever
        folder = Path(manager.directory) / str(step) / "state"
        try:
            for path in folder.glob("array_metadatas/*"):
                json.loads(path.read_text())
            arrays = jax.tree.leaves(_read_arrays(folder, like))
            if not all(np.isfinite(array).all() for array in arrays):
                reason = "it contains NaN or infinite numbers"
        except Exception as error:  # Orbax has no common type for corrupted checkpoints
            reason = first_line(error)
    return gather_objects(reason)[0]


def _read_arrays(folder: Path, like: PyTree) -> PyTree:
    """Reads a tree of arrays as NumPy arrays, in this process alone and for any set of devices."""
    like = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), like)
    with local_checkpointer() as checkpointer:
        return checkpointer.restore(folder, like)


def local_checkpointer() -> ocp.StandardCheckpointer:
    """Returns a checkpointer with which this process alone reads and writes unsharded arrays."""
    index = jax.process_index()
    options = ocp.options.MultiprocessingOptions(
        primary_host=index, active_processes={index}, barrier_sync_key_prefix=f"process_{index}"
    )
    return ocp.StandardCheckpointer(multiprocessing_options=options)


def model_folder(directory: str | os.PathLike) -> Path:
    """Returns the model directory at `directory`, or its `model` if it is a work directory."""
    directory = Path(directory)
    is_workdir = (directory / "model").is_dir() and not (directory / "model.json").is_file()
    return directory / "model" if is_workdir else directory


def partial_folder(directory: str | Path) -> Path:
    """Returns a new folder next to `directory`, to be filled and then renamed to it.

    A folder that a killed process left under the same name is removed first.
    """
    partial = Path(directory).with_name(f".{Path(directory).name}.xclip_jax-partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def save_model(
    directory: str | os.PathLike,
    config: ModelConfig,
    params: PyTree,
    *,
    tokenizer: Tokenizer | None = None,
    unread: Mapping[str, np.ndarray] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Writes a model directory atomically, replacing an older one.

    `unread` holds arrays of the PyTorch checkpoint that the model does not use, by official name:
    the export to PyTorch writes them back. `extra` holds further entries of model.json.
    """
    if not is_first_process():
        return
    directory = Path(directory).absolute()
    partial = partial_folder(directory)
    described = dataclasses.asdict(config) | dict(extra or {})
    (partial / "model.json").write_text(json.dumps(described, indent=2) + "\n")
    if tokenizer is not None:
        tokenizer.save(partial / "tokenizer")
    if unread:
        save_file(dict(unread), partial / UNREAD_FILE)
    with local_checkpointer() as checkpointer:
        checkpointer.save(partial / "params", jax.tree.map(np.asarray, params))
    shutil.rmtree(directory, ignore_errors=True)
    partial.rename(directory)


def load_model(directory: str | os.PathLike) -> tuple[Any, XClip, PyTree, Tokenizer | None]:
    """Reads a model directory: content of model.json, linen module, parameters, tokenizer if any.

    Raises InputError if the directory is missing or corrupted.
    """
    directory = Path(directory).absolute()
    file, folder = directory / "model.json", directory / "params"
    try:
        described = json.loads(file.read_text())
        model = XClip(read_model_config(described))
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"no model in {directory}: model.json is missing") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{file} does not describe a model: {error}") from None
    shapes = jax.eval_shape(lambda: init_params(model, 0))
    try:
        params = _read_arrays(folder, shapes)
    except Exception as error:  # Orbax has no common type for corrupted checkpoints
        raise InputError(f"{folder} cannot be read: {first_line(error)}") from None
    leaves = zip(jax.tree.leaves_with_path(params), jax.tree.leaves(shapes), strict=True)
    for (path, array), expected in leaves:  # Orbax does not check shapes
        if array.shape != expected.shape:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            sizes = f"{name} has shape {array.shape}, must be {expected.shape}"
            raise InputError(f"{folder} does not fit model.json: {sizes}")
    folder = directory / "tokenizer"
    tokenizer = load_tokenizer(folder, model.config.max_words) if folder.is_dir() else None
    return described, model, jax.device_put(params), tokenizer


def init_params(model: XClip, seed: int) -> PyTree:
    """Returns newly initialised parameters."""
    c, side = model.config, model.config.vision.image_size
    text = np.zeros((1, c.max_words), np.int32), np.ones((1, c.max_words), bool)
    video = np.zeros((1, c.max_frames, side, side, 3), np.uint8), np.ones((1, c.max_frames), bool)
    return model.init(jax.random.key(seed), *text, *video)["params"]


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


def check_same_run(
    workdir: Path, config: RunConfig, dataset: Dataset, option: str = "--workdir"
) -> None:
    """Checks that a work directory's run has the same config and data, except FREE_FIELDS.

    Raises InputError if config.json is corrupted or of another run. The message names the fields
    and the command-line option that sets `workdir`.
    """
    path = workdir / "config.json"
    try:
        saved = json.loads(path.read_text())
        saved = {field: upgrade_value(field, value) for field, value in saved.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is corrupted: {error}; choose another {option}") from None
    free = tuple(f"{field}." for field in FREE_FIELDS)
    changed = [
        f"{field} was {saved.get(field)!r}, is {value!r}"
        for field, value in _all_fields(config, dataset).items()
        if not f"{field}.".startswith(free) and (field not in saved or saved[field] != value)
    ]
    if changed:
        advice = f"use the same config or choose another {option}"
        raise InputError(f"{workdir} has another config: {', '.join(changed)}; {advice}")


def _all_fields(config: RunConfig, dataset: Dataset) -> dict[str, Any]:
    """Returns {dotted field: plain value} of a config and the fingerprint of the data."""
    fields = traverse_util.flatten_dict(plain_fields(config), sep=".")
    return fields | {"data.fingerprint": dataset.fingerprint}


def plain_fields(section: Any) -> dict[str, Any]:
    """Returns a config, or a section of it, as nested dicts and lists of plain values."""
    return json.loads(section.to_json())
