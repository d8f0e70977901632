"""Tests of the command line: training, evaluation, one-line errors, dispatch of commands."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import kills
import pytest
import tiny
from preparing import one_thread

import xclip_jax
from xclip_jax import cli, main, workers
from xclip_jax.__main__ import COMMANDS
from xclip_jax.__main__ import main as dispatch
from xclip_jax.data import rendered

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return str(tiny.make_dataset(tmp_path_factory.mktemp("data")))


@pytest.fixture
def run_main(data, tmp_path, monkeypatch):
    """Returns a function that runs the command in this process and returns its exit status."""
    config = kills.write_config(tmp_path, data, epochs=1)
    monkeypatch.setattr(main.distributed, "connect", lambda *_: None)  # JAX is already initialised

    def run(*arguments):
        argv = [f"--config={config}", f"--workdir={tmp_path / 'run'}", *arguments]
        try:
            main.main(argv)
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
        (
            "--config.model.preprocess.resize=squash",
            r"preprocess.resize = 'squash': the frames in .* were made with 'crop': prepare the "
            r"data again with --image_size=16 --resize=squash --interpolation=bicubic$",
        ),
        (
            "--config.model.preprocess.interpolation=bilinear",
            r"interpolation = 'bilinear': the frames in .* were made with 'bicubic': prepare",
        ),
        ("--config.model.text.vocab_size=100", r"vocab_size = 100: must be at least \d+"),
        ("--config.data.path=/nowhere", r"no prepared data set in /nowhere"),
        ("--config.data.train_split=dev", r"has no split 'dev', only train, val"),
        ("--config.mode=eval", r"no model in .*run/model"),
        ("--workdir=/dev/null/run", r"work directory /dev/null/run cannot be written"),
    ],
)
def test_input_errors_are_one_line(run_main, argument, message):
    code = run_main(argument)
    assert isinstance(code, str)  # sys.exit(str): printed to stderr, exit status 1
    assert code.startswith("error: ")
    assert "\n" not in code
    assert re.search(message, code), code


def test_devices_that_cannot_be_used_are_one_clear_error(run_main, monkeypatch):
    def fail():
        raise RuntimeError("Unable to initialize backend 'tpu': The TPU is already in use\nby 7")

    monkeypatch.setattr(jax, "devices", fail)
    message = "the devices cannot be used: Unable to initialize backend 'tpu': The TPU is already"
    assert message in run_main()


def test_repeated_run_and_eval_give_the_same_results_unless_model_json_changes(run_main, tmp_path):
    assert run_main() is None
    results = kills.read_results(tmp_path / "run")
    assert run_main() is None
    assert run_main("--config.mode=eval") is None
    assert kills.read_results(tmp_path / "run") == results
    described = json.loads((tmp_path / "run/model/model.json").read_text())
    described["embed_dim"] = 64
    (tmp_path / "run/model/model.json").write_text(json.dumps(described))
    assert "model.json is corrupted: it differs from its digest" in run_main("--config.mode=eval")
    (tmp_path / "run/model/digests.json").unlink()  # changed on purpose
    assert "does not fit model.json" in run_main("--config.mode=eval")


def test_evaluation_names_the_settings_that_it_takes_from_the_run(run_main, capsys):
    assert run_main() is None
    capsys.readouterr()
    assert run_main("--config.mode=eval", "--config.eval.batch_size=3") is None
    assert "without effect" not in capsys.readouterr().out
    assert run_main("--config.mode=eval", "--config.model.tau=0.5") is None
    expected = "note: without effect in an evaluation: model.tau=0.5 (trained with 0.01)\n"
    assert expected in capsys.readouterr().out


def run_module(module, *arguments):
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.model.widht=3"], "no field model.widht"),
        (["--config.model.widht.x=3"], "no field model.widht.x"),
        (["--config.model=3"], "a group of fields"),
        (["--config.train.batch_size=many"], "batch_size=many: must be of type int"),
        (["--config.eval.dual_softmax=maybe"], "dual_softmax=maybe: must be of type bool"),
        (["config.mode=eval"], "every option starts with --"),
        (["--config.mode"], "no =VALUE"),
        (["--nonsense"], "--nonsense: unknown option"),
        (["--config=configs/nothing.py"], "configs/nothing.py: no such file"),
        (["--config.seed=1", "--config=configs/nothing.py"], "configs/nothing.py: no such file"),
        (["--config.model.taus=0.1"], "error: --config has no field model.taus: see xclip_jax"),
        (["--seeds=two"], "--seeds: invalid int value"),
    ],
)
def test_command_line_errors_are_one_line(arguments, message, capsys):
    parser = cli.CommandParser()
    parser.add_argument("--seeds", type=int)
    with pytest.raises(SystemExit) as stop, cli.one_line_errors():
        cli.parse_with_config(parser, ["--config=configs/demo.py", *arguments])
    error = capsys.readouterr().err.strip() or stop.value.code
    assert message in error
    assert error.startswith("error: ")
    assert "\n" not in error
    assert stop.value.code not in (None, 0)


def test_config_file_exceptions_are_reported_with_their_line(tmp_path):
    config = tmp_path / "config.py"
    config.write_text("def get_config():\n    return 1 / 0\n")
    done = run_module("xclip_jax.main", f"--config={config}")
    assert done.returncode == 1
    assert done.stderr == f"error: --config={config}, line 2: ZeroDivisionError: division by zero\n"


def test_config_fields_are_converted_to_their_types():
    fields = {
        "seed": ("3", 3),
        "name": ("a=b c", "a=b c"),
        "model.tau": ("1", 1.0),
        "eval.dual_softmax": ("true", True),
        "model.granularities": ("('video_word', 'frame_word')", ("video_word", "frame_word")),
    }
    argv = [
        "--config=configs/demo.py",
        *(f"--config.{k}={text}" for k, (text, _) in fields.items()),
    ]
    _, config, overrides = cli.parse_with_config(cli.CommandParser(), argv)
    assert overrides == {field: value for field, (_, value) in fields.items()}
    assert [type(value) for value in overrides.values()] == [int, str, float, bool, tuple]
    assert config.model.granularities == ("video_word", "frame_word")


def test_help_describes_config_options():
    done = run_module("xclip_jax", "train", "--help")
    assert done.returncode == 0
    assert "--config.a.b=value" in done.stdout


def test_command_without_config_is_an_error():
    done = run_module("xclip_jax.main")
    assert done.returncode == 2
    assert done.stderr == "error: the following arguments are required: --config\n"


def test_help_lists_the_commands():
    done = run_module("xclip_jax", "--help")
    assert done.returncode == 0
    listed = re.findall(r"^  (\w+) +\w.*$", done.stdout, re.MULTILINE)
    assert listed == ["train", "prepare", "convert", "search", "study", "push", "runs"]


@pytest.mark.parametrize("arguments", [[], ["retrain"]])
def test_unknown_command_is_an_error(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        dispatch(arguments)
    assert stop.value.code == 2
    name = arguments[0] if arguments else "no command"
    expected = f"error: {name}: must be one of train, prepare, convert, search, study, push, runs\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize("name", COMMANDS)
def test_command_receives_the_remaining_arguments(name, monkeypatch):
    received = []
    module = importlib.import_module(COMMANDS[name][0])
    monkeypatch.setattr(module, "main", received.extend)
    dispatch([name, "--help", "x"])
    assert received == ["--help", "x"]


def test_demo_config_renders_trains_and_reports(run_main, tmp_path, monkeypatch):
    make = rendered.render_dataset
    monkeypatch.setattr(
        rendered, "render_dataset", lambda *a, **k: make(*a, **{**k, "num_val": 6, "num_test": 12})
    )
    monkeypatch.setattr(workers, "worker_pool", one_thread)
    data = tmp_path / "data"
    arguments = (f"--config.data.path={data}", "--config.data.rendered=16")
    assert run_main(*arguments) is None
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert (results["split"], results["num_videos"]) == ("test", 12)
    assert (tmp_path / "run/report/index.html").is_file()
    retriever = xclip_jax.load(tmp_path / "run")
    video = retriever.encode_video([data / "scenes/videos/test_00000.mp4"])
    assert video.mask.shape == (1, 4)
