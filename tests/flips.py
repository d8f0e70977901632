"""Flips single bits of checkpoints, indexes and prepared data, and checks that each is noticed.

    python tests/flips.py checkpoint|index|data [TIMES]

A flip is harmless if the same numbers are read, and noticed if an older checkpoint is restored or
one clear line says what is corrupted.
"""

import logging
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from xclip_jax.cli import InputError

HARMLESS = ("same", "older", "left out", "refused")


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
            logging.disable(logging.WARNING)
            try:
                outcome = read(copy)
            except InputError as error:
                outcome = "refused" if len(str(error)) < 1000 else "long message"
            except Exception as error:
                outcome = f"{type(error).__name__}: {error}"[:300]
            finally:
                logging.disable(logging.NOTSET)
            if outcome not in HARMLESS:
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
            return "other numbers"
        return "same" if (step, best) == (3, 2) else "older"

    return read


def make_data(folder: Path) -> Callable[[Path], str]:
    """Writes a prepared data set to a folder, and returns a function that reads a copy of it."""
    import tiny

    from xclip_jax.data.builder import Dataset
    from xclip_jax.data.text import load_tokenizer

    def read_all(copy: Path) -> str:
        dataset = Dataset(copy)
        records = {
            split: [
                {name: np.asarray(value).tolist() for name, value in record.items()}
                for record in (dataset.clips(split)[k] for k in range(len(counts)))
            ]
            for split, counts in dataset.captions_per_clip.items()
        }
        ids = load_tokenizer(copy / "tokenizer")(["a red dog and a blue cat"])[0].tolist()
        return repr((records, ids, dataset.image_size, dataset.fingerprint))

    tiny.make_dataset(folder)
    expected = read_all(folder)
    return lambda copy: "same" if read_all(copy) == expected else "other numbers"


def make_index(folder: Path) -> Callable[[Path], str]:
    """Writes an index to a folder, and returns a function that searches a copy of it."""
    import tiny

    from xclip_jax.search import Index, indexing

    indexing.run_jobs = tiny.run_jobs_here
    aside = Path(tempfile.mkdtemp())
    videos = aside / "videos"
    videos.mkdir()
    tiny.make_videos(videos, 5)
    index = Index.create(folder, tiny.make_model(aside / "model"), segment_seconds=2)
    index.add([videos])

    def read_all(copy: Path) -> str:
        index = Index.open(copy)
        index.__dict__["retriever"] = retriever
        hits = [index.query(text, k=100).hits for text in ("a dog", "a red cat")]
        thumbnails = [index.thumbnail(hit.id) for hit in hits[0]]
        return repr((hits, thumbnails))

    retriever = index.retriever
    expected = read_all(folder)

    def read(copy: Path) -> str:
        if Index.open(copy)._snapshot.corrupted:
            return "left out"  # with a warning
        return "same" if read_all(copy) == expected else "other numbers"

    return read


MAKERS = {"checkpoint": make_checkpoints, "data": make_data, "index": make_index}


def main() -> None:
    kind, times = sys.argv[1], int((sys.argv[2:] or ["200"])[0])
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "folder"
        read = MAKERS[kind](folder)
        print(dict(count_outcomes(folder, read, times)))


if __name__ == "__main__":
    main()
