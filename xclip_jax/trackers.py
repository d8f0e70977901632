"""Shows a run in TensorBoard and in Weights & Biases: scalars, settings, results, pictures."""

import contextlib
import importlib
import logging
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from xclip_jax.cli import first_line, write_atomically
from xclip_jax.config import RunConfig
from xclip_jax.distributed import is_first_process
from xclip_jax.workdir import changed_settings, current_settings

WANDB_ID = "wandb_id.txt"  # file of a work directory; all attempts continue the same run
_FINISH_SECONDS = 60  # for Weights & Biases to send the rest

Scalars = Mapping[str, float]
Pictures = Mapping[str, Path]


class Tracker(Protocol):
    """A program that shows the metrics of runs."""

    def log_scalars(self, step: int, scalars: Scalars) -> None:
        """Logs metrics of a step."""

    def log_results(self, step: int, scalars: Scalars, pictures: Pictures) -> None:
        """Logs the final metrics and pictures of the selected weights, those of `step`."""

    def close(self, *, failed: bool) -> None:
        """Writes what is buffered, `failed` if an exception stopped the run."""


class TensorBoard:
    """Writes event files for TensorBoard.

    `settings` become the run's hyperparameters, next to its final metrics. Events of an earlier
    attempt from `first_step` on are replaced.
    """

    def __init__(self, workdir: Path, settings: Mapping[str, Any], first_step: int | None) -> None:
        from tensorboardX import SummaryWriter  # imports torch where it is installed

        # Files are named by the second; an evaluation may start in that of a short training.
        suffix = "" if first_step is not None else ".results"
        options: Any = {"purge_step": first_step, "filename_suffix": suffix}
        self._writer: Any = SummaryWriter(str(workdir), **options)
        self._settings = settings

    def log_scalars(self, step: int, scalars: Scalars) -> None:
        """Logs metrics of a step."""
        for name, value in scalars.items():
            self._writer.add_scalar(_tag(name), value, step)

    def log_results(self, step: int, scalars: Scalars, pictures: Pictures) -> None:
        """Logs the final metrics, pictures and hyperparameters.

        They are of the same run as its curves; SummaryWriter.add_hparams would make another one.
        """
        from tensorboardX.summary import hparams

        self.log_scalars(step, scalars)
        for name, path in pictures.items():
            with Image.open(path) as image:
                pixels = np.asarray(image.convert("RGB"))
            self._writer.add_image(name, pixels, step, dataformats="HWC")
        kinds = bool | int | float | str
        fields = self._settings.items()
        plain = {k: v if isinstance(v, kinds) else str(v) for k, v in fields}
        for summary in hparams(plain, {_tag(name): value for name, value in scalars.items()}):
            self._writer.file_writer.add_summary(summary)

    def close(self, *, failed: bool) -> None:
        """Writes what is buffered."""
        self._writer.close()


def _tag(name: str) -> str:
    return name.replace("@", "_")  # as SummaryWriter does, but not for hyperparameters


class WeightsAndBiases:
    """Logs to a run of Weights & Biases, which stays open from training to the results.

    If it fails, a warning is printed and nothing more is logged.
    """

    def __init__(self, project: str, workdir: Path, settings: Mapping[str, Any]) -> None:
        self._run: Any = None
        with self._tolerate_failure():
            wandb: Any = importlib.import_module("wandb")  # optional: the extra [wandb]
            path = workdir / WANDB_ID
            if not path.exists():
                write_atomically(path, uuid.uuid4().hex[:12])
            name = path.read_text()
            if wandb.run is not None and wandb.run.id != name:
                wandb.finish()
            self._run = wandb.run or wandb.init(
                project=project,
                id=name,
                resume="allow",
                name=str(workdir),
                dir=str(workdir),
                settings=wandb.Settings(finish_timeout=_FINISH_SECONDS),
            )
            self._run.config.update(dict(settings), allow_val_change=True)
            # Steps of resumed runs and of the results may lie before the last one logged.
            self._run.define_metric("*", step_metric="step")

    @contextlib.contextmanager
    def _tolerate_failure(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of the network, the account, the disk
            self._run = None
            message = "Weights & Biases failed, nothing more is logged to it: %s"
            logging.getLogger(__name__).warning(message, first_line(error))

    def log_scalars(self, step: int, scalars: Scalars) -> None:
        """Logs metrics of a step."""
        if self._run is not None:
            with self._tolerate_failure():
                self._run.log({"step": step, **scalars})

    def log_results(self, step: int, scalars: Scalars, pictures: Pictures) -> None:
        """Logs the final metrics and pictures, and finishes the run."""
        self.log_scalars(step, scalars)
        if self._run is not None:
            with self._tolerate_failure():
                wandb: Any = importlib.import_module("wandb")
                images = {name: wandb.Image(str(path)) for name, path in pictures.items()}
                self._run.log({"step": step, **images})
                self._run.summary.update(dict(scalars))
                self._run.finish()

    def close(self, *, failed: bool) -> None:
        """Finishes a failed run."""
        if self._run is not None and failed:
            with self._tolerate_failure():
                self._run.finish(exit_code=1)


@contextlib.contextmanager
def open_trackers(
    config: RunConfig, workdir: Path, *, first_step: int | None = None
) -> Iterator[list[Tracker]]:
    """Yields the trackers of config.log, none in processes except the first.

    With `first_step`, the next step of training; without it, an evaluation.
    """
    trackers: list[Tracker] = []
    if is_first_process() and (config.log.tensorboard or config.log.wandb):
        settings = current_settings(workdir, config)
        if config.log.tensorboard:
            trackers.append(TensorBoard(workdir, changed_settings(settings), first_step))
        if config.log.wandb:
            trackers.append(WeightsAndBiases(config.log.wandb, workdir, settings))
    failed = True
    try:
        yield trackers
        failed = False
    finally:
        for tracker in trackers:
            tracker.close(failed=failed)
