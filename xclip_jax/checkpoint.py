"""Training checkpoints by Orbax: asynchronous, the newest two and the best one kept."""

import logging
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy as keep

from xclip_jax.distributed import is_first, share
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
    tries the newest first and falls back, saying so.
    """

    def __init__(self, directory):
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
            _silence_late_reads()
            like = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), like)
            try:
                with own_checkpointer() as checkpointer:
                    checkpointer.restore(self._manager.directory / str(step) / "state", like)
            except Exception as error:  # Orbax has no one type for a damaged checkpoint
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return share(reason)[0]

    def restore(self, step, like):
        """The state saved at `step`."""
        like = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(like))
        return self._manager.restore(step, args=args)["state"]

    def best_step(self):
        """The step with the highest validation score; the newest if none was ever scored."""
        self._manager.wait_until_finished()
        scores = {step: self._manager.metrics(step) for step in self._manager.all_steps()}
        scored = {step: metrics["score"] for step, metrics in scores.items() if metrics}
        # The latest of equals, which is the one that BestN keeps.
        return max(scored, key=lambda s: (scored[s], s)) if scored else max(scores, default=None)

    def wait(self):
        """Returns when everything is on disk."""
        self._manager.wait_until_finished()

    def close(self):
        """Waits and lets go of the directory."""
        self._manager.close()


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
