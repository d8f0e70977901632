"""What a run says while it trains, and the watch over its loss."""

import json
import math
import os
import time
from pathlib import Path

import jax
from tensorboardX import SummaryWriter

from xclip_jax.cli import InputError, progress
from xclip_jax.distributed import is_first_process


class Monitor:
    """Progress bar, metrics.jsonl, TensorBoard, and the watch over the loss.

    Metrics are read one step late, so that the devices never wait for the host.
    """

    def __init__(self, config, workdir, schedule, total_steps, start_step):
        self._config, self._schedule, self._workdir = config, schedule, workdir
        self._writer = (
            Writer(workdir, config.log.tensorboard, start_step) if is_first_process() else None
        )
        self._profiling = False
        self._bar = progress(total_steps, "training", "step", initial=start_step)
        self._pending, self._truncated, self._clock = None, 0, (start_step, time.perf_counter())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._profiling:
            self._stop_profiling()
        self._bar.close()
        if self._writer:
            self._writer.close()

    def profile(self, step):
        """Starts or ends the profile that config.log asks for, before this step."""
        log = self._config.log
        if step == log.profile_from and is_first_process():
            jax.profiler.start_trace(str(self._workdir))
            self._profiling = True
        if self._profiling and step > log.profile_to:
            self._stop_profiling()

    def _stop_profiling(self):
        jax.profiler.stop_trace()
        self._profiling = False

    def step(self, step, metrics, truncated):
        """Takes the metrics of a step just dispatched and reads those of the one before."""
        self.flush()
        self._pending = step, metrics
        self._truncated += truncated

    def flush(self):
        """Reads the metrics that are still on the device."""
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        values = {name: float(value) for name, value in metrics.items()}
        if not (math.isfinite(values["loss"]) and math.isfinite(values["gradient_norm"])):
            raise InputError(
                f"the loss is {values['loss']:g} (gradient norm {values['gradient_norm']:g}) at "
                f"step {step}; checkpoints of earlier steps are kept. Try, in another --workdir, a "
                "smaller config.optimizer.lr or encoder_lr, a longer config.optimizer.warmup, or "
                "config.model.dtype=float32"
            )
        self._bar.update()
        if step % self._config.log.every == 0:
            self._log(step, values)

    def _log(self, step, values):
        before, then = self._clock
        self._clock = step, time.perf_counter()
        rate = (step - before) * self._config.train.batch_size / (self._clock[1] - then)
        self._bar.set_postfix_str(
            f"loss {values['loss']:.3f}, accuracy {values['accuracy']:.2f}, {rate:.0f} videos/s"
        )
        values |= {"learning_rate": float(self._schedule(step - 1)), "videos_per_second": rate}
        values["truncated_captions"] = self._truncated
        self._write(step, {f"train/{name}": value for name, value in values.items()})

    def _write(self, step, scalars):
        if self._writer:
            self._writer.write(step, scalars)

    def validation(self, step, name, metrics):
        """Writes the metrics of a split; returns the score that selects weights."""
        flat = {f"{name}/{way}/{k}": v for way, m in metrics.items() for k, v in m.items()}
        self._write(step, flat)
        recalls = [metrics[way]["R@1"] for way in ("text_to_video", "video_to_text")]
        if is_first_process():
            self._bar.write(
                f"step {step}: {name} R@1 {recalls[0]:.1f} text to video, "
                f"{recalls[1]:.1f} video to text"
            )
        self._clock = step, time.perf_counter()
        return sum(recalls) / 2


FILE = "metrics.jsonl"


class Writer:
    """Appends scalars by step; a resumed run first drops what lies after its checkpoint."""

    def __init__(self, workdir, tensorboard, after_step):
        path = Path(workdir) / FILE
        kept = [line for line in read_metrics(workdir) if line["step"] <= after_step]
        partial = path.with_suffix(".part")
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(partial, path)
        self._file = path.open("a")
        self._board = (
            SummaryWriter(str(workdir), purge_step=after_step + 1, write_to_disk=True)
            if tensorboard
            else None
        )

    def write(self, step, scalars):
        """Writes one line: step and scalars, a dict of name -> number."""
        self._file.write(json.dumps({"step": step, **scalars}) + "\n")
        self._file.flush()
        if self._board:
            for name, value in scalars.items():
                self._board.add_scalar(name, value, step)

    def close(self):
        """Writes out what is buffered."""
        self._file.close()
        if self._board:
            self._board.close()


def read_metrics(workdir):
    """The lines of metrics.jsonl as dicts; a last line cut by a kill is left out."""
    path = Path(workdir) / FILE
    lines = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines
