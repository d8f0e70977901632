"""Measures the memory of prepare and of the input pipeline at 1,000 and 10,000 clips.

    python benchmarks/data_memory.py [FOLDER] [--sizes=1000,10000]

Memory should not grow with the number of clips. Renders the clips to FOLDER, which is kept
(default: a temporary folder), prepares them and reads 300 batches. Prints the peak memory of the
prepare process, the sum over its workers, and the peak of a process that reads batches.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import results

from xclip_jax.data import rendered
from xclip_jax.data.builder import Dataset
from xclip_jax.data.pipeline import TrainingPairs, training_batches
from xclip_jax.data.preprocess import FrameFormat
from xclip_jax.data.text import load_tokenizer


def peak_memory(command: list[str]) -> tuple[float, float]:
    """Runs a command and returns the peak MiB of its process and of its children together."""
    process = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    parent = children = 0
    while process.poll() is None:
        try:
            parent = max(parent, process.memory_info().rss)
            workers = (child.memory_info().rss for child in process.children(recursive=True))
            children = max(children, sum(workers))
        except psutil.Error:  # a process ended in between
            pass
        time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"exit status {process.returncode}: {' '.join(command)}")
    return parent / 2**20, children / 2**20


def read_batches(folder: str) -> None:
    """Reads 300 batches and prints the peak memory of this process, in MiB."""
    dataset = Dataset(folder)
    tokenizer = load_tokenizer(dataset.path / "tokenizer", 24)
    pairs = TrainingPairs(dataset, "train", "all")
    batches = training_batches(pairs, tokenizer, 16, 6, FrameFormat(), seed=0)
    for _ in range(300):
        next(batches)
    print(results.peak_mib())


def main() -> None:
    """Prints one line per number of clips."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, help="for the clips (default: temporary)")
    parser.add_argument("--sizes", default="1000,10000", help="numbers of clips")
    parser.add_argument("--read", metavar="DATA", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.read:
        return read_batches(args.read)
    folder = args.folder or Path(tempfile.mkdtemp())
    print(f"{'clips':>8}{'prepare':>10}{'workers':>10}{'batches':>10}   peak memory, MiB")
    for size in map(int, args.sizes.split(",")):
        scenes, data = folder / f"scenes{size}", folder / f"data{size}"
        rendered.render_dataset(scenes, num_train=size, num_val=0, num_test=0)
        command = [sys.executable, "-m", "xclip_jax.prepare", "--dataset=captions"]
        command += [f"--videos={scenes}/videos", f"--annotations={scenes}/captions.jsonl"]
        parent, workers = peak_memory([*command, f"--output={data}", "--image_size=224"])
        reader = [sys.executable, __file__, f"--read={data}"]
        done = subprocess.run(reader, check=True, capture_output=True, text=True)
        print(f"{size:8,}{parent:10.0f}{workers:10.0f}{float(done.stdout):10.0f}", flush=True)


if __name__ == "__main__":
    main()
