"""Training of the tiny model by one or several processes that are stopped or killed.

    python tests/kills.py FOLDER [TIMES] [FULL_DISKS]

stops a run of two processes TIMES (default 20) times at random moments in random ways, fills its
disk FULL_DISKS (default 5) times, and compares its weights with those of an uninterrupted run.
"""

import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

TESTS = Path(__file__).resolve().parent
CONFIG = """
import sys
sys.path.insert(0, {tests!r})
import tiny

def get_config():
    c = tiny.make_config({data!r}, epochs={epochs}, checkpoint_every=5, eval_every=12)
    c.optimizer.update(lr=1e-4, encoder_lr=1e-4)
    c.eval.batch_size = 16
    return c
"""


def free_port():
    """Returns an unused port of this machine."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def read_results(workdir):
    """Returns the content of results.json without the dates and durations."""
    results = json.loads((Path(workdir) / "results.json").read_text())
    return {name: value for name, value in results.items() if name != "provenance"}


class Run:
    """One start of the command, as one or several processes."""

    def __init__(self, config, workdir, processes=1, devices=1, fields=()):
        self.workdir, self.log = Path(workdir), Path(f"{workdir}.log")
        self.started = time.time()
        self._log_start = self.log.stat().st_size if self.log.exists() else 0
        coordinator = f"localhost:{free_port()}"
        environment = os.environ | {
            "PYTHONPATH": str(TESTS.parent),
            "JAX_NUM_CPU_DEVICES": str(devices),
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "JAX_COMPILATION_CACHE_DIR": str(self.workdir.parent / "jax_cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        command = [sys.executable, "-m", "xclip_jax.main", f"--config={config}"]
        command += [f"--workdir={workdir}", *fields]
        self.processes = []
        for number in range(processes):
            joining = [f"--coordinator={coordinator}", f"--num_processes={processes}"]
            joining = [*joining, f"--process_id={number}"] if processes > 1 else []
            with self.log.open("a") as log:
                started = subprocess.Popen(
                    [*command, *joining],
                    env=environment,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            self.processes.append(started)

    def steps(self):
        """Returns the last step in metrics.jsonl."""
        path = self.workdir / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)

    def output(self):
        """Returns what this start has written to the log."""
        return self.log.read_bytes()[self._log_start :].decode(errors="replace")

    def wait_until(self, moment):
        """Waits until moment() is true or a process has ended."""
        while not moment() and all(p.poll() is None for p in self.processes):
            time.sleep(0.002)

    def end(self, seconds=400):
        """Returns the exit statuses, after killing processes still running after `seconds`."""
        deadline = time.monotonic() + seconds
        try:
            return [p.wait(max(0.1, deadline - time.monotonic())) for p in self.processes]
        finally:
            for process in self.processes:
                process.kill()


def write_config(folder, data, epochs):
    """Writes a config file of the tiny model, with three steps an epoch."""
    path = Path(folder) / "config.py"
    path.write_text(CONFIG.format(tests=str(TESTS), data=str(data), epochs=epochs))
    return path


def complete_checkpoints(workdir):
    """Returns the folders of the checkpoints whose writing has ended, in order of their steps."""
    steps = [p for p in (Path(workdir) / "checkpoints").glob("*") if p.name.isdigit()]
    return sorted(steps, key=lambda path: int(path.name))


def truncate_newest(workdir):
    """Truncates a file of the newest checkpoint and returns its step, None if there is one only."""
    steps = complete_checkpoints(workdir)
    if len(steps) < 2:
        return None
    newest = steps[-1]
    largest = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    with largest.open("r+b") as file:
        file.truncate(largest.stat().st_size // 2)
    return int(newest.name)


def in_mid_save(run):
    """Returns True while this start, not an earlier one, is writing a checkpoint."""
    try:
        found = [path.stat().st_mtime for path in run.workdir.glob("checkpoints/*tmp*")]
    except FileNotFoundError:  # renamed: complete
        return False
    return any(changed > run.started for changed in found)


def fill_disk(run):
    """Lets further writes of this start fail, as on a full disk, beyond 50 kB of a file."""
    for process in run.processes:
        _, hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (50_000, hard))


def weights(workdir):
    """Returns the selected weights of a finished run as a list of arrays."""
    import jax

    from xclip_jax.checkpoint import load_model

    return [np.asarray(x) for x in jax.tree.leaves(load_model(Path(workdir) / "model")[2])]


def main():
    """Kills a run repeatedly, then compares its weights."""
    folder = Path(sys.argv[1])
    times, full_disks = map(int, [*sys.argv[2:4], 20, 5][:2])
    sys.path.insert(0, str(TESTS))
    import tiny

    folder.mkdir(parents=True)
    epochs = 7 * (times + full_disks)
    config = write_config(folder, tiny.make_dataset(folder / "data"), epochs)
    assert Run(config, folder / "whole", 2).end(3600) == [0, 0]
    rng = random.Random(0)
    ways = rng.choices(
        ["SIGTERM", "SIGKILL", "SIGKILL in mid-save", "truncated checkpoint"], k=times
    )
    ways += ["full disk"] * full_disks
    rng.shuffle(ways)
    for number, way in enumerate(ways):
        (folder / "stopped.log").unlink(missing_ok=True)  # else it may be too long for a full disk
        run = Run(config, folder / "stopped", 2)
        before = run.steps()
        victim = rng.choice(run.processes)
        if way == "SIGKILL in mid-save":
            run.wait_until(lambda run=run: in_mid_save(run))
        else:
            enough = before + rng.randint(1, 15)
            run.wait_until(lambda run=run, enough=enough: run.steps() >= enough)
        if way == "full disk":
            fill_disk(run)
        else:
            victim.send_signal(signal.SIGTERM if way == "SIGTERM" else signal.SIGKILL)
        statuses = run.end()
        damaged = truncate_newest(run.workdir) if way.startswith("truncated") else ""
        print(number, way, statuses, f"at step {run.steps()}", damaged, flush=True)
        assert statuses != [0, 0]
        if way == "full disk":
            lines = [x for x in run.output().splitlines() if x.startswith("error: ")]
            print(*(line[:150] for line in lines), sep="\n", flush=True)
            assert 1 <= len(lines) <= 2  # of each process
            continue
        assert statuses == [75, 75] if way == "SIGTERM" else 0 not in statuses
    assert Run(config, folder / "stopped", 2).end(3600) == [0, 0]
    for a, b in zip(weights(folder / "whole"), weights(folder / "stopped"), strict=True):
        np.testing.assert_array_equal(a, b)
    print("weights are bit-identical")


if __name__ == "__main__":
    main()
