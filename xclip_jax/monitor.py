"""Monitors training: progress, metrics.jsonl, trackers, profiles, finite losses."""

import contextlib
import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from xclip_jax.cli import InputError, progress, write_atomically
from xclip_jax.config import RunConfig
from xclip_jax.distributed import is_first_process
from xclip_jax.metrics import Metrics
from xclip_jax.trackers import open_trackers

METRICS_FILE = "metrics.jsonl"
Schedule = Callable[..., Any]  # learning rate by step


class Monitor(contextlib.ExitStack):
    """Reports a training run's `steps` (from the resumed one) and stops if a loss is not finite.

    Metrics are read one step late, so the devices never wait for the host. A resumed run first
    drops the lines of metrics.jsonl that come after its checkpoint. The `seconds` of a line are
    those of all attempts up to it, without what was dropped.
    """

    def __init__(self, config: RunConfig, workdir: Path, schedule: Schedule, steps: range) -> None:
        super().__init__()
        self._config, self._workdir, self._schedule = config, workdir, schedule
        self._last_step = steps.stop
        bar = progress(steps.stop, "training", "step", initial=steps.start)
        self._bar = self.enter_context(bar)
        self._trace = self.enter_context(contextlib.ExitStack())
        self._pending, self._truncated = None, 0
        now = time.perf_counter()
        self._last_log, self._started, self._file = (steps.start, now), now, None
        if is_first_process():
            path = workdir / METRICS_FILE
            lines = [line for line in read_metrics(workdir) if line["step"] <= steps.start]
            write_atomically(path, "".join(json.dumps(line) + "\n" for line in lines))
            self._file = self.enter_context(path.open("a"))
            self._started -= max((line.get("seconds", 0) for line in lines), default=0)
        trackers = open_trackers(config, workdir, first_step=steps.start + 1)
        self._trackers = self.enter_context(trackers)

    def profile(self, step: int) -> None:
        """Starts before step config.log.profile_from, stops after config.log.profile_to."""
        if step == self._config.log.profile_from and is_first_process():
            self._trace.enter_context(jax.profiler.trace(str(self._workdir)))
        if step > self._config.log.profile_to:
            self._trace.close()

    def log_step(self, step: int, metrics: Mapping[str, jax.Array], truncated: int) -> None:
        """Stores the metrics of a dispatched step and logs those of the previous one."""
        self.flush()
        self._pending = step, metrics
        self._truncated += truncated

    def flush(self) -> None:
        """Logs the metrics that are still on the device.

        Raises InputError if the loss or the gradient is NaN or infinite.
        """
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        values = {name: float(value) for name, value in metrics.items()}
        loss, norm = values["loss"], values["gradient_norm"]
        if not math.isfinite(loss + norm):
            raise InputError(
                f"the loss is {loss:g} (gradient norm {norm:g}) at step {step}; checkpoints of "
                "earlier steps are kept. Try, in another --workdir, a smaller config.optimizer.lr "
                "or encoder_lr, a longer config.optimizer.warmup, or config.model.dtype=float32"
            )
        self._bar.update()
        if step % self._config.log.every == 0 or step == self._last_step:
            (last_step, last_time), now = self._last_log, time.perf_counter()
            self._last_log = step, now
            rate = (step - last_step) * self._config.train.batch_size / (now - last_time)
            status = f"loss {loss:.3f}, accuracy {values['accuracy']:.2f}, {rate:.0f} videos/s"
            self._bar.set_postfix_str(status)
            values |= {"learning_rate": float(self._schedule(step - 1)), "videos_per_second": rate}
            values["truncated_captions"] = self._truncated
            self._write(step, {f"train/{name}": value for name, value in values.items()})

    def log_validation(self, step: int, split: str, metrics: Metrics) -> float:
        """Logs the metrics of a split and returns the R@1 that selects weights, in percent."""
        self._write(step, flatten_metrics(split, metrics))
        texts, videos = (metrics[way]["R@1"] for way in ("text_to_video", "video_to_text"))
        if is_first_process():
            recalls = f"{texts:.1f} text to video, {videos:.1f} video to text"
            self._bar.write(f"step {step}: {split} R@1 {recalls}")
        self._last_log = step, time.perf_counter()
        by_texts = self._config.train.select_by == "text_to_video"
        return texts if by_texts else (texts + videos) / 2

    def _write(self, step: int, scalars: Mapping[str, float]) -> None:
        if self._file:
            seconds = round(time.perf_counter() - self._started, 2)
            self._file.write(json.dumps({"step": step, "seconds": seconds, **scalars}) + "\n")
            self._file.flush()
        for tracker in self._trackers:
            tracker.log_scalars(step, scalars)


def flatten_metrics(split: str, metrics: Metrics) -> dict[str, float]:
    """Returns {"SPLIT/DIRECTION/METRIC": value}."""
    return {f"{split}/{way}/{k}": v for way, m in metrics.items() for k, v in m.items()}


def read_metrics(workdir: str | Path) -> list[dict[str, Any]]:
    """Returns the lines of metrics.jsonl, without a last line truncated by a kill."""
    lines = []
    with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
        for line in (Path(workdir) / METRICS_FILE).read_text().splitlines():
            lines.append(json.loads(line))
    return lines
