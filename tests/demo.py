"""The trained demo, for slow tests."""

import contextlib
import functools
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from xclip_jax.cli import CommandParser, InputError, parse_with_config
from xclip_jax.data.builder import Dataset
from xclip_jax.workdir import check_same_run

ROOT = Path(__file__).resolve().parents[1]


def run(folder, *arguments):
    """Runs a module of the package in a folder and returns what it printed."""
    slow = ("JAX_DISABLE_MOST_OPTIMIZATIONS", "XLA_FLAGS")  # of conftest.py: programs run slowly
    env = {name: value for name, value in os.environ.items() if name not in slow}
    env["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "-m", *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@functools.cache
def train_demo():
    """Returns a folder with the demo's runs/demo and data/demo.

    It is this repository's if the demo was trained in it with the present config, else a new one.
    """
    path = ROOT / "configs/demo.py"
    _, config, _ = parse_with_config(CommandParser(), [f"--config={path}"])
    with contextlib.suppress(InputError), contextlib.chdir(ROOT):
        if Path("runs/demo/results.json").is_file():
            check_same_run(Path("runs/demo"), config, Dataset(config.data.path))
            return ROOT
    folder = Path(tempfile.mkdtemp(prefix="demo"))
    run(folder, "xclip_jax.main", f"--config={path}")
    return folder
