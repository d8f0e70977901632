"""Tests of the wheel, of the console script and of versions in project files."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

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
    for name in ("train", "prepare", "convert", "search", "study", "push", "runs"):
        assert name in done.stdout


def test_workflow_and_metadata_list_the_same_python_versions():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    classifiers = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["classifiers"]
    minor_versions = [name.split(" :: ")[-1] for name in classifiers if " :: 3." in name]
    assert workflow["jobs"]["tests"]["strategy"]["matrix"]["python"] == minor_versions


def test_hooks_and_constraints_have_the_same_ruff_version():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    (version,) = [hook["rev"] for hook in hooks if "ruff" in hook["repo"]]
    assert f"ruff=={version[1:]}" in (ROOT / "constraints.txt").read_text().splitlines()


def test_citation_and_metadata_have_the_same_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (citation["title"], citation["version"]) == (project["name"], project["version"])
