"""Tests of the scripts that create, set up, run and delete a Cloud TPU slice."""

import os
import select
import shlex
import shutil
import signal
import subprocess

import pytest
from launcher import LAUNCH, PLACE, VARIABLES, finished, launcher, program, tpus

__all__ = ["launcher"]  # the fixture

# One command at a time

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


# One worker


@pytest.fixture
def worker(launcher):
    """Copies the scripts, because the clone may hold a virtual environment."""
    launcher.root = launcher.folder / "xclip_jax"
    shutil.copytree(LAUNCH, launcher.root / "launch")
    return launcher


def worker_run(worker, attempt, **options):
    logs = {"LOGS": str(worker.folder / "bucket/logs")}
    command = ["tpu/worker_run.sh", attempt, "python", "-m", "xclip_jax.main"]
    return worker.popen(command, variables=logs, root=worker.root, **options)


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
