"""Memory of prepare and of the input pipeline at 1,000 and at 10,000 clips: it should not grow.

    python benchmarks/data_memory.py [FOLDER]

Renders the clips to FOLDER (kept; default: a temporary folder), prepares them with the command and
reads 300 batches. Prints the largest memory of prepare's process, of its workers together, and of
a process that reads batches.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from xclip_jax.data import rendered

SIZES = (1_000, 10_000)
READER = """
import re, sys
from pathlib import Path
from xclip_jax.data.builder import Dataset
from xclip_jax.data.pipeline import TrainingPairs, training_batches
from xclip_jax.data.text import load_tokenizer
dataset = Dataset(sys.argv[1])
tokenizer = load_tokenizer(dataset.path / "tokenizer", 24)
batches = training_batches(TrainingPairs(dataset, "train", "all"), tokenizer, 16, 6, 224, seed=0)
for _ in range(300):
    next(batches)
status = Path("/proc/self/status").read_text()  # getrusage counts the parent's memory too
print(int(re.search(r"VmHWM:\\s+(\\d+)", status)[1]) / 1024)
"""


def peaks(command):
    """Largest memory in MiB (of the process, of its children together) while a command runs."""
    process = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    own = children = 0
    while process.poll() is None:
        try:
            own = max(own, process.memory_info().rss)
            workers = (child.memory_info().rss for child in process.children(recursive=True))
            children = max(children, sum(workers))
        except psutil.Error:  # one has just ended
            pass
        time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"failed: {' '.join(map(str, command))}")
    return own / 2**20, children / 2**20


def main():
    """Prints a line a size."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
    print(f"{'clips':>8}{'prepare':>10}{'workers':>10}{'batches':>10}   peak memory, MiB")
    for size in SIZES:
        scenes, data = folder / f"scenes{size}", folder / f"data{size}"
        rendered.make(scenes, num_train=size, num_val=0, num_test=0)
        command = [sys.executable, "-m", "xclip_jax.prepare", "--dataset=captions"]
        command += [f"--videos={scenes}/videos", f"--annotations={scenes}/captions.jsonl"]
        own, workers = peaks([*command, f"--output={data}", "--image_size=224"])
        reading = subprocess.run(
            [sys.executable, "-c", READER, data], check=True, capture_output=True, text=True
        )
        print(f"{size:8,}{own:10.0f}{workers:10.0f}{float(reading.stdout):10.0f}", flush=True)


if __name__ == "__main__":
    main()
