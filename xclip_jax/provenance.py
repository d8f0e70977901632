"""Records where a run comes from: date, command, commit, versions, devices and durations."""

import datetime
import importlib.metadata
import json
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from xclip_jax import __version__
from xclip_jax.cli import write_atomically
from xclip_jax.distributed import is_first_process
from xclip_jax.monitor import read_metrics
from xclip_jax.workdir import RECORD, read_saved

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
_GIT_SECONDS = 10  # a commit that takes longer to find is left out


def describe_process() -> dict[str, Any]:
    """Returns the date, command, commit, versions and devices of this process as JSON values."""
    device = jax.devices()[0]
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": describe_command(),
        "commit": find_commit(Path(__file__).with_name("__init__.py")),
        "versions": {
            "xclip_jax": __version__,
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in _PACKAGES},
        },
        "devices": {
            "platform": device.platform,
            "kind": device.device_kind,
            "count": jax.device_count(),
            "processes": jax.process_count(),
        },
    }


def describe_command() -> str:
    """Returns this process's command line as a user would type it, without the package's path."""
    program, *arguments = sys.argv
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is not None:  # python -m
        return shlex.join(["python", "-m", spec.name.removesuffix(".__main__"), *arguments])
    if program in ("", "-c"):  # typed into Python
        return "python"
    script = Path(program)
    shown = script.name if script.is_absolute() else program
    return shlex.join([*(["python"] if script.suffix == ".py" else []), shown, *arguments])


def find_commit(file: Path) -> str | None:
    """Returns the commit of a tracked file's git checkout, or None if there is none.

    It ends in "-dirty" if a tracked file of the checkout was changed.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(file.parent), *arguments]
        options: Any = {"check": True, "capture_output": True, "timeout": _GIT_SECONDS}
        return subprocess.run(command, stdin=subprocess.DEVNULL, text=True, **options).stdout

    try:
        git("ls-files", "--error-unmatch", file.name)  # else another project's virtual environment
        return git("describe", "--always", "--abbrev=40", "--exclude=*", "--dirty").strip()
    except (OSError, subprocess.SubprocessError):
        return None


def record_training(workdir: Path, step: int, **facts: Any) -> None:
    """Adds a training that starts after `step` to config.json, with `facts` of the whole run.

    The first attempt is recorded whole; later ones that resume it, with what they change.
    """
    if not is_first_process():
        return
    now = describe_process() | facts
    record = read_record(workdir) if step else now
    if step:
        changed = {name: value for name, value in now.items() if record.get(name) != value}
        resumed = [*record.get("resumed", []), {"step": step, **changed}]
        record = {**record, **facts, "resumed": resumed}
    _write_record(workdir, record)


def complete_record(workdir: Path) -> None:
    """Adds the duration and the speed of a finished training to config.json."""
    if is_first_process():
        _write_record(workdir, read_record(workdir) | measure_training(workdir))


def read_record(workdir: Path) -> dict[str, Any]:
    """Returns what config.json records of a run's training, {} for runs of earlier versions."""
    return read_saved(workdir).get(RECORD, {})


def _write_record(workdir: Path, record: dict[str, Any]) -> None:
    content = json.dumps(read_saved(workdir) | {RECORD: record}, indent=1)
    write_atomically(workdir / "config.json", content + "\n")


def measure_training(workdir: Path) -> dict[str, Any]:
    """Returns the `seconds` of a training, all attempts together, and its `examples_per_second`.

    Both are from metrics.jsonl, None where it has none, so work lost to a kill does not count. The
    speed is the median over the run.
    """
    lines = read_metrics(workdir)
    seconds = [line["seconds"] for line in lines if "seconds" in line]
    rates = [rate for line in lines if (rate := line.get("train/videos_per_second"))]
    return {
        "seconds": seconds[-1] if seconds else None,
        "examples_per_second": round(float(np.median(rates)), 2) if rates else None,
    }


def describe_results(workdir: Path, params: Any, start: float) -> dict[str, Any]:
    """Returns where the results of a run come from.

    `training` is {} if nothing is recorded, `start` the time.perf_counter() of the evaluation's.
    """
    try:
        training = read_record(workdir) | measure_training(workdir)
    except FileNotFoundError:  # a model without its training
        training = {}
    seconds = round(time.perf_counter() - start, 2)
    return {
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "training": training,
        "evaluation": describe_process() | {"seconds": seconds},
    }
