"""Tests of what is downloaded from the Hugging Face hub, with a folder in place of a repository."""

import fnmatch
import json
import shutil

import layouts_test
import pytest

from xclip_jax.cli import InputError
from xclip_jax.convert import reading
from xclip_jax.convert.importing import import_model

HUB_ID = "someone/a-model"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Returns (folder of the files on the hub, list of the files downloaded)."""
    remote, local, taken = tmp_path / "remote", tmp_path / "local", []

    def snapshot_download(hub_id, allow_patterns, **options):
        assert (hub_id, options) == (HUB_ID, {"revision": None, "token": None})
        local.mkdir(exist_ok=True)
        for file in sorted(remote.iterdir()):
            if any(fnmatch.fnmatch(file.name, pattern) for pattern in allow_patterns):
                taken.append(file.name)
                shutil.copy(file, local)
        return str(local)

    monkeypatch.setattr(reading, "snapshot_download", snapshot_download)
    return remote, taken


def write(case, folder):
    """Writes a model of layouts_test to a new folder."""
    source = layouts_test.prepare(folder.parent, case)[2]
    (source if source.is_dir() else source.parent).rename(folder)


@pytest.mark.parametrize(
    ("case", "others", "weights"),
    [
        ("clip, largest id", ["pytorch_model.bin", "tf_model.h5"], {"model.safetensors"}),
        ("clip, largest id", ["open_clip_model.safetensors"], {"model.safetensors"}),
        ("siglip of timm", ["open_clip_pytorch_model.bin"], {"open_clip_model.safetensors"}),
        ("pe", ["PE-Core-T8-24.msgpack", "training.pt"], {"PE-Core-T8-24.pt"}),
        ("long-clip", ["other.pt"], {"longclip.pt"}),
    ],
)
def test_one_kind_of_weights_is_downloaded(hub, case, others, weights):
    remote, taken = hub
    write(case, remote)
    for name in others:
        (remote / name).write_bytes(b"gigabytes of something else")
    found = import_model(HUB_ID)
    assert {name for name in taken if "json" not in name} == weights
    for name in others:
        (remote / name).unlink()
    assert found.config == import_model(remote).config


def test_pickled_weights_are_taken_where_there_are_no_others(hub):
    remote, taken = hub
    write("clip, largest id", remote)
    shutil.move(remote / "model.safetensors", remote / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"pytorch_model\.bin"):  # it is no pickle, but was taken
        import_model(HUB_ID)
    assert "pytorch_model.bin" in taken


def test_config_json_of_another_library_is_ignored(hub):
    remote, _ = hub
    write("pe", remote)
    expected = import_model(remote).config
    (remote / "config.json").write_text(json.dumps({"model_name": "PE-Core"}))
    assert import_model(HUB_ID).config == expected


def test_folder_of_several_files_is_ambiguous(tmp_path):
    write("pe", tmp_path / "a")
    shutil.copy(tmp_path / "a/PE-Core-T8-24.pt", tmp_path / "a/other.pt")
    with pytest.raises(InputError, match=r"holds several models: pass a file, one of PE-.*other"):
        import_model(tmp_path / "a")
