"""Tests of the study command: failures, kills and resumption, printed commands."""

import csv
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import kills
import pytest
import tiny

from xclip_jax.monitor import read_metrics
from xclip_jax.study.__main__ import main
from xclip_jax.study.runs import failure_reason

STUDY = """
from xclip_jax.study import Study, Variant


def get_study(config):
    return Study(
        title="Width and options",
        columns=("what",),
        variants={
            "hot": Variant({"model.tau": 0.1}),
            "too long": Variant({"model.max_words": 9}),
            "dual softmax": Variant({"eval.dual_softmax": True}),
            "QB-Norm": Variant({"eval.qb_norm": 5}),
            "hubness bias": Variant({"eval.hubness_bias": 100}),
            "plain": Variant(),
        },
    )
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("studies")
    kills.write_config(folder, tiny.make_dataset(folder / "data", ("train", "val", "test")), 5)
    (folder / "own.py").write_text(STUDY)
    return folder


def arguments(folder, output):
    files = {"study": folder / "own.py", "config": folder / "config.py", "output": folder / output}
    return [f"--{name}={path}" for name, path in files.items()]


def start(folder, output, *options):
    """Starts the command, with its output in OUTPUT.log."""
    environment = os.environ | {
        "PYTHONPATH": str(kills.TESTS.parent),
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "jax_cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, "-m", "xclip_jax.study", *arguments(folder, output), *options]
    with open(folder / f"{output}.log", "a") as log:
        return subprocess.Popen(
            command, env=environment, cwd=folder, stdout=log, stderr=log, start_new_session=True
        )


def start_and_wait(folder, output, lines):
    """Starts the command and returns when its runs have logged so many lines."""
    process, end = start(folder, output), time.time() + 600
    while steps(folder / output) < lines and process.poll() is None and time.time() < end:
        time.sleep(0.005)
    return process


def finish(process, seconds=600):
    try:
        return process.wait(seconds)
    finally:
        process.kill()


def steps(folder):
    """Returns the number of lines that all runs together have logged."""
    return sum(len(p.read_text().splitlines()) for p in folder.glob("runs/*/*/metrics.jsonl"))


@pytest.fixture(scope="module")
def complete(folder):
    """Returns the output of a study that was stopped and killed, one variant of which fails."""
    output = folder / "complete"
    stopped = start_and_wait(folder, "complete", 2)
    stopped.terminate()
    assert finish(stopped) == 75
    (log,) = output.glob("runs/*/*/log.txt")
    assert "preempted: saved step" in log.read_text()
    assert not (log.parent / "failed.txt").exists()

    killed = start_and_wait(folder, "complete", 18)
    os.kill(killed.pid, signal.SIGKILL)  # only this process: its run must end with it
    killed.wait()
    time.sleep(1)
    before = steps(output)
    time.sleep(1)
    assert 18 <= steps(output) == before < 30

    assert finish(start(folder, "complete")) == 1  # for the variant that failed
    return output


def table(output):
    return (output / "report" / "own.md").read_text()


def test_failed_variant_shows_its_reason_and_the_others_run(complete):
    with open(complete / "report" / "own.csv") as file:
        rows = {row["what"]: row for row in csv.DictReader(file)}
    assert "config.model.max_words = 9: must be from 3 to" in rows["too long"]["problem"]
    assert not rows["too long"]["text_to_video R@1 mean"]
    others = [row for name, row in rows.items() if name != "too long"]
    assert all(row["text_to_video R@1 mean"] and not row["problem"] for row in others)
    assert "failed: config.model.max_words" in table(complete)
    printed = (complete.parent / "complete.log").read_text()
    assert table(complete) in printed
    assert "3/3" in printed
    assert (complete / "report" / "own.png").is_file()
    assert "must be from 3 to" in (complete / "report" / "index.html").read_text()


def test_table_has_the_numbers_of_the_work_directories(complete):
    with open(complete / "report" / "own.csv") as file:
        rows = {row["what"]: row for row in csv.DictReader(file)}
    hot = json.loads((complete / "runs/model.tau=0.1/seed0/results.json").read_text())
    plain = json.loads((complete / "runs/base/seed0/results.json").read_text())
    normalized = {name.partition(" (")[0]: by_way for name, by_way in plain["normalized"].items()}
    for name, results in (("hot", hot), ("plain", plain), *normalized.items()):
        for way in ("text_to_video", "video_to_text"):
            for metric in ("R@1", "R@5", "R@10", "MnR"):
                mean = rows[name][f"{way} {metric} mean"]
                if way in results:
                    assert float(mean) == pytest.approx(results[way][metric])
                else:
                    assert not mean
    # Each option changes some rank.
    assert list(normalized) == ["dual softmax", "QB-Norm", "hubness bias"]
    means = [rows[name]["text_to_video MnR mean"] for name in ("plain", *normalized)]
    assert len(set(means)) == 4


def test_study_resumes_after_sigterm_and_sigkill(complete):
    for run in ("model.tau=0.1", "base"):  # stopped at its first steps, killed at its first steps
        lines = read_metrics(complete / "runs" / run / "seed0")
        steps = [line["step"] for line in lines if "train/loss" in line]
        assert steps == list(range(1, 16))  # no step is missing or repeated
    assert "resuming from step" in (complete / "runs/model.tau=0.1/seed0/log.txt").read_text()


@pytest.mark.slow  # tests/preemption_test.py compares weights
def test_resumed_study_ends_with_the_table_of_an_uninterrupted_one(folder, complete):
    assert finish(start(folder, "uninterrupted")) == 1
    for name in ("own.md", "own.csv", "own.tex", "own.json"):
        one, other = ((output / "report" / name) for output in (complete, folder / "uninterrupted"))
        assert one.read_text() == other.read_text()


@pytest.fixture
def run_study(folder, complete, monkeypatch):
    """Returns a function that runs the command again in this process, with further options."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(folder / "jax_cache"))
    return lambda *options: main([*arguments(folder, "complete"), *options])


def test_finished_runs_are_skipped_and_unfinished_ones_printed(complete, run_study, capsys):
    before = {path: path.stat().st_mtime_ns for path in complete.glob("runs/*/*/results.json")}
    run_study("--print_commands")
    commands = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert [command[:3] for command in commands] == [["python", "-m", "xclip_jax.main"]]
    assert f"--workdir={complete}/runs/model.max_words=9/seed0" in commands[0]
    assert "--config.model.max_words=9" in commands[0]
    run_study("--only=plain")
    after = {path: path.stat().st_mtime_ns for path in complete.glob("runs/*/*/results.json")}
    assert after == before


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--only=nothing", "--only=nothing: no such variant, choose from hot, too long, dual"),
        ("--config.model.tau=0.5", "model.tau was 0.01, is 0.5"),
    ],
)
def test_input_errors_are_one_line(run_study, option, message):
    with pytest.raises(SystemExit, match=re.escape(message)) as error:
        run_study(option)
    assert "\n" not in str(error.value)


def test_failure_reason_is_the_last_error_in_the_output():
    printed = (
        "training: 1%\rtraining: 2%\nTraceback (most recent call last):\n  File ...\n"
        "jax.errors.JaxRuntimeError: RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\n"
        "--------------------\nFor simplicity, JAX has removed its internal frames.\n"
    )
    assert "RESOURCE_EXHAUSTED: Out of memory" in failure_reason(1, printed)
    assert failure_reason(1, "error: no such thing\n") == "no such thing"
    assert failure_reason(-9, "training: 3%") == "ended by SIGKILL (out of memory?)"
    assert failure_reason(-15, "") == "ended by SIGTERM"
    assert failure_reason(3, "") == "exit status 3"
