"""Tests of training that starts from VideoPrism-LvT, and of the data for it."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import video_files
from videoprism_files import arrays, checkpoint, directory

import xclip_jax
from xclip_jax import prepare, train
from xclip_jax.cli import InputError
from xclip_jax.config import get_config
from xclip_jax.convert.importing import convert, import_model
from xclip_jax.convert.reading import Options
from xclip_jax.data.builder import Dataset
from xclip_jax.evaluate import check_frames
from xclip_jax.initialization import adopt_encoders
from xclip_jax.models import XClip
from xclip_jax.optimizer import scale_encoders

__all__ = ["arrays", "checkpoint", "directory"]  # fixtures


def prepare_clips(folder, directory, count=8):
    """Prepares small videos in the format of a model, returns the data set's folder."""
    names = []
    for number in range(count):
        shades = [np.full((24, 24, 3), 25 * number + 5 * k, np.uint8) for k in range(8)]
        video_files.write(folder / f"clip{number}.mp4", video_files.at_rate(4, 8), shades)
        names.append(f"clip{number}.mp4")
    captions = [
        f"the {color} circle moves {way}"
        for color in ("red", "blue", "grey")
        for way in ("left", "right", "up")
    ]
    lines = [{"video": name, "caption": captions[i]} for i, name in enumerate(names)]
    splits = {0: "val", 1: "val"} | dict.fromkeys(range(2, count + 2), "train")
    lines = [line | {"split": splits[i]} for i, line in enumerate(lines)]
    path = folder / "captions.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = ["--dataset=captions", f"--videos={folder}", f"--annotations={path}"]
    prepare.main([*arguments, f"--output={folder / 'data'}", f"--model={directory}"])
    return folder / "data"


def test_training_starts_at_the_converted_vectors_and_improves(directory, tmp_path, capsys):
    (tmp_path / "videos").mkdir()
    data = prepare_clips(tmp_path / "videos", directory)
    assert "3 spread over the whole video" in capsys.readouterr().out
    fields = {
        "model.max_words": 16,
        "model.temporal.type": "none",
        "train.batch_size": 6,
        "train.epochs": 0,
        "optimizer.lr": 1e-3,
        "optimizer.encoder_lr": 1e-3,
        "log.every": 1,
        "log.tensorboard": False,
        "report.attention_pairs": 1,
    }

    def run(name, **changes):
        config = get_config()
        config.data.path, config.init.clip = str(data), str(directory)
        config.update_from_flattened_dict(fields | changes)
        adopt_encoders(config, fields.keys() | changes.keys())
        assert config.model.max_frames == 3
        train.train(config, tmp_path / name)
        return xclip_jax.load(tmp_path / name)

    started, original = run("start"), xclip_jax.load(directory)
    jax.tree.map(np.testing.assert_array_equal, started.params["clip"], original.params["clip"])
    paths = sorted(map(str, (tmp_path / "videos").glob("*.mp4")))
    both = [retriever.encode_video(paths).video for retriever in (started, original)]
    np.testing.assert_allclose(*both, atol=1e-6)
    run("run", **{"train.epochs": 40, "optimizer.layer_decay": 0.9, "optimizer.freeze_layers": 1})
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert np.mean(losses[-3:]) < 0.8 * losses[0]
    trained = xclip_jax.load(tmp_path / "run").params["clip"]["visual"]
    before = original.params["clip"]["visual"]
    for stack, frozen in (("encoder", 1), ("temporal", 0), ("joint", 0)):
        for a, b in zip(
            jax.tree.leaves(trained[stack]), jax.tree.leaves(before[stack]), strict=True
        ):
            same = np.array([np.array_equal(x, y) for x, y in zip(a, b, strict=True)])
            assert same.tolist() == [layer < frozen for layer in range(len(same))], stack


def test_layer_decay_counts_the_blocks_of_all_stacks(checkpoint):
    params = import_model(checkpoint).params
    decay = scale_encoders(1.0, 0.5)
    ones = jax.tree.map(jnp.ones_like, params)
    visual = decay.update(ones, decay.init(params), params)[0]["clip"]["visual"]
    stacks = ("encoder", "temporal", "joint")  # of 2, 1 and 1 layers
    powers = [np.log2(visual[name]["blocks"]["fc"]["bias"])[:, 0].tolist() for name in stacks]
    assert powers == [[-4, -3], [-2], [-1]]
    assert (visual["positions"] == 2**-5).all()
    assert (visual["frame_positions"] == 2**-5).all()
    assert (visual["pool"]["scale"] == 1).all()


def test_temporal_encoder_starts_from_the_text_blocks(directory, tmp_path, capsys):
    (tmp_path / "videos").mkdir()
    data = prepare_clips(tmp_path / "videos", directory)
    config = get_config()
    config.data.path, config.init.clip = str(data), str(directory)
    config.model.temporal.heads = 2
    config.train.update(batch_size=6, epochs=0)
    config.log.tensorboard = False
    adopt_encoders(config)
    train.train(config, tmp_path / "run")
    out = capsys.readouterr().out
    assert "random: CLIP's text tower has blocks of another size, or fewer" in out  # 3 of 2
    config.model.temporal.layers = 2
    train.train(config, tmp_path / "two")
    assert "the first 2 blocks of CLIP's text tower; positions random" in capsys.readouterr().out
    params = xclip_jax.load(tmp_path / "two").params
    blocks = params["clip"]["textual"]["encoder"], params["temporal_encoder"]["encoder"]
    jax.tree.map(np.testing.assert_array_equal, *blocks)


def test_number_of_frames_is_that_of_the_model_directory(checkpoint, tmp_path):
    convert(checkpoint, tmp_path / "two", Options(max_frames=2))
    config = get_config()
    config.init.clip = str(tmp_path / "two")
    config.model.temporal.type = "none"
    adopt_encoders(config)
    assert (config.model.max_frames, config.model.vision.num_frames) == (2, 3)
    config.model.max_frames = 4
    adopt_encoders(config, ["model.max_frames"])
    assert config.model.max_frames == 4


def test_data_of_another_sampling_is_refused(directory, tmp_path):
    (tmp_path / "videos").mkdir()
    data = prepare_clips(tmp_path / "videos", directory)
    dataset, model = Dataset(data), XClip(xclip_jax.load(directory).model.config).config
    check_frames(dataset, model)
    check_frames(dataset, dataclasses.replace(model, max_frames=2))  # a part of the frames is used
    with pytest.raises(InputError, match=r"model.max_frames = 5: .* with 3: .* --spread=5"):
        check_frames(dataset, dataclasses.replace(model, max_frames=5))
    every_second = dataclasses.replace(model.preprocess, spread=False)
    with pytest.raises(InputError, match=r"preprocess.spread = False: .* with True"):
        check_frames(dataset, dataclasses.replace(model, preprocess=every_second))
