"""Launch scripts with fake programs that record their calls, without cloud, cluster or network."""

import os
import re
import select
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import kills
import pytest
import tiny
import yaml

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.rglob("*.sh"), LAUNCH / "slurm.sbatch"])
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
}
NEEDS = {
    "tpu/create.sh": "NAME PROJECT ZONE ACCELERATOR_TYPE PROVISIONING",
    "tpu/setup.sh": "NAME PROJECT ZONE BUCKET",
    "tpu/run.sh": "NAME PROJECT ZONE CONFIG DATA",
    "tpu/teardown.sh": "NAME PROJECT ZONE",
    "tpu/watch.sh": "NAME PROJECT ZONE ACCELERATOR_TYPE PROVISIONING BUCKET CONFIG DATA",
    "tpu/worker_setup.sh": "BUCKET",
    "slurm.sbatch": "NAME CONFIG DATA SHARED",
    "gke/apply.sh tpu": "NAME IMAGE SERVICE_ACCOUNT BUCKET CONFIG DATA TPU TOPOLOGY",
    "gke/apply.sh gpu": "NAME IMAGE SERVICE_ACCOUNT BUCKET CONFIG DATA GPU GPUS_PER_HOST HOSTS",
}
WITH_DRY_RUN = [name for name in NEEDS if "worker" not in name]

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


# Every script


@pytest.mark.skipif(
    not shutil.which("shellcheck"), reason="the program shellcheck is not installed"
)
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_pass_shellcheck(script):
    check = subprocess.run(["shellcheck", str(script)], cwd=ROOT, capture_output=True, text=True)
    assert check.returncode == 0, check.stdout


@pytest.mark.skipif(
    not shutil.which("shellcheck"), reason="the program shellcheck is not installed"
)
@pytest.mark.parametrize("block", ["setup", "run"])
def test_skypilot_blocks_pass_shellcheck(block):
    text = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())[block]
    command = ["shellcheck", "--shell=bash", "-"]
    check = subprocess.run(command, input=text, capture_output=True, text=True)
    assert check.returncode == 0, check.stdout


def test_scripts_are_strict_short_and_executable():
    for script in SCRIPTS:
        lines = script.read_text().splitlines()
        assert max(map(len, lines)) <= 100, script
        if script.name == "common.sh":  # sourced
            continue
        assert "set -euo pipefail" in lines, script
        assert script.suffix == ".sbatch" or os.access(script, os.X_OK), script


@pytest.mark.parametrize("command", NEEDS)
def test_missing_variables_are_listed_in_one_message(launcher, command):
    result = launcher.run(*command.split(), variables={})
    assert result.returncode == 2
    assert result.errors == f"error: set {NEEDS[command]}: see launch/README.md\n"
    few = launcher.run(*command.split(), variables=VARIABLES | {"NAME": "", "BUCKET": ""})
    missing = [name for name in NEEDS[command].split() if name in ("NAME", "BUCKET")]
    assert few.errors == f"error: set {' '.join(missing)}: see launch/README.md\n"
    assert launcher.calls() == []


@pytest.mark.parametrize("command", WITH_DRY_RUN)
def test_dry_run_prints_commands_without_running_them(launcher, command):
    result = launcher.run(*command.split(), "--dry-run")
    assert result.returncode == 0, result.errors
    assert result.output.strip()
    assert launcher.calls("gcloud", "kubectl", "srun", "scontrol", "python") == []


@pytest.mark.parametrize("command", ["create.sh", "setup.sh", "run.sh", "teardown.sh"])
def test_dry_run_prints_the_exact_commands(launcher, command):
    printed = launcher.run(f"tpu/{command}", "--dry-run").output
    launcher.calls_file.unlink(missing_ok=True)
    launcher.answers(creates=[0], setups=[0], runs=[0])
    launcher.run(f"tpu/{command}")
    commands = [call for call in map(shlex.split, printed.splitlines()) if call[0] == "gcloud"]
    assert commands == launcher.calls("gcloud") != []


def test_dry_run_of_watch_prints_all_steps(launcher):
    printed = launcher.run("tpu/watch.sh", "--dry-run", "--config.train.epochs=1").output
    assert " ".join(steps(map(shlex.split, printed.splitlines()))) == (
        "create describe send unpack setup run delete"
    )
    assert "--config.train.epochs=1" in printed


@pytest.mark.parametrize("script", ["create.sh", "setup.sh", "teardown.sh"])
def test_scripts_without_program_refuse_other_arguments(launcher, script):
    result = launcher.run(f"tpu/{script}", "--config.train.epochs=1")
    assert (result.returncode, launcher.calls("gcloud")) == (2, [])
    assert "--config.train.epochs=1: the only option is --dry-run" in result.errors


def test_arguments_must_start_with_dashes(launcher):
    result = launcher.run("tpu/run.sh", "dry-run")
    assert (result.returncode, launcher.calls("gcloud")) == (2, [])
    assert "dry-run: every option starts with --" in result.errors


# Cloud TPU, one command at a time

RUNTIMES = {
    "v4-16": "tpu-ubuntu2204-base",
    "v5litepod-16": "v2-alpha-tpuv5-lite",
    "v5p-16": "v2-alpha-tpuv5",
    "v6e-16": "v2-alpha-tpuv6e",
}
TIERS = {"spot": ["--spot"], "reserved": ["--reserved"], "on-demand": []}


@pytest.mark.parametrize("accelerator", RUNTIMES)
@pytest.mark.parametrize("tier", TIERS)
def test_create_requests_each_generation_and_tier(launcher, accelerator, tier):
    launcher.answers(creates=[0])
    variables = VARIABLES | {"ACCELERATOR_TYPE": accelerator, "PROVISIONING": tier}
    assert launcher.run("tpu/create.sh", variables=variables).returncode == 0
    assert launcher.calls("gcloud") == [
        tpus(
            *["queued-resources", "create", "msrvtt", "--node-id=msrvtt"],
            f"--accelerator-type={accelerator}",
            f"--runtime-version={RUNTIMES[accelerator]}",
            *TIERS[tier],
        )
    ]


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("ACCELERATOR_TYPE", "v5e-8", "ACCELERATOR_TYPE=v5e-8: must be v4-N, v5litepod-N, v5p-N"),
        ("PROVISIONING", "cheap", "PROVISIONING=cheap: must be spot, reserved or on-demand"),
    ],
)
def test_create_refuses_unknown_values(launcher, variable, value, message):
    result = launcher.run("tpu/create.sh", variables=VARIABLES | {variable: value})
    assert (result.returncode, launcher.calls("gcloud")) == (2, [])
    assert message in result.errors


def test_readme_lists_the_values_that_create_requests():
    rows = [line for line in (LAUNCH / "README.md").read_text().splitlines() if "-N` |" in line]
    for row, (accelerator, runtime) in zip(rows, RUNTIMES.items(), strict=True):
        _, name, counts, version, sixteen_chips, *_ = [
            cell.strip(" `") for cell in row[1:].split("|")
        ]
        prefix = accelerator.partition("-")[0]
        cores = prefix in ("v4", "v5p")
        assert (name, version) == (f"{prefix}-N", runtime)
        assert counts == ("TensorCores, 2 per chip" if cores else "chips")
        assert sixteen_chips == f"{prefix}-{32 if cores else 16}"


def test_setup_sends_the_commit_and_sets_up_all_workers(launcher):
    launcher.answers(setups=[0])
    assert launcher.run("tpu/setup.sh").returncode == 0
    archive = f"{launcher.folder}/msrvtt.tar.gz"
    unpack = "mkdir -p xclip_jax && tar -xzf xclip_jax.tar.gz -C xclip_jax"
    assert launcher.calls("git")[-1][-3:] == ["archive", f"--output={archive}", "HEAD"]
    send, *commands = launcher.calls("gcloud")
    assert send == tpus("tpu-vm", "scp", archive, "msrvtt:xclip_jax.tar.gz", "--worker=all")
    assert [on_workers(call) for call in commands] == [
        ["bash", "-c", unpack],
        [
            "env",
            "BUCKET=my-bucket",
            "MOUNT=/mnt/bucket",
            "bash",
            "xclip_jax/launch/tpu/worker_setup.sh",
        ],
    ]


def on_workers(call):
    """Returns the words of a command for all workers as the remote shell receives them."""
    assert [*call[:6], *call[-2:]] == [*tpus("tpu-vm", "ssh", "msrvtt")[:6], *PLACE]
    assert call[6] == "--worker=all"
    assert call[7].startswith("--command=")
    return shlex.split(call[7].removeprefix("--command="))


@pytest.mark.parametrize("status", [0, 1, 75, 255])
def test_run_starts_all_workers_and_exits_with_their_status(launcher, status):
    launcher.answers(runs=[status])
    option = "--config.name=a 'b' \"$c\" & d"
    assert launcher.run("tpu/run.sh", option).returncode == status
    [call] = launcher.calls("gcloud")
    assert on_workers(call) == [
        *["env", "LOGS=/mnt/bucket/logs/msrvtt", "bash", "xclip_jax/launch/tpu/worker_run.sh"],
        *["1700000000", "env", "JAX_COMPILATION_CACHE_DIR=/mnt/bucket/jax_cache", "python"],
        *program("/mnt/bucket", option),
    ]


def test_teardown_also_deletes_the_node(launcher):
    assert launcher.run("tpu/teardown.sh").returncode == 0
    assert launcher.calls("gcloud") == [
        tpus("queued-resources", "delete", "msrvtt", "--quiet", "--force")
    ]


# Cloud TPU, watch.sh


STEPS = {
    " create ": "create",
    " describe ": "describe",
    " scp ": "send",
    "-xzf": "unpack",
    "worker_setup": "setup",
    "worker_run": "run",
    " delete ": "delete",
}


def steps(calls):
    lines = [" ".join(call) for call in calls if call[0] == "gcloud"]
    return [next(step for sign, step in STEPS.items() if sign in line) for line in lines]


def watch(launcher, states, runs=(), creates=(), setups=(), **variables):
    """Returns the status of watch.sh, its steps except state requests, and its errors."""
    launcher.answers(states=states, runs=runs, creates=creates, setups=setups or [0] * 5)
    result = launcher.run("tpu/watch.sh", variables=VARIABLES | variables)
    done = [step for step in steps(launcher.calls("gcloud")) if step not in ("send", "unpack")]
    requests = done.count("describe")
    assert requests == len(states), result.errors
    return result.returncode, [step for step in done if step != "describe"], result.errors


def test_watch_waits_trains_and_deletes_the_slice(launcher):
    waiting = ["CREATING", "ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING"]
    status, done, _ = watch(launcher, ["NONE", *waiting, "ACTIVE"], runs=[0], creates=[0])
    assert (status, done) == (0, ["create", "setup", "run", "delete"])


def test_watch_requests_only_the_state(launcher):
    watch(launcher, ["ACTIVE"], runs=[0])
    assert launcher.calls("gcloud")[0] == tpus(
        "queued-resources", "describe", "msrvtt", "--format=value(state.state)"
    )


def test_watch_keeps_the_slice_on_demand(launcher):
    status, done, _ = watch(launcher, ["ACTIVE"], runs=[0], KEEP="1")
    assert (status, done) == (0, ["setup", "run"])


def test_watch_recreates_and_resumes_after_preemption(launcher):
    states = ["ACTIVE", "DELETING", "NONE", "PROVISIONING", "ACTIVE"]
    result, done, _ = watch(launcher, states, runs=[75, 0], creates=[0])
    assert result == 0
    assert done == ["setup", "run", "delete", "create", "setup", "run", "delete"]
    first, second = [call for call in launcher.calls("gcloud") if "worker_run" in call[7]]
    assert first == second  # the same command resumes


def test_watch_recreates_suspended_and_failed_slices(launcher):
    states = ["SUSPENDING", "SUSPENDED", "NONE", "FAILED", "NONE", "ACTIVE"]
    status, done, _ = watch(launcher, states, runs=[0], creates=[0, 0])
    assert status == 0
    assert done == ["delete", "create", "delete", "create", "setup", "run", "delete"]


@pytest.mark.parametrize("status", [1, 2, 134])
def test_watch_stops_at_a_program_failure_and_keeps_the_slice(launcher, status):
    result, done, errors = watch(launcher, ["ACTIVE", "ACTIVE"], runs=[status])
    assert (result, done) == (status, ["setup", "run"])
    assert f"status {status}; the slice is kept and costs money until" in errors


def test_watch_stops_when_the_package_cannot_be_installed(launcher):
    result, done, _ = watch(launcher, ["ACTIVE", "ACTIVE"], setups=[1])
    assert (result, done) == (1, ["setup"])


def test_watch_resumes_if_the_slice_was_lost_during_a_failure(launcher):
    states = ["ACTIVE", "SUSPENDING", "SUSPENDED", "NONE", "ACTIVE"]
    status, done, _ = watch(launcher, states, runs=[1, 0], creates=[0])
    assert status == 0
    assert done == ["setup", "run", "delete", "create", "setup", "run", "delete"]


@pytest.mark.parametrize(
    ("states", "creates"),
    [
        (["NONE", "NONE", "NONE"], [1, 1, 1]),
        (["FAILED", "FAILED", "FAILED"], []),
        (["OFFLINE", "OFFLINE", "OFFLINE"], []),
        (["NONE", "FAILED", "OFFLINE"], [1]),
    ],
)
def test_watch_stops_after_consecutive_failures(launcher, states, creates):
    status, done, errors = watch(launcher, states, creates=creates, MAX_FAILURES="3")
    assert status == 1
    assert done.count("create") == len(creates)
    assert "failed, 3 in a row of at most 3" in errors


def test_watch_stops_if_slices_cannot_be_reached(launcher):
    status, done, _ = watch(launcher, ["ACTIVE"] * 2, setups=[255, 255], MAX_FAILURES="2")
    assert (status, done) == (1, ["setup", "setup"])


def test_watch_reattaches_after_a_lost_connection(launcher):
    status, done, _ = watch(launcher, ["ACTIVE", "ACTIVE"], runs=[255, 0])
    assert (status, done) == (0, ["setup", "run", "setup", "run", "delete"])


def test_watch_recreates_a_slice_lost_with_its_connection(launcher):
    states = ["ACTIVE", "SUSPENDED", "NONE", "ACTIVE"]
    status, done, _ = watch(launcher, states, runs=[255, 0], creates=[0])
    assert status == 0
    assert done == ["setup", "run", "delete", "create", "setup", "run", "delete"]


def test_a_working_slice_resets_the_failure_count(launcher):
    states = ["OFFLINE", "NONE", "ACTIVE", "OFFLINE", "NONE", "ACTIVE"]
    status, _, _ = watch(launcher, states, runs=[75, 0], creates=[0, 0], MAX_FAILURES="2")
    assert status == 0


# One worker


@pytest.fixture
def worker(launcher):
    """A launcher with a copy of the scripts, because the clone may hold a virtual environment."""
    launcher.root = launcher.folder / "xclip_jax"
    shutil.copytree(LAUNCH, launcher.root / "launch")
    return launcher


def worker_run(worker, attempt, **options):
    logs = {"LOGS": str(worker.folder / "bucket/logs")}
    command = ["tpu/worker_run.sh", attempt, "python", "-m", "xclip_jax.main"]
    return worker.popen(command, variables=logs, root=worker.root, **options)


def finished(process):
    output, _ = process.communicate(timeout=20)
    return process.returncode, output


@pytest.mark.parametrize("status", [0, 1, 75])
def test_worker_command_runs_the_program_in_a_shell(worker, status):
    """Runs the command passed to gcloud in a shell, as ssh does."""
    mount = {"MOUNT": str(worker.folder / "bucket")}
    worker.answers(runs=[0], programs=[status])
    worker.run("tpu/run.sh", "--config.name=a 'b' \"$c\"", variables=VARIABLES | mount)
    command = worker.calls("gcloud")[0][7].removeprefix("--command=")
    result = subprocess.run(
        ["bash", "-c", command],
        cwd=worker.folder,
        env=worker.environment,
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert (result.returncode, result.stdout) == (
        status,
        f"training with {worker.folder}/bucket/jax_cache\n",
    )
    words = program(f"{worker.folder}/bucket", "--config.name=a 'b' \"$c\"")
    assert worker.calls("python") == [["python", *words]]
    log = worker.folder / "bucket/logs/msrvtt/1700000000-worker-0.log"
    assert log.read_text() == result.stdout


def test_repeated_worker_command_starts_the_program_once(worker):
    worker.answers(programs=[75, 0])
    assert finished(worker_run(worker, "1")) == (75, "training with no cache\n")
    assert finished(worker_run(worker, "1")) == (75, "training with no cache\n")
    assert len(worker.calls("python")) == 1
    assert finished(worker_run(worker, "2"))[0] == 0
    assert len(worker.calls("python")) == 2


def test_program_survives_a_lost_connection(worker):
    (worker.folder / "keep_going").touch()
    worker.answers(programs=[0])
    first = worker_run(worker, "1", start_new_session=True)
    worker.wait_for("started")
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    second = worker_run(worker, "2")
    has_output, _, _ = select.select([second.stderr], [], [], 10)
    (worker.folder / "keep_going").unlink()
    assert has_output
    assert "following attempt 1" in second.stderr.readline()
    assert finished(second) == (0, "training with no cache\n")
    assert len(worker.calls("python")) == 1


def test_worker_shutdown_lets_the_program_save(worker):
    (worker.folder / "keep_going").touch()
    follower = worker_run(worker, "1")
    worker.wait_for("started")
    group = int((worker.folder / "xclip_jax_run/pid").read_text())
    os.killpg(group, signal.SIGTERM)  # as at shutdown: the outer shell receives it too
    status, output = finished(follower)
    assert (status, output.splitlines()[-1]) == (75, "saving")


def test_worker_setup_installs_and_mounts(worker):
    worker.add_fake("curl", "")
    worker.add_fake("lsb_release", "echo jammy")
    worker.add_fake("mountpoint", "exit 1")
    worker.add_fake("python3", "")
    worker.add_fake("python", "", worker.root / ".venv/bin")
    install = 'if [[ $1 == tee ]]; then cat > "$RECORD/$(basename "$2")"; fi\n'
    install += 'if [[ $* == *"install -qqy gcsfuse" ]]; then cp "$0" "$(dirname "$0")/gcsfuse"; fi'
    worker.add_fake("sudo", install)
    result = worker.run("tpu/worker_setup.sh", variables={"BUCKET": "my-bucket"}, root=worker.root)
    assert result.returncode == 0, result.errors
    packages = (worker.folder / "gcsfuse.list").read_text()
    assert packages.endswith("https://packages.cloud.google.com/apt gcsfuse-jammy main\n")
    assert worker.calls("gcsfuse") == [
        [
            *["gcsfuse", "--implicit-dirs", "--rename-dir-limit=200000"],
            *["--metadata-cache-ttl-secs=0", "--metadata-cache-negative-ttl-secs=0"],
            *[f"--cache-dir={worker.folder}/gcsfuse_cache", "--file-cache-max-size-mb=40000"],
            *["--file-cache-cache-file-for-range-read", "my-bucket", "/mnt/bucket"],
        ]
    ]
    [install] = worker.calls("python")
    assert " ".join(install) == "python -m pip install --quiet -e .[tpu] -c constraints.txt"


def test_worker_setup_keeps_an_existing_mount(worker):
    for name in ("gcsfuse", "sudo", "mountpoint", "python3"):
        worker.add_fake(name, "")
    worker.add_fake("python", "", worker.root / ".venv/bin")
    variables = {"BUCKET": "my-bucket"}
    assert worker.run("tpu/worker_setup.sh", variables=variables, root=worker.root).returncode == 0
    assert worker.calls("gcsfuse") == []


# SLURM

SRUN = ["srun", "--kill-on-bad-exit=0", "--cpus-per-task=8", "--label"]


def slurm(launcher, *arguments, **options):
    job = {"SLURM_JOB_ID": "17", "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_CPUS_PER_TASK": "8"}
    return launcher.popen(["slurm.sbatch", *arguments], variables=VARIABLES | job, **options)


@pytest.mark.parametrize(("status", "requeued"), [(0, False), (1, False), (75, True), (137, False)])
def test_slurm_requeues_only_preempted_jobs(launcher, status, requeued):
    launcher.answers(programs=[status])
    assert finished(slurm(launcher, "--config.train.epochs=1"))[0] == status
    assert launcher.calls("scontrol") == ([["scontrol", "requeue", "17"]] if requeued else [])
    words = program("/scratch/me", "--config.train.epochs=1")
    cache = "JAX_COMPILATION_CACHE_DIR=/scratch/me/jax_cache"
    assert launcher.calls("srun") == [[*SRUN, "env", cache, "python", *words]]
    assert launcher.calls("python") == [["python", *words]]


TWO_TASKS = """
while [[ $1 == --* ]]; do shift; done
pids=()
for i in 0 1; do SLURM_PROCID=$i SLURM_LOCALID=$i "$@" & pids+=($!); done
status=0
for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
exit "$status"
"""


def test_slurm_tasks_connect_and_train_together(launcher, tmp_path):
    """Runs the real program in the environment that SLURM sets for each of two tasks."""
    config = kills.write_config(tmp_path, tiny.make_dataset(tmp_path / "data"), epochs=1)
    launcher.add_fake("srun", TWO_TASKS)
    launcher.add_fake("python", f'exec "{sys.executable}" "$@"')
    variables = {"NAME": "two", "CONFIG": str(config), "DATA": "data", "SHARED": str(tmp_path)}
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_NTASKS": "2", "JAX_PLATFORMS": "cpu"}
    job |= {
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_SUBMIT_DIR": str(ROOT),
    }
    started = launcher.popen(["slurm.sbatch"], variables=variables | job)
    output, errors = started.communicate(timeout=150)
    assert started.returncode == 0, errors
    assert "on 2 x cpu" in output
    assert output.count("report: ") == 1  # only one process prints
    assert (tmp_path / "runs/two/results.json").is_file()


def test_slurm_forwards_the_signal_and_waits_for_the_tasks(launcher):
    (launcher.folder / "keep_going").touch()
    job = slurm(launcher)
    launcher.wait_for("started")
    job.send_signal(signal.SIGTERM)  # to the batch shell alone, as --signal=B: has it
    status, output = finished(job)
    assert status == 75
    assert output == (
        "training with /scratch/me/jax_cache\nsaving\n"
        "checkpoint saved; requeued (restarts so far: 0)\n"
    )
    assert launcher.calls("scontrol") == [["scontrol", "requeue", "17"]]


def test_slurm_options_request_one_process_per_gpu_and_a_signal():
    lines = (LAUNCH / "slurm.sbatch").read_text().splitlines()
    options = [line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH ")]
    options = dict(option.partition("=")[::2] for option in options)
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    assert "gpus-per-task" not in options  # see the file
    assert options["signal"] == "B:TERM@120"
    assert "requeue" in options
    assert (options["open-mode"], options["output"]) == ("append", "%x-%j.log")
    first = next(n for n, line in enumerate(lines) if line and not line.startswith("#"))
    assert not any(
        line.startswith("#SBATCH") for line in lines[first:]
    )  # SLURM stops reading there


# Kubernetes and SkyPilot: published fields, those used here and their neighbours

TEXT, NUMBER, FLAG = str, int, bool
METADATA = {"name": TEXT, "annotations": {"*": TEXT}, "labels": {"*": TEXT}}
POD_FAILURE_POLICY = {
    "rules": [
        {
            "action": TEXT,
            "onExitCodes": {"containerName": TEXT, "operator": TEXT, "values": [NUMBER]},
            "onPodConditions": [{"type": TEXT, "status": TEXT}],
        }
    ]
}
CONTAINER = {
    "name": TEXT,
    "image": TEXT,
    "command": [TEXT],
    "args": [TEXT],
    "env": [{"name": TEXT, "value": TEXT}],
    "ports": [{"containerPort": NUMBER}],
    "resources": {"limits": {"*": NUMBER}, "requests": {"*": NUMBER}},
    "volumeMounts": [{"name": TEXT, "mountPath": TEXT, "readOnly": FLAG}],
}
POD = {
    "restartPolicy": TEXT,
    "serviceAccountName": TEXT,
    "terminationGracePeriodSeconds": NUMBER,
    "nodeSelector": {"*": TEXT},
    "hostNetwork": FLAG,
    "containers": [CONTAINER],
    "volumes": [
        {
            "name": TEXT,
            "emptyDir": {"medium": TEXT, "sizeLimit": TEXT},
            "csi": {"driver": TEXT, "readOnly": FLAG, "volumeAttributes": {"*": TEXT}},
        }
    ],
}
JOB = {
    "parallelism": NUMBER,
    "completions": NUMBER,
    "completionMode": TEXT,
    "backoffLimit": NUMBER,
    "activeDeadlineSeconds": NUMBER,
    "podFailurePolicy": POD_FAILURE_POLICY,
    "template": {"metadata": METADATA, "spec": POD},
}
RULE = {"name": TEXT, "action": TEXT, "onJobFailureReasons": [TEXT], "targetReplicatedJobs": [TEXT]}
JOBSET = {
    "apiVersion": TEXT,
    "kind": TEXT,
    "metadata": METADATA,
    "spec": {
        "failurePolicy": {"maxRestarts": NUMBER, "restartStrategy": TEXT, "rules": [RULE]},
        "successPolicy": {"operator": TEXT, "targetReplicatedJobs": [TEXT]},
        "network": {"enableDNSHostnames": FLAG, "subdomain": TEXT},
        "suspend": FLAG,
        "ttlSecondsAfterFinished": NUMBER,
        "replicatedJobs": [
            {"name": TEXT, "replicas": NUMBER, "template": {"metadata": METADATA, "spec": JOB}}
        ],
    },
}
SKYPILOT = {
    "name": TEXT,
    "workdir": TEXT,
    "num_nodes": NUMBER,
    "resources": {
        "infra": TEXT,
        "accelerators": TEXT,
        "instance_type": TEXT,
        "use_spot": FLAG,
        "disk_size": NUMBER,
        "image_id": TEXT,
        "job_recovery": {
            "strategy": TEXT,
            "max_restarts_on_errors": NUMBER,
            "recover_on_exit_codes": [NUMBER],
        },
    },
    "envs": {"*": (TEXT, type(None))},
    "file_mounts": {"*": {"source": TEXT, "name": TEXT, "store": TEXT, "mode": TEXT}},
    "setup": TEXT,
    "run": TEXT,
}


def check(value, schema, path=""):
    """Asserts that all fields are in the schema with their types; "*" matches any name."""
    if isinstance(schema, dict):
        assert isinstance(value, dict), f"{path}: {value!r} has no fields"
        for name, field in value.items():
            assert name in schema or "*" in schema, f"{path}.{name}: unknown field"
            check(field, schema.get(name, schema.get("*")), f"{path}.{name}")
    elif isinstance(schema, list):
        assert isinstance(value, list), f"{path}: {value!r} is not a list"
        for item in value:
            check(item, schema[0], f"{path}[]")
    else:
        number = schema is not NUMBER or not isinstance(value, bool)  # a bool is an int in Python
        assert number, f"{path}: {value!r} has the wrong type"
        assert isinstance(value, schema), f"{path}: {value!r} has the wrong type"


def jobset(launcher, kind, *arguments, **variables):
    result = launcher.run("gke/apply.sh", kind, *arguments, variables=VARIABLES | variables)
    assert result.returncode == 0, result.errors
    assert launcher.calls("kubectl") == [["kubectl", "apply", "-f", "-"]]
    return yaml.safe_load((launcher.folder / "manifest").read_text())


def parts(manifest):
    """Returns the job, its pod and its container."""
    [replicated] = manifest["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    [container] = pod["containers"]
    return job, pod, container


@pytest.mark.parametrize("kind", ["tpu", "gpu"])
def test_jobset_fields_are_published_and_preemption_restarts(launcher, kind):
    manifest = jobset(launcher, kind)
    check(manifest, JOBSET)
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    policy = manifest["spec"]["failurePolicy"]
    assert policy["rules"] == [
        {"action": "RestartJobSetAndIgnoreMaxRestarts", "onJobFailureReasons": ["PodFailurePolicy"]}
    ]
    job, pod, container = parts(manifest)
    assert (job["completionMode"], job["backoffLimit"]) == ("Indexed", 0)
    on_exit, on_disruption = job["podFailurePolicy"]["rules"]
    assert on_exit["onExitCodes"] == {
        "containerName": container["name"],
        "operator": "In",
        "values": [75],
    }
    assert on_disruption["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert pod["restartPolicy"] == "Never"  # required by podFailurePolicy


@pytest.mark.parametrize("kind", ["tpu", "gpu"])
def test_jobset_mounts_the_bucket_that_the_program_reads(launcher, kind):
    manifest = jobset(launcher, kind, '--config.name=a "b" \\ & c')
    job, pod, container = parts(manifest)
    assert job["template"]["metadata"]["annotations"]["gke-gcsfuse/volumes"] == "true"
    [volume] = [volume["csi"] for volume in pod["volumes"] if "csi" in volume]
    assert volume["driver"] == "gcsfuse.csi.storage.gke.io"
    assert volume["volumeAttributes"]["bucketName"] == "my-bucket"
    assert " " not in volume["volumeAttributes"]["mountOptions"]
    assert {"name": "bucket", "mountPath": "/mnt/bucket"} in container["volumeMounts"]
    cache = {"name": "JAX_COMPILATION_CACHE_DIR", "value": "/mnt/bucket/jax_cache"}
    assert container["env"] == [cache]
    words = [*container["command"], *container["args"]]
    expected = program("/mnt/bucket", '--config.name=a "b" \\ & c')
    assert words[: len(expected) + 1] == ["python", *expected]


@pytest.mark.parametrize(
    ("topology", "hosts"), [("2x2", 1), ("4x4", 4), ("2x2x2", 2), ("2x2x4", 4)]
)
def test_jobset_has_one_pod_per_four_chips(launcher, topology, hosts):
    job, pod, container = parts(jobset(launcher, "tpu", TOPOLOGY=topology))
    assert (job["parallelism"], job["completions"]) == (hosts, hosts)
    assert container["resources"] == {"limits": {"google.com/tpu": 4}}
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice",
        "cloud.google.com/gke-tpu-topology": topology,
    }


@pytest.mark.parametrize("topology", ["1x1", "16", "4*4", "a[$(date)]x4"])
def test_jobset_refuses_other_topologies(launcher, topology):
    variables = VARIABLES | {"TOPOLOGY": topology}
    result = launcher.run("gke/apply.sh", "tpu", variables=variables)
    assert (result.returncode, launcher.calls()) == (2, [])
    assert f"TOPOLOGY={topology}: must" in result.errors


def test_gpu_jobset_passes_the_process_id(launcher):
    job, pod, container = parts(jobset(launcher, "gpu"))
    assert (job["parallelism"], job["completions"]) == (2, 2)
    assert container["resources"] == {"limits": {"nvidia.com/gpu": 8}}
    assert pod["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}
    assert container["args"][-3:] == [
        *["--coordinator=msrvtt-train-0-0.msrvtt:8476", "--num_processes=2"],
        "--process_id=$(JOB_COMPLETION_INDEX)",
    ]


def test_apply_dry_run_prints_the_manifest(launcher):
    printed = launcher.run("gke/apply.sh", "tpu", "--dry-run").output
    manifest, _, command = printed.strip().rpartition("\n")
    assert shlex.split(command) == ["kubectl", "apply", "-f", "-"]
    assert yaml.safe_load(manifest) == jobset(launcher, "tpu")


def test_apply_refuses_an_unknown_kind(launcher):
    result = launcher.run("gke/apply.sh", "cpu")
    assert (result.returncode, result.errors) == (
        2,
        "error: 'cpu': the first argument must be tpu or gpu\n",
    )


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["spec", "replicas"], 1),
        (["spec", "failurePolicy", "maxRestart"], 3),
        (["spec", "failurePolicy", "maxRestarts"], "3"),
        (["spec", "replicatedJobs", 0, "template", "spec", "podFailurePolicy", "rule"], []),
        (["spec", "replicatedJobs", 0, "template", "spec", "backoffLimit"], True),
        (["spec", "replicatedJobs"], {}),
    ],
)
def test_jobset_schema_refuses_unknown_fields(launcher, path, value):
    manifest = jobset(launcher, "tpu")
    place = manifest
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    with pytest.raises(AssertionError, match=re.escape(str(path[-1]))):
        check(manifest, JOBSET)


def skypilot():
    return yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())


def test_skypilot_uses_published_fields():
    task = skypilot()
    check(task, SKYPILOT)
    assert task["resources"]["job_recovery"] == {"recover_on_exit_codes": [75]}
    assert task["file_mounts"] == {"/mnt/bucket": {"source": "gs://${BUCKET}", "mode": "MOUNT"}}
    required = {name for name, value in task["envs"].items() if value is None}
    assert required == {"NAME", "CONFIG", "DATA", "BUCKET"}


@pytest.mark.parametrize(
    ("place", "name"),
    [([], "nodes"), (["resources"], "spot"), (["resources", "job_recovery"], "exit_codes")],
)
def test_skypilot_schema_refuses_unknown_fields(place, name):
    task = skypilot()
    fields = task
    for step in place:
        fields = fields[step]
    fields[name] = 1
    with pytest.raises(AssertionError, match=f"{name}: unknown field"):
        check(task, SKYPILOT)


@pytest.mark.parametrize("status", [0, 75])
def test_skypilot_runs_one_process_per_machine(launcher, status):
    launcher.add_fake("python", FAKES["python"], launcher.folder / "venv/bin")
    launcher.answers(programs=[status])
    cluster = {
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NODE_RANK": "1",
        "ARGUMENTS": "--config.train.epochs=1 --config.mode=eval",
    }
    result = subprocess.run(
        ["bash", "-c", skypilot()["run"]],
        env=launcher.environment | VARIABLES | cluster,
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert (result.returncode, result.stdout) == (status, "training with /mnt/bucket/jax_cache\n")
    assert launcher.calls("python") == [
        [
            *["python", *program("/mnt/bucket")],
            *["--coordinator=10.0.0.1:8476", "--num_processes=2", "--process_id=1"],
            *["--config.train.epochs=1", "--config.mode=eval"],
        ]
    ]
