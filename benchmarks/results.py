"""Helpers of the benchmarks: timing, peak memory, tables, JSON files with the environment."""

import datetime
import importlib.metadata
import json
import os
import platform
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

FOLDER = Path(__file__).parent / "results"
Row = dict[str, Any]


def write(name: str, arguments: dict, rows: list[Row]) -> Path:
    """Writes results/NAME_DEVICE.json and returns its path.

    Args:
        name: of the benchmark.
        arguments: its command-line arguments.
        rows: its measurements.
    """
    kind = re.sub(r"\W+", "_", jax.devices()[0].device_kind.lower())
    path = FOLDER / f"{name}_{kind}.json"
    content = {
        "benchmark": name,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "hardware": describe_hardware(),
        "versions": list_versions(),
        "arguments": arguments,
        "rows": rows,
    }
    FOLDER.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def describe_hardware() -> dict[str, Any]:
    """Returns the kind and number of devices, the processor and its number of cores."""
    return {
        "device_kind": jax.devices()[0].device_kind,
        "devices": len(jax.devices()),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
    }


def list_versions() -> dict[str, str | None]:
    """Returns the versions that affect timings, None for packages that are not installed."""
    versions = {name: _version(name) for name in ("jax", "jaxlib", "torch")}
    return {**versions, "python": platform.python_version()}


def format_table(rows: list[Row]) -> str:
    """Returns rows with equal keys as right-aligned columns."""
    lines = [list(rows[0]), *([_format(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True))
        for line in lines
    )


def measure_seconds(function: Callable[[], Any]) -> tuple[float, Any]:
    """Returns the wall time of a call and its result, as soon as its arrays are computed."""
    start = time.perf_counter()
    result = jax.block_until_ready(function())
    return time.perf_counter() - start, result


def peak_mib() -> float:
    """Returns the peak memory of this process on Linux, in MiB.

    The ru_maxrss of getrusage is not used because it includes the parent's peak after a fork.
    """
    status = Path("/proc/self/status").read_text()
    return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) / 1024


def _format(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _cpu_model() -> str:
    try:
        return re.findall(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())[0]
    except (OSError, IndexError):
        return platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
