"""Tests of writing models to the Hugging Face hub and loading them, with a local stand-in of it."""

import json
import os
import shutil
import subprocess
import sys

import hub_server
import numpy as np
import pytest
import tiny
import yaml
from huggingface_hub import constants
from trainings import assert_same

import xclip_jax
from xclip_jax import push
from xclip_jax.cli import InputError
from xclip_jax.convert.__main__ import main as convert
from xclip_jax.provenance import describe_process

REPO = "someone/a-model"
METRICS = {"R@1": 98 / 3, "R@5": 66.0, "R@10": 100.0, "MdR": 2.0, "MnR": 3.25}
RESULTS = {
    "name": "mine",
    "step": 0,
    "split": "test",
    "dataset": "captions",
    "protocol": "single caption",
    "num_texts": 1200,
    "num_videos": 600,
    "expected_videos": 600,
    "max_seconds": None,
    "selected_on": "val",
    "text_to_video": METRICS,
    "video_to_text": METRICS | {"R@1": 25.0},
}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with hub_server.serve(monkeypatch, tmp_path / "cache") as hub:
        yield hub


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.make_model(tmp_path_factory.mktemp("one") / "a model")


@pytest.fixture
def workdir(model, tmp_path):
    """Returns a work directory as training and evaluation leave it."""
    folder = tmp_path / "run"
    shutil.copytree(model, folder / "model")
    process = describe_process() | {"command": "python -m xclip_jax.main /home/someone/private"}
    results = RESULTS | {"provenance": {"training": process, "evaluation": process}}
    (folder / "results.json").write_text(json.dumps(results))
    config = {
        "train.batch_size": 7,
        "train.epochs": 5,
        "init.clip": "/home/someone/models/clip_b32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def read_card(text):
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


def logits(retriever):
    text = retriever.encode_text(["a red dog", "a blue cat"])
    frames = np.random.default_rng(0).integers(0, 256, (2, 3, tiny.SIDE, tiny.SIDE, 3), np.uint8)
    return retriever.similarity(text, retriever.encode_video(list(frames)))


@pytest.mark.parametrize("load", [xclip_jax.load, xclip_jax.from_pretrained])
def test_pushed_model_is_loaded_with_identical_numbers(hub, model, load):
    address = xclip_jax.push_to_hub(model, REPO)
    assert address == f"{hub.address}/{REPO}"
    local, loaded = xclip_jax.load(model), load(REPO)
    assert loaded.config == local.config
    assert_same(loaded.params, local.params)
    assert (
        loaded.tokenizer("a red dog cat")[0].tolist()
        == local.tokenizer("a red dog cat")[0].tolist()
    )
    np.testing.assert_array_equal(logits(loaded), logits(local))


def test_exactly_the_files_of_the_model_are_pushed(hub, model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "copy")
    for name in (".hidden", "params/.tmp", "params/d/a.0f.part", "notes.txt", "tokenizer/.git/x"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("not of the model")
    push.push_to_hub(folder, REPO)
    paths = [path for path in model.rglob("*") if path.is_file()]
    expected = {path.relative_to(model).as_posix(): path.read_bytes() for path in paths}
    assert expected.keys() >= {"model.json", "digests.json", "params/manifest.ocdbt"}
    files = dict(hub.files(REPO))
    assert files.pop("README.md")
    assert files.pop(".gitattributes") == b""
    assert files == expected


def test_later_push_replaces_the_model_in_one_commit(hub, model, tmp_path):
    push.push_to_hub(model, REPO)
    hub.add_commit(REPO, hub.files(REPO) | {"notes.txt": b"kept"})
    other = tiny.make_model(tmp_path / "other", seed=1)
    push.push_to_hub(other, REPO)
    assert len(hub.repos[REPO]) == 4
    names = {path.relative_to(other).as_posix() for path in push.list_files(other)}
    assert hub.files(REPO).keys() == names | {"README.md", ".gitattributes", "notes.txt"}
    assert_same(xclip_jax.load(REPO).params, xclip_jax.load(other).params)
    first = hub_server.sha_of(REPO, 1)
    assert_same(xclip_jax.load(REPO, revision=first).params, xclip_jax.load(model).params)
    push.push_to_hub(other, REPO)  # nothing changed
    assert len(hub.repos[REPO]) == 4


def test_push_does_not_undo_another_one_in_between(hub, model, monkeypatch):
    push.push_to_hub(model, REPO)
    make_operation = push.CommitOperationAdd

    def push_meanwhile(*arguments):
        hub.add_commit(REPO, hub.files(REPO) | {"model.json": b"of another push"})
        return make_operation(*arguments)

    monkeypatch.setattr(push, "CommitOperationAdd", push_meanwhile)
    with pytest.raises(InputError, match=r"cannot be written on the hub: .*commit has happened"):
        push.push_to_hub(model, REPO)
    assert hub.files(REPO)["model.json"] == b"of another push"


def test_card_states_results_and_training(hub, workdir):
    push.push_to_hub(workdir, REPO, license="mit")
    text = hub.files(REPO)["README.md"].decode()
    front, body = read_card(text)
    assert {"library_name": "xclip_jax", "license": "mit"}.items() <= front.items()
    (index,) = front["model-index"]
    assert index["name"] == "a-model"
    results = json.loads((workdir / "results.json").read_text())
    ways = {entry["task"]["type"]: entry for entry in index["results"]}
    for way in ("text_to_video", "video_to_text"):
        entry = ways[f"{way.replace('_', '-')}-retrieval"]
        values = {metric["name"]: metric["value"] for metric in entry["metrics"]}
        assert values == pytest.approx(results[way], abs=0.005)
        assert entry["dataset"]["args"] == {"texts": 1200, "videos": 600}
        assert entry["dataset"]["split"] == "test"
    assert "| text to video | 32.7 | 66.0 | 100.0 | 2.0 | 3.2 |" in body
    assert "ranks 600 videos for each" in body
    assert "1,200 texts, 600 videos" in body
    assert "| length | 5 epochs in batches of 7 pairs |" in body
    assert "| initial weights | converted encoders |" in body
    assert f'xclip_jax.load("{REPO}")' in body
    assert "/home/" not in text
    assert not {"None", "Undefined"} & set(body.split())


def test_card_of_a_converted_model_names_its_base(model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "clip_b32")
    (folder / "digests.json").unlink()
    described = json.loads((folder / "model.json").read_text())
    base = {"base_model": "openai/clip-vit-base-patch32"}
    (folder / "model.json").write_text(json.dumps(described | base))
    front, body = read_card(str(push.make_card(folder, REPO)))
    assert front["base_model"] == base["base_model"]
    assert not {"model-index", "license"} & front.keys()
    assert "## Results" not in body
    assert "No licence is stated" in body


def test_card_names_the_base_of_the_encoders_of_a_training(model, workdir, tmp_path):
    clip = shutil.copytree(model, tmp_path / "clip")
    (clip / "model.json").write_text('{"base_model": "someone/encoders"}')
    (workdir / "config.json").write_text(json.dumps({"init.clip": str(clip)}))
    assert (
        read_card(str(push.make_card(workdir / "model", REPO)))[0]["base_model"]
        == "someone/encoders"
    )


def test_edited_card_is_kept_without_the_line_that_marks_it(hub, model):
    push.push_to_hub(model, REPO)
    own = hub.files(REPO)["README.md"]
    hub.add_commit(REPO, hub.files(REPO) | {"README.md": own + b"more"})
    push.push_to_hub(model, REPO)
    assert hub.files(REPO)["README.md"] == own
    edited = b"\n".join(line for line in own.splitlines() if b"Written by" not in line)
    hub.add_commit(REPO, hub.files(REPO) | {"README.md": edited})
    push.push_to_hub(model, REPO)
    assert hub.files(REPO)["README.md"] == edited


def test_results_of_other_weights_are_refused(hub, workdir):
    results = json.loads((workdir / "results.json").read_text())
    (workdir / "results.json").write_text(json.dumps(results | {"step": 9}))
    message = r"results.json is of step 9, the model of step 0: evaluate .*--config.mode=eval"
    with pytest.raises(InputError, match=message):
        push.push_to_hub(workdir, REPO)
    assert not hub.repos


@pytest.mark.parametrize(
    ("token", "repo", "message"),
    [
        ("", REPO, r"no token of the hub: run `hf auth login` or set HF_TOKEN"),
        ("hf_wrong", REPO, r"someone/a-model cannot be written .*: the token is not valid: see"),
        (hub_server.READ, REPO, r"a-model cannot be written .*: the token does not allow this"),
        (hub_server.WRITE, "a-model", r"'a-model': must be USER/NAME"),
        (hub_server.WRITE, "a/b/c", r"'a/b/c': must be USER/NAME"),
        (hub_server.WRITE, "someone/-a", r"someone/-a cannot be written .*: Repo id must"),
    ],
)
def test_refused_push_is_one_clear_line(hub, model, monkeypatch, token, repo, message):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(InputError, match=message) as caught:
        push.push_to_hub(model, repo)
    assert "\n" not in str(caught.value)
    assert not hub.repos


def test_invalid_licence_is_named(hub, model):
    with pytest.raises(InputError, match=r'"license" must be one of \[mit\]'):
        push.push_to_hub(model, REPO, license="nonsense")


def test_folder_without_a_model_is_not_pushed(hub, tmp_path):
    with pytest.raises(InputError, match=r"no model in .*: model.json is missing"):
        push.push_to_hub(tmp_path, REPO)
    assert not hub.repos


def test_corrupted_model_is_not_pushed(hub, model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "copy")
    (folder / "params/_METADATA").write_text("{}")
    with pytest.raises(InputError, match=r"_METADATA is corrupted"):
        push.push_to_hub(folder, REPO)
    assert not hub.repos


def test_file_corrupted_on_the_hub_is_noticed(hub, model):
    push.push_to_hub(model, REPO)
    hub.add_commit(REPO, hub.files(REPO) | {"params/_METADATA": b"{}"})
    with pytest.raises(InputError, match=r"_METADATA is corrupted: it differs from its digest"):
        xclip_jax.load(REPO)


def test_private_repository_needs_a_token(hub, model, monkeypatch):
    push.push_to_hub(model, REPO, private=True)
    assert hub.private == {REPO}
    monkeypatch.setenv("HF_TOKEN", "")
    with pytest.raises(InputError, match=r"no such repository, or a private one"):
        xclip_jax.load(REPO)
    assert xclip_jax.load(REPO, token=hub_server.READ).config["step"] == 0


def test_wrong_revisions_are_clear(hub, model):
    push.push_to_hub(model, REPO)
    with pytest.raises(InputError, match=r"it has no such revision"):
        xclip_jax.load(REPO, revision="nowhere")
    with pytest.raises(InputError, match=r"revision = 'x': .* is a path, not a hub id"):
        xclip_jax.load(model, revision="x")


def test_cached_model_is_loaded_without_network(hub, model, monkeypatch):
    push.push_to_hub(model, REPO)
    xclip_jax.load(REPO)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")  # nothing listens there
    assert_same(xclip_jax.load(REPO).params, xclip_jax.load(model).params)
    with pytest.raises(InputError, match=r"cannot be written on the hub: .*Connection refused"):
        push.push_to_hub(model, REPO)
    with pytest.raises(InputError, match=r"nor on the Hugging Face hub \(.*Connection refused"):
        xclip_jax.load("someone/another")


def test_model_of_the_hub_is_not_converted(hub, model, tmp_path):
    push.push_to_hub(model, REPO)
    with pytest.raises(SystemExit) as stop:
        convert([f"--input={REPO}", f"--output={tmp_path / 'out'}"])
    assert f"error: {REPO}: is a model directory already: use it as it is" in stop.value.code


def test_command_pushes_and_new_process_loads(hub, model, tmp_path, capsys):
    push.main([f"--model={model}", f"--repo={REPO}", "--private", "--license=mit"])
    assert capsys.readouterr().out == f"model: {hub.address}/{REPO}\n"
    assert hub.private == {REPO}
    code = f"import xclip_jax; r = xclip_jax.load({REPO!r}); print(r.scale, r.tokenizer.vocab_size)"
    environment = {**os.environ, "HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "new")}
    environment |= {"HF_HUB_CACHE": str(tmp_path / "new"), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    expected = xclip_jax.load(model)
    assert done.stdout.split() == [str(expected.scale), str(expected.tokenizer.vocab_size)], (
        done.stderr
    )
