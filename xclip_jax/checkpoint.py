"""Training checkpoints by Orbax: asynchronous, the newest two and the best one kept."""

import dataclasses
import json
import logging
import os
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy as keep
from safetensors.numpy import save_file

from xclip_jax.cli import InputError
from xclip_jax.config import FREE_FIELDS
from xclip_jax.data.text import load_tokenizer
from xclip_jax.distributed import gather_objects, is_first_process, wait_for_all
from xclip_jax.models import XClip, read_model_config
from xclip_jax.models.config import upgrade_value

# Checkpoints between evaluations have no score; Orbax would warn of each.
logging.getLogger("absl").addFilter(lambda record: "tracked_metric" not in str(record.msg))


def own_checkpointer():
    """Reads and writes whole arrays for this process alone, whatever the others do."""
    own = jax.process_index()
    options = ocp.options.MultiprocessingOptions(
        primary_host=own, active_processes={own}, barrier_sync_key_prefix=f"process_{own}"
    )
    return ocp.StandardCheckpointer(multiprocessing_options=options)


class Checkpoints:
    """The checkpoints of a work directory.

    A step that was cut short while being written or deleted is never taken for whole: restoring
    tries the newest first and falls back, saying so. Bits that changed on the disk are noticed if
    a file cannot be read any more or holds NaN or infinite numbers.
    """

    def __init__(self, directory):
        _delete_unreadable(Path(directory))
        _silence_late_reads()
        policies = [keep.LatestN(2), keep.BestN(get_metric_fn=_score, n=1, **_UNSCORED)]
        options = ocp.CheckpointManagerOptions(
            preservation_policy=keep.AnyPreservationPolicy(policies),
            best_fn=_score,  # without it Orbax drops the metrics
            cleanup_tmp_directories=True,
        )
        self._manager = ocp.CheckpointManager(Path(directory).absolute(), options=options)

    def save(self, step, state, score=None):
        """Starts writing `state`; `score` is the validation score (higher is better), if any."""
        metrics = None if score is None else {"score": float(score)}
        args = ocp.args.Composite(state=ocp.args.StandardSave(state))
        if not self._manager.save(step, args=args, metrics=metrics, force=True):
            raise RuntimeError(f"Orbax did not save step {step}")

    def restore_newest(self, like):
        """(step, state) of the newest whole checkpoint, or None; damaged newer ones are deleted.

        Args:
            like: the state's pytree of arrays or ShapeDtypeStructs with the wanted shardings.

        Raises:
            InputError: there are checkpoints, but none can be restored; they are left as they are.
        """
        damaged = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            reason = self._damage(step, like)
            if reason:
                damaged[step] = reason
                continue
            found = step, self.restore(step, like)
            for newer, reason in damaged.items():
                logging.warning(
                    "checkpoint %d is damaged, going on from %d: %s", newer, step, reason
                )
                self._manager.delete(newer)
            return found
        if damaged:
            step, reason = next(iter(damaged.items()))
            raise InputError(
                f"no checkpoint in {self._manager.directory} can be restored; they are damaged or "
                f"of another model: choose another --workdir or delete it ({step}: {reason})"
            )
        return None

    def _damage(self, step, like):
        """Why a checkpoint cannot be restored; None if it can. All processes come to one answer.

        Only the first process tries, by itself: were one of several to fail in the middle of
        restoring, the others would wait for it.
        """
        reason = None
        if is_first_process():
            like = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), like)
            try:
                folder = self._manager.directory / str(step) / "state"
                for path in folder.glob("array_metadatas/*"):
                    json.loads(path.read_text())
                with own_checkpointer() as checkpointer:
                    arrays = jax.tree.leaves(checkpointer.restore(folder, like))
                if not all(np.isfinite(array).all() for array in arrays):
                    reason = "it holds NaN or infinite numbers"
            except Exception as error:  # Orbax has no one type for a damaged checkpoint
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return gather_objects(reason)[0]

    def restore(self, step, like):
        """The state saved at `step`."""
        like = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(like))
        return self._manager.restore(step, args=args)["state"]

    def restore_best(self, like):
        """(step, state) with the highest validation score; the newest if none was ever scored.

        One that is damaged gives way to the next, with a warning.

        Raises:
            InputError: none can be restored.
        """
        self._manager.wait_until_finished()
        metrics = {step: self._manager.metrics(step) for step in self._manager.all_steps()}
        scores = {step: found["score"] if found else -np.inf for step, found in metrics.items()}
        # The latest of equals, which is the one that BestN keeps.
        for step in sorted(scores, key=lambda s: (scores[s], s), reverse=True):
            reason = self._damage(step, like)
            if not reason:
                return step, self.restore(step, like)
            logging.warning("checkpoint %d is damaged, taking the next best: %s", step, reason)
        raise InputError(f"no checkpoint in {self._manager.directory} can be restored")

    def wait(self):
        """Returns when everything is on disk."""
        self._manager.wait_until_finished()

    def close(self):
        """Waits and lets go of the directory."""
        self._manager.close()


def _delete_unreadable(directory):
    """Deletes steps whose metrics cannot be read, unless all are such: Orbax would open none."""
    if is_first_process():
        steps = [path for path in directory.glob("*") if path.name.isdigit()]
        broken = [path for path in steps if not _is_readable(path / "metrics" / "metrics")]
        for path in broken if len(broken) < len(steps) else []:
            logging.warning("checkpoint %s is damaged: its metrics cannot be read", path.name)
            shutil.rmtree(path)
    wait_for_all("whole checkpoints")


def _is_readable(path):
    """Whether a JSON file can be read, or is not there, as where nothing was validated."""
    try:
        json.loads(path.read_text())
    except FileNotFoundError:
        return True
    except ValueError:
        return False
    return True


def _silence_late_reads():
    """After one read failed, the others report to Orbax's closed event loop, a traceback each."""
    report = sys.unraisablehook

    def report_others(unraisable):
        if "Event loop is closed" not in str(unraisable.exc_value):
            report(unraisable)

    sys.unraisablehook = report_others


def _score(metrics):
    return metrics["score"]


_UNSCORED = {"keep_checkpoints_without_metrics": False}


UNREAD_FILE = "unread.safetensors"


def model_folder(directory):
    """The model directory at `directory`, which may be a work directory (then: its `model`)."""
    directory = Path(directory)
    if not (directory / "model.json").is_file() and (directory / "model").is_dir():
        return directory / "model"
    return directory


def partial_folder(directory):
    """A new folder beside `directory`, to be filled and then renamed to it.

    It has its own unmistakable name; what a killed run of the same name left is removed.
    """
    partial = Path(directory).with_name(f".{Path(directory).name}.xclip_jax-partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def save_model(directory, config, params, *, tokenizer=None, unread=None, extra=None):
    """Writes a model directory whole or not at all, in place of an older one.

    Args:
        config: the model's ModelConfig.
        params: the parameters' pytree.
        tokenizer: a Tokenizer, or None.
        unread: official name -> array, kept for the way back to PyTorch.
        extra: more entries of model.json.
    """
    directory = Path(directory).absolute()
    if not is_first_process():
        return
    partial = partial_folder(directory)
    described = dataclasses.asdict(config) | (extra or {})
    (partial / "model.json").write_text(json.dumps(described, indent=2) + "\n")
    if tokenizer is not None:
        tokenizer.save(partial / "tokenizer")
    if unread:
        save_file(unread, partial / UNREAD_FILE)
    with own_checkpointer() as checkpointer:
        checkpointer.save(partial / "params", jax.tree.map(np.asarray, params))
    if directory.exists():
        shutil.rmtree(directory)
    partial.rename(directory)


def load_model(directory):
    """Reads a model directory.

    Returns:
        (described, model, params, tokenizer): model.json as a dict; the linen module; params on
        the default device; tokenizer None if the directory holds none.

    Raises:
        InputError: it is missing or damaged.
    """
    directory = Path(directory).absolute()
    try:
        described = json.loads((directory / "model.json").read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"no model in {directory}: looked for model.json") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{directory / 'model.json'}: not valid JSON: {error}") from None
    try:
        model = XClip(read_model_config(described))
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{directory / 'model.json'} does not describe a model: {error}") from None
    try:
        with own_checkpointer() as checkpointer:
            # Told to be NumPy, so that they load whatever devices they were saved from.
            shapes = jax.eval_shape(lambda: init_params(model, 0))
            like = jax.tree.map(lambda a: np.empty(a.shape, a.dtype), shapes)
            params = checkpointer.restore(directory / "params", like)
    except Exception as error:  # Orbax has no one type for a damaged checkpoint
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{directory / 'params'} cannot be read: {reason}") from None
    _check_shapes(directory, params, shapes)
    params = jax.device_put(params)
    folder = directory / "tokenizer"
    tokenizer = load_tokenizer(folder, model.config.max_words) if folder.is_dir() else None
    return described, model, params, tokenizer


def _check_shapes(directory, params, expected):
    """Orbax hands back an array of another shape than asked for without a word."""
    for (path, found), wanted in zip(
        jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(expected), strict=True
    ):
        if found.shape != wanted.shape:
            name = "/".join(entry.key for entry in path)
            raise InputError(
                f"{directory / 'params'} do not fit model.json: {name} has shape {found.shape}, "
                f"must be {wanted.shape}"
            )


def init_params(model, seed):
    """Fresh parameters."""
    c, side = model.config, model.config.vision.image_size
    words, frames = (1, c.max_words), (1, c.max_frames)
    return model.init(
        jax.random.key(seed),
        np.zeros(words, np.int32),
        np.ones(words, bool),
        np.zeros((*frames, side, side, 3), np.uint8),
        np.ones(frames, bool),
    )["params"]


def claim_workdir(workdir, config, dataset):
    """Makes the work directory and its config.json, or checks that it belongs to this run.

    Raises:
        InputError: it cannot be written, or was made with a config or data that change the course
            of training; the fields are named.
    """
    path = workdir / "config.json"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if is_first_process() and not path.exists():
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
        before = json.loads(path.read_text())
        before = {field: upgrade_value(field, value) for field, value in before.items()}
    except (ValueError, TypeError, AttributeError) as error:
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
