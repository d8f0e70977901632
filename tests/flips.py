"""Flips single bits of checkpoints, indexes and prepared data, and checks that each is noticed.

    python tests/flips.py checkpoint|index|data [TIMES]

A flip is harmless if the same numbers are read, and noticed if an older checkpoint is restored or
one clear line says what is corrupted.
"""

import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from xclip_jax.cli import InputError


def flip_bit(folder: Path, rng: random.Random) -> str:
    """Flips a random bit of a random file in a folder, and returns the file's relative path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    path = rng.choice(files)
    data = bytearray(path.read_bytes())
    position = rng.randrange(8 * len(data))
    data[position // 8] ^= 1 << position % 8
    path.write_bytes(data)
    return str(path.relative_to(folder))


def count_outcomes(
    folder: Path, read: Callable[[Path], str], times: int, seed: int = 0
) -> Counter[str]:
    """Returns the number of each outcome of `read`, called on copies with one flipped bit."""
    outcomes: Counter[str] = Counter()
    rng = random.Random(seed)
    for number in range(times):
        with tempfile.TemporaryDirectory() as temporary:
            copy = shutil.copytree(folder, Path(temporary) / "copy")
            file = flip_bit(copy, rng)
            try:
                outcome = read(copy)
            except InputError as error:
                outcome = "refused" if len(str(error)) < 1000 else "long message"
            except Exception as error:
                outcome = f"{type(error).__name__}"
            if outcome not in ("same", "older", "refused"):
                print(f"{number}: {file}: {outcome}", flush=True)
            outcomes[outcome] += 1
    return outcomes


def make_checkpoints(folder: Path) -> Callable[[Path], str]:
    """Writes three checkpoints to a folder, and returns a function that reads a copy of it."""
    from xclip_jax.checkpoint import open_checkpoints, restore_checkpoint, save_checkpoint

    rng = np.random.default_rng(0)
    states = {step: {"a": rng.normal(size=(40, 30)), "b": {"c": np.arange(7.0) + step}}
              for step in (1, 2, 3)}  # fmt: skip
    manager = open_checkpoints(folder)
    for step, state in states.items():
        save_checkpoint(manager, step, state, {1: 5.0, 2: 9.0, 3: 7.0}[step])
    manager.close()

    def read(copy: Path) -> str:
        manager = open_checkpoints(copy)
        try:
            best, _ = restore_checkpoint(manager, states[1], best=True)
            step, state = restore_checkpoint(manager, states[1])
        finally:
            manager.close()
        expected = states[step]
        same = np.array_equal(state["a"], expected["a"])
        same &= np.array_equal(state["b"]["c"], expected["b"]["c"])
        if not same:
            return f"other numbers: {step}, {best}, {state['b']['c']}, {np.abs(state['a'] - expected['a']).max()}"
        return "same" if (step, best) == (3, 2) else "older"

    return read


MAKERS = {"checkpoint": make_checkpoints}


def main() -> None:
    kind, times = sys.argv[1], int((sys.argv[2:] or ["200"])[0])
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "folder"
        read = MAKERS[kind](folder)
        print(dict(count_outcomes(folder, read, times)))


if __name__ == "__main__":
    main()
