"""Reads and writes the files of a run: checkpoints, model directories and work directories."""

import asyncio
import dataclasses
import json
import logging
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy
from safetensors.numpy import save_file

from xclip_jax.cli import InputError
from xclip_jax.config import FREE_FIELDS, RunConfig
from xclip_jax.data.builder import Dataset
from xclip_jax.data.text import Tokenizer, load_tokenizer
from xclip_jax.distributed import gather_objects, is_first_process, wait_for_all
from xclip_jax.models import ModelConfig, XClip, read_model_config
from xclip_jax.models.config import upgrade_value

UNSCORED = -1.0  # score of a checkpoint without validation: below every recall
UNREAD_FILE = "unread.safetensors"
PyTree = Any


class Checkpoints:
    """The checkpoints of a work directory: the newest two and the best one are kept.

    An incomplete or corrupted checkpoint is never restored: the next one is tried, with a warning.
    Changed bits are detected if a file becomes unreadable or contains NaN or infinite numbers.
    """

    def __init__(self, directory: str | Path) -> None:
        _delete_unreadable(Path(directory))
        _ignore_reads_after_failure()
        policies = [
            preservation_policy.LatestN(2),
            preservation_policy.BestN(
                get_metric_fn=_score, n=1, keep_checkpoints_without_metrics=False
            ),
        ]
        options = ocp.CheckpointManagerOptions(
            preservation_policy=preservation_policy.AnyPreservationPolicy(policies),
            best_fn=_score,  # Orbax writes metrics only if this is set
            cleanup_tmp_directories=True,
        )
        self._manager = ocp.CheckpointManager(Path(directory).absolute(), options=options)

    def save(self, step: int, state: PyTree, score: float | None = None) -> None:
        """Starts writing a checkpoint.

        Args:
            step: number of steps done.
            state: tree of arrays.
            score: validation score, higher is better; None without validation.
        """
        metrics = {"score": UNSCORED if score is None else float(score)}
        args = ocp.args.Composite(state=ocp.args.StandardSave(state))  # type: ignore[call-arg]
        if not self._manager.save(step, args=args, metrics=metrics, force=True):
            raise RuntimeError(f"Orbax did not save step {step}")

    def restore_newest(self, like: PyTree) -> tuple[int, PyTree] | None:
        """Returns (step, state) of the newest intact checkpoint, or None if there are none.

        Newer corrupted ones are deleted.

        Args:
            like: the state's tree of arrays or ShapeDtypeStructs with the shardings to restore to.

        Raises:
            InputError: no checkpoint can be restored; all remain on disk.
        """
        corrupted = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            if reason := self._find_corruption(step, like):
                corrupted[step] = reason
                continue
            state = self._restore(step, like)
            for newer, reason in corrupted.items():
                text = "checkpoint %d is corrupted, resuming from %d: %s"
                logging.warning(text, newer, step, reason)
                self._manager.delete(newer)
            return step, state
        if corrupted:
            step, reason = next(iter(corrupted.items()))
            raise InputError(
                f"no checkpoint in {self._manager.directory} can be restored: all are corrupted "
                f"or of another model; delete it or choose another --workdir ({step}: {reason})"
            )
        return None

    def restore_best(self, like: PyTree) -> tuple[int, PyTree]:
        """Returns (step, state) of the best intact checkpoint, the newest of equal ones.

        Raises:
            InputError: no checkpoint can be restored.
        """
        self.wait()
        scores = {}
        for step in self._manager.all_steps():
            scores[step] = (self._manager.metrics(step) or {}).get("score", UNSCORED)
        for step in sorted(scores, key=lambda s: (scores[s], s), reverse=True):
            if not (reason := self._find_corruption(step, like)):
                return step, self._restore(step, like)
            logging.warning("checkpoint %d is corrupted, trying the next best: %s", step, reason)
        raise InputError(f"no checkpoint in {self._manager.directory} can be restored")

    def _restore(self, step: int, like: PyTree) -> PyTree:
        like = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(like))  # type: ignore[call-arg]
        return self._manager.restore(step, args=args)["state"]

    def _find_corruption(self, step: int, like: PyTree) -> str | None:
        """Returns why a checkpoint cannot be restored, or None.

        The result is the same in all processes. Only the first one reads, because a
        process that fails in the middle of a joint restore would leave the others waiting.
        """
        reason = None
        if is_first_process():
            like = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), like)
            folder = Path(self._manager.directory) / str(step) / "state"
            try:
                for path in folder.glob("array_metadatas/*"):
                    json.loads(path.read_text())
                with local_checkpointer() as checkpointer:
                    arrays = jax.tree.leaves(checkpointer.restore(folder, like))
                if not all(np.isfinite(array).all() for array in arrays):
                    reason = "it contains NaN or infinite numbers"
            except Exception as error:  # Orbax has no common type for corrupted checkpoints
                reason = _first_line(error)
        return gather_objects(reason)[0]

    def wait(self) -> None:
        """Waits until all checkpoints are on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits until all checkpoints are on disk and releases the directory."""
        self._manager.close()


def local_checkpointer() -> ocp.StandardCheckpointer:
    """Returns a checkpointer with which this process alone reads and writes unsharded arrays."""
    index = jax.process_index()
    options = ocp.options.MultiprocessingOptions(
        primary_host=index, active_processes={index}, barrier_sync_key_prefix=f"process_{index}"
    )
    return ocp.StandardCheckpointer(multiprocessing_options=options)


def _score(metrics: Mapping[str, float]) -> float:
    return metrics["score"]


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _delete_unreadable(directory: Path) -> None:
    """Deletes steps with unreadable metrics, which Orbax cannot open, unless all steps are."""
    if is_first_process():
        steps = [path for path in directory.glob("*") if path.name.isdigit()]
        corrupted = [path for path in steps if not _is_readable(path / "metrics" / "metrics")]
        for path in corrupted if len(corrupted) < len(steps) else []:
            logging.warning("checkpoint %s is corrupted: its metrics cannot be read", path.name)
            shutil.rmtree(path)
    wait_for_all("readable checkpoints")


def _is_readable(path: Path) -> bool:
    """Returns True for a valid JSON file and for a missing one."""
    try:
        json.loads(path.read_text())
    except FileNotFoundError:
        return True
    except ValueError:
        return False
    return True


def _ignore_reads_after_failure() -> None:
    """Suppresses the tracebacks of pending reads after a failed restore closed its event loop."""
    report = sys.unraisablehook
    closed_loop = asyncio.BaseEventLoop.call_soon_threadsafe.__code__

    def report_others(unraisable: Any) -> None:
        where = unraisable.exc_traceback
        if where is None or where.tb_frame.f_code is not closed_loop:
            report(unraisable)

    sys.unraisablehook = report_others


def model_folder(directory: str | os.PathLike) -> Path:
    """Returns the model directory at `directory`, or its `model` if it is a work directory."""
    directory = Path(directory)
    if not (directory / "model.json").is_file() and (directory / "model").is_dir():
        return directory / "model"
    return directory


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

    Args:
        directory: the model directory.
        config: architecture of the model.
        params: tree of parameters.
        tokenizer: tokenizer to save with the model, if any.
        unread: arrays of the PyTorch checkpoint that the model does not use, by official name; the
            export to PyTorch writes them back.
        extra: further entries of model.json.
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
    if directory.exists():
        shutil.rmtree(directory)
    partial.rename(directory)


def load_model(
    directory: str | os.PathLike,
) -> tuple[dict[str, Any], XClip, PyTree, Tokenizer | None]:
    """Reads a model directory.

    Returns:
        (described, model, params, tokenizer): the content of model.json, the linen module, its
        parameters on the default device, the tokenizer or None if the directory has none.

    Raises:
        InputError: the directory is missing or corrupted.
    """
    directory = Path(directory).absolute()
    file = directory / "model.json"
    try:
        described = json.loads(file.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"no model in {directory}: model.json is missing") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{file}: not valid JSON: {error}") from None
    try:
        model = XClip(read_model_config(described))
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{file} does not describe a model: {error}") from None
    shapes = jax.eval_shape(lambda: init_params(model, 0))
    params = _read_params(directory / "params", shapes)
    folder = directory / "tokenizer"
    tokenizer = load_tokenizer(folder, model.config.max_words) if folder.is_dir() else None
    return described, model, jax.device_put(params), tokenizer


def _read_params(folder: Path, shapes: PyTree) -> PyTree:
    """Reads parameters and checks their shapes, which Orbax does not check."""
    try:
        with local_checkpointer() as checkpointer:  # NumPy arrays load on any set of devices
            like = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), shapes)
            params = checkpointer.restore(folder, like)
    except Exception as error:  # Orbax has no common type for corrupted checkpoints
        raise InputError(f"{folder} cannot be read: {_first_line(error)}") from None
    leaves = jax.tree.leaves_with_path(params)
    for (path, array), expected in zip(leaves, jax.tree.leaves(shapes), strict=True):
        if array.shape != expected.shape:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise InputError(
                f"{folder} does not fit model.json: {name} has shape {array.shape}, must be "
                f"{expected.shape}"
            )
    return params


def init_params(model: XClip, seed: int) -> PyTree:
    """Returns newly initialised parameters."""
    c, side = model.config, model.config.vision.image_size
    words, frames = (1, c.max_words), (1, c.max_frames)
    return model.init(
        jax.random.key(seed),
        np.zeros(words, np.int32),
        np.ones(words, bool),
        np.zeros((*frames, side, side, 3), np.uint8),
        np.ones(frames, bool),
    )["params"]


def claim_workdir(workdir: Path, config: RunConfig, dataset: Dataset) -> None:
    """Creates a work directory with its config.json, or checks that it belongs to this run.

    Raises:
        InputError: `workdir` cannot be written, or its run has other config fields or data in ways
            that change training; the message names the fields.
    """
    path = workdir / "config.json"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if is_first_process() and not path.exists():
            partial = path.with_suffix(".part")
            fields = flatten(plain_fields(config)) | _fixed_fields(config, dataset)
            partial.write_text(json.dumps(fields, indent=1) + "\n")
            os.replace(partial, path)
    except OSError as error:
        raise InputError(f"work directory {workdir} cannot be written: {error}") from None
    wait_for_all("config.json")
    check_same_run(workdir, config, dataset)


def check_same_run(workdir: Path, config: RunConfig, dataset: Dataset) -> None:
    """Raises InputError if a work directory's config.json is corrupted or of another run."""
    path, fields = workdir / "config.json", _fixed_fields(config, dataset)
    try:
        saved = json.loads(path.read_text())
        saved = {field: upgrade_value(field, value) for field, value in saved.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is corrupted: {error}; choose another --workdir") from None
    changed = [k for k in fields if k not in saved or saved[k] != fields[k]]
    if changed:
        values = ", ".join(f"{k} was {saved.get(k)!r}, is {fields[k]!r}" for k in changed)
        raise InputError(
            f"{workdir} belongs to a run with another config: {values}; "
            "use the same config or choose another --workdir"
        )


def _fixed_fields(config: RunConfig, dataset: Dataset) -> dict[str, Any]:
    """Returns {field: value} of all that affects training, including the content of the data."""
    fields = flatten(plain_fields(config))
    fixed = {k: v for k, v in fields.items() if not any(is_below(k, free) for free in FREE_FIELDS)}
    return fixed | {"data.fingerprint": dataset.fingerprint}


def plain_fields(section: Any) -> dict[str, Any]:
    """Returns a config, or a section of it, as nested dicts and lists of plain values."""
    return json.loads(section.to_json())


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns {"a.b": 1} for {"a": {"b": 1}}."""
    flat = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def is_below(field: str, parent: str) -> bool:
    """Returns True if a dotted field is `parent` or one of its sub-fields."""
    return field == parent or field.startswith(parent + ".")
