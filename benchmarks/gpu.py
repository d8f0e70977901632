"""Measures training, similarity, encoding and input on one GPU, in at most nine minutes.

    python benchmarks/gpu.py

Each line of COMMANDS is a program of its own, so that memory is free again for the next, and one
that fails does not stop the others. Needs the extras `cuda13` and `torch`. Results are written to
results/NAME_DEVICE.json.
"""

import subprocess
import sys
import time
from pathlib import Path

# dots: what `auto` chooses on an H200, without compiling `none` first.
STEP = ("train_step.py", "--dtype=bfloat16", "--remat=dots", "--torch", "--repeats=2")
COMMANDS = {  # -> seconds after which it is stopped
    ("similarity.py", "--torch", "--count=4917", "--words=64", "--frames=64", "--repeats=1"): 90,
    (*STEP, "--model=b32", "--batch=300", "--name=train_step_b32"): 150,
    (*STEP, "--model=b16", "--batch=80", "--name=train_step_b16"): 150,
    ("encoding.py", "--model=b32,b16", "--dtype=bfloat16"): 60,
    ("input_pipeline.py", "--quick"): 90,
}


def main() -> None:
    """Runs all, exits with status 1 if one failed."""
    failed = []
    for (program, *arguments), limit in COMMANDS.items():
        command = [sys.executable, str(Path(__file__).with_name(program)), *arguments]
        print(f"== {program} {' '.join(arguments)}", flush=True)
        start = time.perf_counter()
        try:
            code = subprocess.run(command, timeout=limit).returncode
        except subprocess.TimeoutExpired:
            code = f"stopped after {limit} s"
        print(f"== {code or 'done'}, {time.perf_counter() - start:.0f} s", flush=True)
        failed += [program] if code else []
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
