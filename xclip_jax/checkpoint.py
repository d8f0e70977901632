"""Training checkpoints by Orbax: asynchronous, the newest two and the best one kept."""

import json
import logging
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy as keep

from xclip_jax.distributed import is_first, share, wait_for_all
from xclip_jax.errors import InputError

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
        if is_first():
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
        return share(reason)[0]

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
    if is_first():
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
