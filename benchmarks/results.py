"""What the benchmarks share: a table on the screen, and a JSON file that says where it was made."""

import datetime
import importlib.metadata
import json
import os
import platform
import re
from pathlib import Path

import jax

FOLDER = Path(__file__).parent / "results"


def write(name, arguments, rows):
    """Writes results/NAME_DEVICE.json and returns its path.

    Args:
        name: of the benchmark.
        arguments: dict of what it was called with.
        rows: list of dicts, what it measured.
    """
    kind = re.sub(r"\W+", "_", jax.devices()[0].device_kind.lower())
    path = FOLDER / f"{name}_{kind}.json"
    content = {
        "benchmark": name,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "hardware": hardware(),
        "versions": versions(),
        "arguments": arguments,
        "rows": rows,
    }
    FOLDER.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def hardware():
    """The devices of this process and the processor it runs on."""
    return {
        "device_kind": jax.devices()[0].device_kind,
        "devices": len(jax.devices()),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
    }


def versions():
    """Of what the time depends on; None: not installed."""
    found = {name: _version(name) for name in ("jax", "jaxlib", "torch")}
    return {**found, "python": platform.python_version()}


def table(rows):
    """The rows, dicts with the same keys, as aligned lines."""
    lines = [list(rows[0]), *([_text(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True))
        for line in lines
    )


def peak_mib():
    """Peak memory of this process alone (Linux); getrusage's ru_maxrss includes the parent's."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024


def _text(value):
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _cpu_model():
    try:
        return re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):
        return platform.processor() or platform.machine()


def _version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
