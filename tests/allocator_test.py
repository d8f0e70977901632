"""Tests of the restart with huge pages."""

import multiprocessing
import os
import subprocess
import sys

import pytest

from xclip_jax import allocator

PROGRAM = """
import os, sys
from xclip_jax import allocator
allocator.POLICY = __import__("pathlib").Path(sys.argv[1])
print(os.getpid(), os.environ.get("GLIBC_TUNABLES"), sys.argv[2:], flush=True)
allocator.use_huge_pages()
print("end")
"""


def run_program(tmp_path, policy, **variables):
    (tmp_path / "enabled").write_text(policy)
    environment = {k: v for k, v in os.environ.items() if k != allocator.VARIABLE} | variables
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "enabled"), "--text=a b", "é"]
    options = {"capture_output": True, "text": True, "check": True, "env": environment}
    return subprocess.run(command, **options).stdout.splitlines()


@pytest.mark.skipif(
    not sys.platform.startswith("linux") or os.confstr("CS_GNU_LIBC_VERSION") is None,
    reason="needs Linux and glibc",
)
def test_program_starts_again_once_as_the_same_process(tmp_path):
    before, after, end = run_program(tmp_path, "always [madvise] never\n")
    number, found, arguments = before.split(" ", 2)
    assert found == "None"
    assert after == f"{number} {allocator.HUGE_PAGES} {arguments}"
    assert arguments == "['--text=a b', 'é']"
    assert end == "end"


@pytest.mark.parametrize("policy", ["[always] madvise never", "always madvise [never]"])
def test_nothing_happens_where_programs_need_not_or_cannot_ask(tmp_path, policy):
    assert len(run_program(tmp_path, policy)) == 2


@pytest.mark.parametrize("is_worker", [False, True])
def test_worker_process_is_not_started_again(tmp_path, monkeypatch, is_worker):
    started, parent = [], multiprocessing.current_process() if is_worker else None
    (tmp_path / "enabled").write_text("always [madvise] never\n")
    monkeypatch.delenv(allocator.VARIABLE)
    monkeypatch.setattr(allocator, "POLICY", tmp_path / "enabled")
    monkeypatch.setattr(os, "confstr", lambda _: "glibc 2.36")
    monkeypatch.setattr(os, "execv", lambda *arguments: started.append(arguments))
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: parent)
    allocator.use_huge_pages()
    assert bool(started) != is_worker


def test_setting_of_the_user_stays(tmp_path):
    first, end = run_program(tmp_path, "always [madvise] never", GLIBC_TUNABLES="x.y=0")
    assert "x.y=0" in first
    assert end == "end"
