"""Orbax's handler of a tree of arrays, extended so that a failed write is known at once.

Orbax itself raises the error only after a barrier, at which processes wait for each other. Those
that wait for the failed one to write its part never come to it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import orbax.checkpoint as ocp


class WatchedHandler(ocp.StandardCheckpointHandler):
    """A handler of a tree of arrays that calls `note_failure` as soon as a write fails."""

    def __init__(self, note_failure: Callable[[Exception], None]) -> None:
        super().__init__()
        self.note_failure = note_failure

    async def async_save(self, *args: Any, **kwargs: Any) -> list[Any]:
        """Starts writing, and returns futures."""
        futures = await super().async_save(*args, **kwargs) or []
        return [WatchedFuture(future, self.note_failure) for future in futures]

    def finalize(self, directory: Any) -> None:
        """Completes the files."""
        try:
            super().finalize(directory)
        except Exception as error:
            self.note_failure(error)
            raise


@dataclasses.dataclass
class WatchedFuture:
    """A future of Orbax that calls `note_failure` if it fails."""

    future: Any
    note_failure: Callable[[Exception], None]

    def result(self, timeout: float | None = None) -> Any:
        """Waits for the result."""
        try:
            return self.future.result(timeout)
        except Exception as error:
            self.note_failure(error)
            raise

    def cancel(self) -> bool | None:
        """Cancels the work."""
        return self.future.cancel()


@ocp.args.register_with_handler(WatchedHandler, for_save=True)
@dataclasses.dataclass
class WatchedSave(ocp.args.StandardSave):
    """Arguments of a save."""


@ocp.args.register_with_handler(WatchedHandler, for_restore=True)
@dataclasses.dataclass
class WatchedRestore(ocp.args.StandardRestore):
    """Arguments of a restore."""
