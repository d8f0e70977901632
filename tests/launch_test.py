"""Tests of every launch script: style, missing variables, dry runs."""

import os
import shlex
import shutil
import subprocess

import pytest
import yaml
from launcher import LAUNCH, ROOT, VARIABLES, launcher

__all__ = ["launcher"]  # the fixture

SCRIPTS = sorted([*LAUNCH.rglob("*.sh"), LAUNCH / "slurm.sbatch"])
AWS = "NAME ZONE BUCKET IMAGE MACHINE CPUS HEAD_PROFILE PROFILE"
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
    "gke/ray.sh index": "NAME IMAGE SERVICE_ACCOUNT BUCKET MODEL INDEX VIDEOS WORKERS",
    "gke/ray.sh serve": "NAME IMAGE SERVICE_ACCOUNT BUCKET MODEL INDEX SHARDS",
    "ray/cluster.sh gcp up": "NAME ZONE BUCKET IMAGE MACHINE CPUS PROJECT SERVICE_ACCOUNT",
    "ray/cluster.sh aws down": AWS,
    "ray/cluster.sh aws index": f"{AWS} MODEL INDEX VIDEOS",
    "ray/cluster.sh aws serve": f"{AWS} MODEL INDEX SHARDS",
    "ray/node_setup.sh": "CLOUD BUCKET EXTRAS",
}
WITH_DRY_RUN = [name for name in NEEDS if "worker" not in name and "node" not in name]


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
    assert launcher.calls("gcloud", "kubectl", "srun", "scontrol", "python", "ray") == []


@pytest.mark.parametrize("command", ["create.sh", "setup.sh", "run.sh", "teardown.sh"])
def test_dry_run_prints_the_exact_commands(launcher, command):
    printed = launcher.run(f"tpu/{command}", "--dry-run").output
    launcher.calls_file.unlink(missing_ok=True)
    launcher.answers(creates=[0], setups=[0], runs=[0])
    launcher.run(f"tpu/{command}")
    commands = [call for call in map(shlex.split, printed.splitlines()) if call[0] == "gcloud"]
    assert commands == launcher.calls("gcloud") != []


@pytest.mark.parametrize("script", ["create.sh", "setup.sh", "teardown.sh"])
def test_scripts_without_program_refuse_other_arguments(launcher, script):
    result = launcher.run(f"tpu/{script}", "--config.train.epochs=1")
    assert (result.returncode, launcher.calls("gcloud")) == (2, [])
    assert "--config.train.epochs=1: the only option is --dry-run" in result.errors


def test_arguments_must_start_with_dashes(launcher):
    result = launcher.run("tpu/run.sh", "dry-run")
    assert (result.returncode, launcher.calls("gcloud")) == (2, [])
    assert "dry-run: every option starts with --" in result.errors
