"""Reads and writes checkpoints and model directories."""

import asyncio
import contextlib
import dataclasses
import getpass
import hashlib
import json
import logging
import math
import operator
import os
import shutil
import sys
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies
from safetensors.numpy import save_file

from xclip_jax import integrity
from xclip_jax.checkpoint_handler import WatchedHandler, WatchedRestore, WatchedSave
from xclip_jax.cli import InputError, check_local, first_line, read_json, write_atomically
from xclip_jax.data.text import load_tokenizer
from xclip_jax.data.tokenizer import Tokenizer
from xclip_jax.distributed import gather_objects, is_first_process, wait_for_all
from xclip_jax.models import ModelConfig, XClip, read_model_config
from xclip_jax.models.config import check_model

UNSCORED = -1.0  # score of a checkpoint without validation: below every recall
UNREAD_FILE = "unread.safetensors"
# Patterns of all files of a model directory; * also matches slashes.
MODEL_FILES = ("model.json", integrity.DIGESTS, UNREAD_FILE, "params/*", "tokenizer/*")
_ORBAX_METADATA = "_CHECKPOINT_METADATA"  # changed when a step gets its name; not needed
PyTree = Any


class Checkpoints(ocp.CheckpointManager):
    """The checkpoints of a work directory: the newest two and the best one are kept.

    A step is committed together with the digests of its files, which repeat its score. `failure` is
    the error of a write in the background, if any.
    """

    failure: Exception | None

    def __init__(self, directory: Path) -> None:
        self.path, self.failure = directory.absolute(), None
        self.saving: tuple[int, dict[str, float]] | None = None  # the step and its metrics
        score = operator.itemgetter("score")
        best = policies.BestN(get_metric_fn=score, n=1, keep_checkpoints_without_metrics=False)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(2), best]),
            best_fn=score,  # Orbax writes metrics only if this is set
            cleanup_tmp_directories=True,
            async_options=ocp.options.AsyncOptions(post_finalization_callback=self._write_digests),
        )
        handlers = {"state": WatchedHandler(self.note_failure)}
        super().__init__(escape_path(self.path), options=options, item_handlers=handlers)

    def note_failure(self, error: Exception) -> None:
        """Takes an error of a write in the background."""
        self.failure = error

    def _write_digests(self) -> None:
        """Writes the digests of the step that is being saved, just before it gets its name."""
        if self.saving is not None and is_first_process():
            step, metrics = self.saving
            try:
                for folder in self.path.glob(f"{step}.*"):
                    integrity.write_digests(folder, metrics, skip=_ORBAX_METADATA)
            except OSError as error:
                self.note_failure(error)
                raise


def open_checkpoints(directory: Path) -> Checkpoints:
    """Opens the checkpoints of a work directory, and repairs scores that cannot be read."""
    if is_first_process():
        for path in directory.glob("*"):
            if path.name.isdigit():
                _repair_score(path)
    wait_for_all("readable checkpoints")
    _ignore_reads_after_failure()
    return Checkpoints(directory)


def _repair_score(folder: Path) -> None:
    """Rewrites the score of a step whose file is corrupted, because Orbax then opens no step.

    Without digests, its score is unknown, and the step is not selected as the best.
    """
    file = folder / "metrics" / "metrics"
    if not file.parent.is_dir() and not integrity.read_digests(folder):
        return  # saved without a score
    digests = integrity.read_digests(folder)
    try:
        score = json.loads(file.read_text())["score"]
        intact = integrity.find_corruption(folder, ["metrics/metrics"]) is None
        if intact and type(score) is float and math.isfinite(score):
            return
    except (OSError, ValueError, KeyError, TypeError):
        pass
    metrics = digests["notes"] if digests else {"score": UNSCORED}
    logging.warning("checkpoint %s has a corrupted score, now set to %s", folder.name, metrics)
    file.parent.mkdir(exist_ok=True)
    write_atomically(file, json.dumps(metrics))


def _ignore_reads_after_failure() -> None:
    """Suppresses the tracebacks of pending reads after a failed restore closed its event loop."""
    report, closed_loop = sys.unraisablehook, asyncio.BaseEventLoop.call_soon_threadsafe.__code__

    def report_others(error: Any) -> None:
        if not error.exc_traceback or error.exc_traceback.tb_frame.f_code is not closed_loop:
            report(error)

    sys.unraisablehook = report_others


def save_checkpoint(
    manager: Checkpoints, step: int, state: PyTree, score: float | None = None
) -> None:
    """Starts writing the state after `step` steps, with its validation score (higher is better)."""
    wait_for_writes(manager)
    metrics = {"score": UNSCORED if score is None else float(score)}
    manager.saving = step, metrics
    args = ocp.args.Composite(state=WatchedSave(state))
    with _report_failed_writes(manager):
        manager.save(step, args=args, metrics=metrics, force=True)


def wait_for_writes(manager: Checkpoints) -> None:
    """Waits until the last checkpoint is written, or raises InputError if it cannot be."""
    with _report_failed_writes(manager):
        # Orbax reports a failure only after all processes have met at a barrier, to which those
        # that wait for the failed one do not come.
        while manager.is_saving_in_progress():
            if manager.failure is not None:
                raise manager.failure
            time.sleep(0.001)
        manager.wait_until_finished()


@contextlib.contextmanager
def _report_failed_writes(manager: Checkpoints) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a full disk is a ValueError of TensorStore
        problem = f"no checkpoint can be written to {manager.path}"
        raise InputError(f"{problem}: {first_line(error):.300}") from None


def restore_checkpoint(
    manager: Checkpoints, like: PyTree, best: bool = False
) -> tuple[int, PyTree]:
    """Returns (step, state) of the newest or the best intact checkpoint.

    Corrupted ones, with files that are missing, unreadable or unlike their digests, or that contain
    NaN or infinite numbers, are skipped; those newer than the newest intact one are renamed. Of
    equally good checkpoints the newest is returned. `like` is a tree of arrays or
    ShapeDtypeStructs with the shardings to restore to. Raises InputError if no checkpoint can be
    restored.
    """
    wait_for_writes(manager)
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
        if corrupted and not best:
            _set_aside(manager, corrupted)
        like = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        args = ocp.args.Composite(state=WatchedRestore(like))
        return step, manager.restore(step, args=args)["state"]
    raise InputError(
        f"no checkpoint in {manager.path} can be restored: all are corrupted or of another "
        f"model ({next(iter(corrupted.values()), 'none')}); delete it or choose another --workdir"
    )


def _set_aside(manager: Checkpoints, steps: Iterable[int]) -> None:
    """Renames corrupted checkpoints, so that their steps can be saved again."""
    if is_first_process():
        for step in steps:
            folder = manager.path / str(step)
            target = folder.with_name(f"corrupted_{step}_{uuid.uuid4().hex[:6]}")
            folder.rename(target)
            logging.warning("checkpoint %d is now %s: it can be deleted", step, target)
    wait_for_all("corrupted checkpoints")
    manager.reload()


def _find_corruption(manager: Checkpoints, step: int, like: PyTree) -> str | None:
    """Returns, in all processes, why a checkpoint cannot be restored, or None."""
    reason = None
    if is_first_process():  # if one fails in a joint restore, the others wait forever
        folder = manager.path / str(step)
        try:
            reason = integrity.find_corruption(folder)
            for path in (folder / "state").glob("array_metadatas/*"):
                json.loads(path.read_text())
            arrays = jax.tree.leaves(_read_arrays(folder / "state", like)) if not reason else []
            if not all(np.isfinite(array).all() for array in arrays):
                reason = "it contains NaN or infinite numbers"
        except Exception as error:  # Orbax has no common type for corrupted checkpoints
            reason = first_line(error)
    return gather_objects(reason)[0]


def _read_arrays(folder: Path, like: PyTree) -> PyTree:
    """Reads a tree of arrays as NumPy arrays, in this process alone and for any set of devices."""
    like = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), like)
    with local_checkpointer() as checkpointer:
        return checkpointer.restore(escape_path(folder), like)


def escape_path(folder: Path) -> Path:
    """Returns a path to an absolute folder without characters that Orbax takes for wildcards.

    The folder is made. The path is a symbolic link of a name that depends on the folder only, as
    all processes of a run must use the same one.
    """
    if not set("*?[]\\") & set(str(folder)):
        return folder
    links = Path(tempfile.gettempdir(), f"xclip_jax-{getpass.getuser()}")
    links.mkdir(mode=0o700, exist_ok=True)
    if links.is_symlink() or links.owner() != getpass.getuser():
        raise InputError(f"{folder}: rename it without * ? [ ] \\, as {links} is not yours")
    folder.mkdir(parents=True, exist_ok=True)  # Orbax cannot create what a link points to
    link = links / hashlib.sha256(str(folder).encode()).hexdigest()[:16]
    with contextlib.suppress(FileExistsError):
        link.symlink_to(folder, target_is_directory=True)
    return link


def local_checkpointer() -> ocp.StandardCheckpointer:
    """Returns a checkpointer with which this process alone reads and writes unsharded arrays."""
    index = jax.process_index()
    options = ocp.options.MultiprocessingOptions(
        primary_host=index, active_processes={index}, barrier_sync_key_prefix=f"process_{index}"
    )
    return ocp.StandardCheckpointer(multiprocessing_options=options)


def model_folder(directory: str | os.PathLike) -> Path:
    """Returns the model directory at `directory`, or its `model` if it is a work directory."""
    directory = check_local("model", directory)
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
    described = describe_model(config) | dict(extra or {})
    try:
        (partial / "model.json").write_text(json.dumps(described, indent=2) + "\n")
        if tokenizer is not None:
            tokenizer.save(partial / "tokenizer")
        if unread:
            save_file(dict(unread), partial / UNREAD_FILE)
        with local_checkpointer() as checkpointer:
            checkpointer.save(escape_path(partial) / "params", jax.tree.map(np.asarray, params))
        integrity.write_digests(partial)
    except Exception as error:  # a full disk has several types
        shutil.rmtree(partial, ignore_errors=True)
        raise InputError(f"{directory} cannot be written: {first_line(error):.300}") from None
    shutil.rmtree(directory, ignore_errors=True)
    partial.rename(directory)


def describe_model(config: ModelConfig) -> dict[str, Any]:
    """Returns the content of model.json."""
    described = dataclasses.asdict(config)
    described["preprocess"]["image_size"] = config.vision.image_size
    return described


def read_config(directory: Path) -> tuple[dict[str, Any], ModelConfig]:
    """Reads model.json: its content and the ModelConfig that it describes.

    Raises InputError if it is missing or corrupted.
    """
    file = directory / "model.json"
    try:
        described = read_json(file)
        config = read_model_config(described)
        check_model(config)
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"no model in {directory}: model.json is missing") from None
    except InputError:
        raise
    except KeyError as error:
        raise InputError(f"{file} does not describe a model: no or unknown {error}") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{file} does not describe a model: {first_line(error)}") from None
    return described, config


def load_model(directory: str | os.PathLike) -> tuple[Any, XClip, PyTree, Tokenizer | None]:
    """Reads a model directory: content of model.json, linen module, parameters, tokenizer if any.

    Raises InputError if the directory is missing or corrupted.
    """
    directory = Path(directory).absolute()
    if (directory / "model.json").is_file() and (reason := integrity.find_corruption(directory)):
        advice = f"restore it, or delete {integrity.DIGESTS} if it was changed on purpose"
        raise InputError(f"{reason}: {advice}")
    described, config = read_config(directory)
    # Recomputation is of the training step only.
    model = XClip(dataclasses.replace(config, remat="auto"))
    folder = directory / "params"
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
        if not np.isfinite(array).all():
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise InputError(f"{folder}: {name} contains NaN or infinite numbers")
    folder = directory / "tokenizer"
    tokenizer = load_tokenizer(folder, model.config.max_words) if folder.is_dir() else None
    return described, model, jax.device_put(params), tokenizer


def init_params(model: XClip, seed: int) -> PyTree:
    """Returns newly initialised parameters."""
    c, side = model.config, model.config.vision.image_size
    text = np.zeros((1, c.max_words), np.int32), np.ones((1, c.max_words), bool)
    video = np.zeros((1, c.max_frames, side, side, 3), np.uint8), np.ones((1, c.max_frames), bool)
    methods = {"both": (None, *text, *video), "text": ("encode_text", *text)}
    method, *inputs = (methods | {"vision": ("encode_video", *video)})[c.towers]
    return model.init(jax.random.key(seed), *inputs, method=method)["params"]
