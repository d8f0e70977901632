"""Fake programs that record their calls, for launch scripts without cloud, cluster or network."""

import os
import shlex
import stat
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = ROOT / "launch"
PROGRAM = ["-m", "xclip_jax.main", "--config=configs/msrvtt.py"]
PLACE = ["--zone=us-east5-b", "--project=my-project"]
VARIABLES = {
    "NAME": "msrvtt",
    "PROJECT": "my-project",
    "ZONE": "us-east5-b",
    "ACCELERATOR_TYPE": "v6e-8",
    "PROVISIONING": "spot",
    "BUCKET": "my-bucket",
    "CONFIG": "configs/msrvtt.py",
    "DATA": "data/msrvtt",
    "SHARED": "/scratch/me",
    "IMAGE": "my-registry/xclip_jax",
    "SERVICE_ACCOUNT": "trainer",
    "TPU": "tpu-v6e-slice",
    "TOPOLOGY": "4x4",
    "GPU": "nvidia-h100-80gb",
    "GPUS_PER_HOST": "8",
    "HOSTS": "2",
    "MODEL": "models/mine",
    "INDEX": "index/clips",
    "VIDEOS": "videos",
    "WORKERS": "8",
    "SHARDS": "4",
    "MACHINE": "n2-standard-8",
    "CPUS": "8",
    "CLOUD": "gcp",
    "EXTRAS": "ray",
    "PROFILE": "arn:aws:iam::1:instance-profile/worker",
    "HEAD_PROFILE": "arn:aws:iam::1:instance-profile/head",
}

RECORD = """#!/usr/bin/env bash
line=$(printf '%q ' "$(basename "$0")" "$@")
echo "$line" >> "$RECORD/calls"  # one write: programs of a pipe run concurrently
next() { head -n 1 "$RECORD/$1"; sed -i 1d "$RECORD/$1"; }  # queued outputs
"""
FAKES = {
    "gcloud": """
case "$*" in
  *" describe "*)
    state=$(next states)
    case $state in
      NONE) echo "ERROR: (gcloud) NOT_FOUND: Resource was not found" >&2; exit 1 ;;
      OFFLINE) echo "ERROR: (gcloud) network is unreachable" >&2; exit 1 ;;
      *) echo "WARNING: a newer version is available" >&2; echo "$state" ;;
    esac ;;
  *worker_setup*) exit "$(next setups)" ;;
  *worker_run*) exit "$(next runs)" ;;
  *" create "*) exit "$(next creates)" ;;
esac
""",
    "git": "",
    "date": "echo 1700000000",
    "hostname": "echo worker-0",
    "ray": "",
    "kubectl": 'cat > "$RECORD/manifest"',
    "scontrol": "",
    "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"',
    "python": """
trap 'echo saving; exit 75' TERM
echo "training with ${JAX_COMPILATION_CACHE_DIR:-no cache}"
touch "$RECORD/started"
while [[ -e $RECORD/keep_going ]]; do sleep 0.05; done
exit "$(next programs)"
""",
}


class Launcher:
    """A folder of fake programs first on PATH, a clean environment, and a record of the calls."""

    def __init__(self, folder):
        self.folder, self.bin = folder, folder / "bin"
        self.bin.mkdir()
        self.calls_file = folder / "calls"
        for name, body in FAKES.items():
            self.add_fake(name, body)
        self.environment = {
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "HOME": str(folder),
            "TMPDIR": str(folder),
            "RECORD": str(folder),
            "POLL_SECONDS": "0",
            "PAUSE_SECONDS": "0",
        }

    def add_fake(self, name, body, folder=None):
        path = (folder or self.bin) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(RECORD + body)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def answers(self, **lists):
        for name, answers in lists.items():
            (self.folder / name).write_text("".join(f"{answer}\n" for answer in answers))

    def popen(self, command, variables=VARIABLES, root=ROOT, **options):
        script, *arguments = command
        return subprocess.Popen(
            ["bash", str(root / "launch" / script), *arguments],
            env=self.environment | variables,
            cwd=root,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            **options,
        )

    def run(self, *command, **options):
        process = self.popen(command, **options)
        process.output, process.errors = process.communicate(timeout=20)
        return process

    def calls(self, *programs):
        lines = self.calls_file.read_text().splitlines() if self.calls_file.exists() else []
        calls = [shlex.split(line) for line in lines]
        return [call for call in calls if not programs or call[0] in programs]

    def wait_for(self, name):
        deadline = time.monotonic() + 10
        while not (self.folder / name).exists():
            assert time.monotonic() < deadline, f"{name} was not created"
            time.sleep(0.02)


@pytest.fixture
def launcher(tmp_path):
    launcher = Launcher(tmp_path)
    yield launcher
    (tmp_path / "keep_going").unlink(missing_ok=True)  # ends the fake program after a failed test


def tpus(*arguments):
    return ["gcloud", "compute", "tpus", *arguments, *PLACE]


def program(root, *more):
    """Returns the arguments of python for a folder that holds data and runs."""
    return [
        *PROGRAM,
        f"--workdir={root}/runs/msrvtt",
        f"--config.data.path={root}/data/msrvtt",
        *more,
    ]


def finished(process):
    output, _ = process.communicate(timeout=20)
    return process.returncode, output
