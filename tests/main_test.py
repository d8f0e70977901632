"""The command as a user meets it: the whole path, mistakes answered in one line, kills survived."""

import json
import re
import subprocess
import sys
from pathlib import Path

import kills
import pytest
import tiny
from absl import flags

import xclip_jax
from xclip_jax import main
from xclip_jax.data import rendered

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return str(tiny.make_dataset(tmp_path_factory.mktemp("data")))


@pytest.fixture
def run_main(data, tmp_path, monkeypatch):
    """Runs the command in this process; returns what it exits with, None if it succeeds."""
    config = kills.write_config(tmp_path, data, epochs=1)
    monkeypatch.setattr(main, "connect", lambda *_: None)  # JAX is at work here already

    def run(*arguments):
        argv = ["main", f"--config={config}", f"--workdir={tmp_path / 'run'}", *arguments]
        monkeypatch.setattr(sys, "argv", argv)  # where ml_collections looks for --config.a.b
        flags.FLAGS.unparse_flags()
        for name in [name for name in flags.FLAGS if name.startswith("config.")]:
            delattr(flags.FLAGS, name)  # ml_collections defines a flag for each override
        flags.FLAGS(argv)
        try:
            main.main([])
        except SystemExit as stop:
            return stop.code
        return None

    return run


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.model.temporal.type=gru", r"config.model.temporal.type = 'gru': must be one of"),
        ("--config.model.vision.patch_size=7", r"patch_size = 7: must be a divisor of 16"),
        ("--config.model.text.heads=5", r"config.model.text.heads = 5: must be a divisor of"),
        ("--config.train.batch_size=64", r"batch_size = 64: must be at most the 24 training pairs"),
        ("--config.train.batch_size=7", r"batch_size = 7: must be a multiple of the 2 devices"),
        ("--config.mesh.data=3", r"mesh.data = 3, fsdp = 1: together they must be at most the 2"),
        ("--config.model.vision.image_size=32", r"image_size = 32: must be 16, the size of the"),
        ("--config.model.text.vocab_size=100", r"vocab_size = 100: must be at least the"),
        ("--config.data.path=/nowhere", r"no prepared data set in /nowhere"),
        ("--config.data.train_split=dev", r"has no split 'dev', only train, val"),
        ("--config.mode=eval", r"no model in .*run/model"),
        ("--workdir=/dev/null/run", r"work directory /dev/null/run cannot be written"),
    ],
)
def test_a_mistake_is_answered_in_one_line(run_main, argument, message):
    code = run_main(argument)
    assert isinstance(code, str)  # sys.exit(str): printed to stderr, exit status 1
    assert code.startswith("error: ")
    assert "\n" not in code
    assert re.search(message, code), code


def test_a_model_that_does_not_fit_its_description_is_refused(run_main, tmp_path):
    assert run_main() is None
    described = json.loads((tmp_path / "run/model/model.json").read_text())
    described["embed_dim"] = 64
    (tmp_path / "run/model/model.json").write_text(json.dumps(described))
    assert "do not fit model.json" in run_main("--config.mode=eval")


def test_a_second_run_changes_nothing_and_eval_gives_the_same_numbers(run_main, tmp_path):
    assert run_main() is None
    results = (tmp_path / "run/results.json").read_text()
    assert run_main() is None
    assert run_main("--config.mode=eval") is None
    assert (tmp_path / "run/results.json").read_text() == results


def command(config, workdir, *arguments):
    return [
        *(sys.executable, "-m", "xclip_jax.main"),
        *(f"--config={config}", f"--workdir={workdir}", *arguments),
    ]


def test_an_unknown_field_and_a_missing_config_are_refused_without_a_traceback(data, tmp_path):
    config = kills.write_config(tmp_path, data, epochs=1)
    for arguments, message in (
        ([f"--config={config}", "--config.model.widht=3"], "widht"),
        ([], "config"),
        (["--config=configs/nothing.py"], "configs/nothing.py"),
        ([f"--config={config}", "config.mode=eval"], "every option starts with --"),
        ([f"--config={config}", "--config.train.batch_size=many"], "batch_size"),
        ([f"--config={config}", "--nonsense"], "nonsense"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "xclip_jax.main", *arguments],
            capture_output=True,
            text=True,
            cwd=ROOT,
            check=False,
        )
        assert done.returncode != 0
        assert message in done.stderr
        assert done.stderr.count("\n") == 1, done.stderr


def test_help():
    done = subprocess.run(command("x", "y", "--help"), capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0
    assert "--config.a.b=value" in done.stdout


def test_the_demo_path_from_rendering_to_the_report(run_main, tmp_path, monkeypatch):
    make = rendered.make
    monkeypatch.setattr(
        rendered, "make", lambda *a, **k: make(*a, **{**k, "num_val": 6, "num_test": 12})
    )
    data = tmp_path / "data"
    arguments = (f"--config.data.path={data}", "--config.data.rendered=16")
    assert run_main(*arguments) is None
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert (results["split"], results["num_videos"]) == ("test", 12)
    assert (tmp_path / "run/report/index.html").is_file()
    retriever = xclip_jax.load(tmp_path / "run")
    video = retriever.encode_video([data / "scenes/videos/test_00000.mp4"])
    assert video.mask.shape == (1, 4)
