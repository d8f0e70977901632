"""The wheel holds every file of the package and its console script runs outside the clone."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Builds the wheel from a copy of the sources, without downloading anything."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    skipped = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "xclip_jax", source / "xclip_jax", ignore=skipped)
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--quiet"], cwd=source, check=True)
    (path,) = source.glob("xclip_jax-*.whl")
    return path


def test_wheel_holds_every_file_of_the_package(wheel):
    source = wheel.parent / "xclip_jax"
    files = {f"xclip_jax/{path.relative_to(source)}" for path in source.rglob("*.*")}
    assert files <= set(zipfile.ZipFile(wheel).namelist())


def test_console_script_runs_outside_the_clone(wheel, tmp_path):
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--quiet"]
    subprocess.run([*install, f"--target={tmp_path}", wheel], check=True)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [tmp_path / "bin" / "xclip-jax", "--help"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in ("train", "prepare", "convert", "search", "study"):
        assert name in done.stdout
