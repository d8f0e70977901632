"""Tests of provenance: the commit, the command, attempts that resume, durations, old folders."""

import json
import shutil
import subprocess
import sys
import types

import pytest
import tiny

from xclip_jax import evaluate, provenance, train, workdir
from xclip_jax.cli import InputError
from xclip_jax.monitor import read_metrics
from xclip_jax.report import format_duration, format_setting, list_provenance

PROCESS = {
    "date": "2026-11-26T10:00:00+00:00",
    "command": "xclip-jax train",
    "commit": "a" * 40,
    "versions": {"jax": "0.10.2"},
    "devices": {"platform": "cpu", "kind": "cpu", "count": 2, "processes": 1},
}


def git(folder, *arguments):
    names = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    command = ["git", *names, "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path):
    """Returns a file of a git checkout with one commit."""
    (tmp_path / "code.py").write_text("1")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", "code.py")
    git(tmp_path, "commit", "--quiet", "--message=first")
    return tmp_path / "code.py"


def test_commit_is_marked_where_tracked_files_have_changed(checkout):
    commit = git(checkout.parent, "rev-parse", "HEAD")
    git(checkout.parent, "tag", "--annotate", "v1", "--message=release")
    (checkout.parent / "results.txt").write_text("not code")
    assert provenance.find_commit(checkout) == commit
    checkout.write_text("2")
    assert provenance.find_commit(checkout) == f"{commit}-dirty"


def test_commit_of_another_project_is_not_taken(checkout):
    installed = checkout.parent / ".venv" / "package" / "code.py"
    installed.parent.mkdir(parents=True)
    installed.write_text("1")
    assert provenance.find_commit(installed) is None


def test_commit_is_none_without_git_or_checkout(checkout, tmp_path_factory, monkeypatch):
    assert provenance.find_commit(tmp_path_factory.mktemp("plain") / "code.py") is None
    monkeypatch.setenv("PATH", "")
    assert provenance.find_commit(checkout) is None


@pytest.mark.parametrize(
    ("argv", "module", "command"),
    [
        (["/venv/bin/xclip-jax", "train"], None, "xclip-jax train"),
        (["/x/xclip_jax/main.py", "--config=a b"], "xclip_jax.main", "-m xclip_jax.main '--config"),
        (["/x/__main__.py", "train"], "xclip_jax.__main__", "python -m xclip_jax train"),
        (["benchmarks/step.py", "-x"], None, "python benchmarks/step.py -x"),
        (["/home/me/step.py"], None, "python step.py"),
        (["-c", "x"], None, "python"),
    ],
)
def test_command_is_as_typed(monkeypatch, argv, module, command):
    spec = types.SimpleNamespace(name=module) if module else None
    monkeypatch.setitem(sys.modules, "__main__", types.SimpleNamespace(__spec__=spec))
    monkeypatch.setattr(sys, "argv", argv)
    assert command in provenance.describe_command()
    assert "/x/" not in provenance.describe_command()


@pytest.fixture
def process(monkeypatch):
    """Returns the description of the process, which tests change."""
    current = json.loads(json.dumps(PROCESS))
    monkeypatch.setattr(provenance, "describe_process", lambda: json.loads(json.dumps(current)))
    return current


def test_resumed_training_keeps_the_first_start_and_lists_what_changed(tmp_path, process):
    (tmp_path / "config.json").write_text('{"model.tau": 0.1}')
    provenance.record_training(tmp_path, 0, parameters=5, total_steps=9)
    process |= {"date": "2026-11-27T10:00:00+00:00", "commit": None}
    provenance.record_training(tmp_path, 4, parameters=5, total_steps=9)
    saved = json.loads((tmp_path / "config.json").read_text())
    resumed = {"step": 4, "date": "2026-11-27T10:00:00+00:00", "commit": None}
    facts = {"parameters": 5, "total_steps": 9}
    expected = PROCESS | facts | {"resumed": [resumed]}
    assert saved == {"model.tau": 0.1, "provenance": expected}
    provenance.record_training(tmp_path, 0, **facts)  # nothing was saved before: a new start
    assert provenance.read_record(tmp_path) == process | facts


def test_run_of_an_earlier_version_is_recorded_from_its_resumption(tmp_path, process):
    (tmp_path / "config.json").write_text("{}")
    provenance.record_training(tmp_path, 4, parameters=5)
    assert provenance.read_record(tmp_path) == {
        "parameters": 5, "resumed": [{"step": 4, **process, "parameters": 5}],
    }  # fmt: skip
    shown = dict(list_provenance({"training": provenance.read_record(tmp_path)}))
    assert shown["resumed"] == "1 time, the last from step 4, 2026-11-26 10:00:00 UTC"


def test_duration_and_speed_are_those_of_metrics(tmp_path):
    assert provenance.measure_training(tmp_path) == {"seconds": None, "examples_per_second": None}
    rates = [{"step": k, "seconds": 3.0 * k, "train/videos_per_second": 2.0**k} for k in (1, 2, 3)]
    lines = [*rates, {"step": 3, "seconds": 12.5, "val/text_to_video/R@1": 1.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    measured = provenance.measure_training(tmp_path)
    assert measured == {"seconds": 12.5, "examples_per_second": 4.0}


def test_report_lists_only_what_differs_of_the_evaluation():
    evaluation = PROCESS | {"seconds": 3.25, "command": "xclip-jax train --config.mode=eval"}
    training = PROCESS | {"seconds": 3723, "examples_per_second": 5.5}
    both = {"parameters": 12345, "training": training, "evaluation": evaluation}
    assert list_provenance(both) == [
        ("parameters", "12,345"),
        ("trained", "2026-11-26 10:00:00 UTC, 1 h 2 min, 5.5 pairs/s"),
        ("evaluated", "2026-11-26 10:00:00 UTC, 3.25 s"),
        ("command", "xclip-jax train"),
        ("command of the evaluation", "xclip-jax train --config.mode=eval"),
        ("commit", "a" * 40),
        ("devices", "2 x cpu"),
        ("versions", "jax 0.10.2"),
    ]
    assert list_provenance({}) == []


def test_durations_and_settings_are_readable():
    assert [format_duration(s) for s in (None, 0.0, 59.4, 59.6, 3599, 3600)] == [
        "", "0 s", "59.4 s", "1 min 0 s", "59 min 59 s", "1 h 0 min",
    ]  # fmt: skip
    values = ["", "x", 1e-7, True, None, ["a", "b"], [], 3]
    assert [format_setting(value) for value in values] == [
        '""', "x", "1e-07", "True", "None", "a, b", "()", "3",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Returns (config, work directory, results) of a run that was stopped and resumed."""
    folder = tmp_path_factory.mktemp("provenance")
    path = tiny.make_dataset(folder / "data", splits=("train", "val", "test"))
    config = tiny.make_config(path, epochs=2)
    config.log.every = 100
    run = folder / "run"

    class Stop(Exception):
        pass

    def stop(self, step, *arguments, original=train.Monitor.log_step):
        original(self, step, *arguments)
        if step == 5:
            raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.Monitor, "log_step", stop)
        with pytest.raises(Stop):
            train.train(config, run)
    train.train(config, run)
    return config, run, evaluate.evaluate(config, run)


def test_config_and_results_carry_the_provenance(finished):
    _, run, results = finished
    recorded, shown = provenance.read_record(run), results["provenance"]
    assert json.loads((run / "results.json").read_text()) == results
    assert shown["training"] == recorded
    assert shown["parameters"] == recorded["parameters"] > 1000
    assert recorded["total_steps"] == 6
    assert [one["step"] for one in recorded["resumed"]] == [3]
    last = read_metrics(run)[-1]
    assert 0 < recorded["seconds"] == last["seconds"]
    assert recorded["examples_per_second"] > 0  # the last step is logged at any log.every
    assert shown["evaluation"]["seconds"] > 0
    assert recorded["devices"]["count"] == 2
    assert {"jax", "flax", "optax", "numpy", "python", "xclip_jax"} <= set(recorded["versions"])


def test_seconds_continue_over_attempts(finished):
    seconds = [line["seconds"] for line in read_metrics(finished[1])]
    assert len(seconds) == 3  # two validations and the last step
    assert seconds == sorted(seconds)


def test_finished_run_is_not_recorded_again(finished):
    config, run, _ = finished
    before = (run / "config.json").read_text()
    train.train(config, run)
    assert (run / "config.json").read_text() == before


def test_granularities_alone_are_those_of_a_model_with_one(finished):
    config, run, results = finished
    assert list(results["granularities"]) == list(config.model.granularities)
    retriever = evaluate.load(run)
    dataset = evaluate.Dataset(config.data.path)
    e = evaluate.evaluate_split(config, retriever, dataset, "test", granular=True)
    mean_TxV = sum(e.parts.values()) / 4
    assert mean_TxV == pytest.approx(e.sim_TxV, abs=1e-4)
    assert e.parts["video_word"].max() != e.parts["frame_word"].max()
    sim_TxV = e.text.sentence @ e.video.video.T
    scale = e.parts["video_sentence"] / sim_TxV
    assert scale == pytest.approx(scale[0, 0], rel=1e-3)
    small = retriever.similarities(e.text, e.video, block_cells=40)
    for name, part_TxV in {**e.parts, "all": e.sim_TxV}.items():
        assert small[name] == pytest.approx(part_TxV, abs=1e-4)
    assert retriever.similarity(e.text, e.video) == pytest.approx(e.sim_TxV, abs=1e-5)


def test_old_work_directory_evaluates_and_resumes(finished, tmp_path):
    config, run, results = finished
    saved = json.loads((run / "config.json").read_text())
    del saved["provenance"], saved["log.wandb"]
    lines = [{k: v for k, v in line.items() if k != "seconds"} for line in read_metrics(run)]
    shutil.copytree(run, tmp_path / "old")
    (tmp_path / "old/config.json").write_text(json.dumps(saved))
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "old/metrics.jsonl").write_text(text)
    train.train(config, tmp_path / "old")
    again = evaluate.evaluate(config, tmp_path / "old")
    assert again["text_to_video"] == results["text_to_video"]
    assert again["provenance"]["training"]["seconds"] is None
    (tmp_path / "old/config.json").unlink()
    assert evaluate.evaluate(config, tmp_path / "old")["provenance"]["training"] == {}
    (tmp_path / "old/config.json").write_text("[]")
    with pytest.raises(InputError, match=r"config.json: must be an object of fields"):
        evaluate.evaluate(config, tmp_path / "old")


def test_settings_are_those_of_the_training_with_the_current_free_ones(finished):
    config, run, _ = finished
    other = config.copy_and_resolve_references()
    other.model.tau, other.eval.batch_size = 0.7, 5
    settings = workdir.current_settings(run, other)
    assert (settings["model.tau"], settings["eval.batch_size"]) == (config.model.tau, 5)
    changed = workdir.changed_settings(settings)
    assert changed["model.embed_dim"] == 32
    assert not {"model.tau", "provenance", "data.fingerprint"} & set(changed)
