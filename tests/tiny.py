"""A tiny data set of coloured frames with captions, a tiny config and a tiny model for tests."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from xclip_jax import config
from xclip_jax.checkpoint import init_params, save_model
from xclip_jax.data import rendered
from xclip_jax.data.builder import DatasetSettings, PendingRecord, write_dataset
from xclip_jax.data.preprocess import encode_jpeg
from xclip_jax.data.text import learn_tokenizer
from xclip_jax.models import XClip
from xclip_jax.train import configure_model

SIDE = 16
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220), "grey": (90,) * 3}


def make_dataset(path, splits=("train", "val"), num_frames=3, settings=None):
    """Writes a clip for each of the 12 ordered pairs of colours, returns `path`."""
    settings = settings or DatasetSettings(image_size=SIDE)
    side = settings.image_size
    pairs = [(a, b) for a in COLOURS for b in COLOURS if a != b]
    captions = [[f"{a} and then {b}", f"first {a}, then {b}"] for a, b in pairs]

    def record(number):
        shown = [COLOURS[pairs[number][i > 0]] for i in range(num_frames)]
        frames = [encode_jpeg(np.full((side, side, 3), colour, np.uint8)) for colour in shown]
        times = np.arange(num_frames, dtype=np.float32)
        return {
            "id": f"clip{number}",
            "captions": captions[number],
            "frames": frames,
            "times": times,
        }

    clips = [
        PendingRecord(functools.partial(record, n), 2, f"{num_frames} {n}")
        for n in range(len(pairs))
    ]
    write_dataset(path, dict.fromkeys(splits, clips), settings)
    learn_tokenizer(c for cs in captions for c in cs).save(f"{path}/tokenizer")
    return path


def make_config(path, **train):
    """Returns the config of a model of width 32, with fields of config.train set by `train`."""
    c = config.get_config()
    c.data.path = str(path)
    c.model.update(embed_dim=32, max_words=8, max_frames=4)
    c.model.vision.update(image_size=SIDE, patch_size=8, width=32, layers=1, heads=2)
    c.model.text.update(vocab_size=0, context_length=8, width=32, layers=1, heads=2)
    c.model.temporal.update(layers=1, heads=2)
    c.train.update({"batch_size": 8, "epochs": 2, **train})
    c.optimizer.update(lr=3e-3, encoder_lr=3e-3, weight_decay=0.0)
    c.eval.batch_size = 8
    c.log.update(every=1, tensorboard=False)
    c.report.attention_pairs = 1
    return c


@functools.partial(jax.jit, static_argnums=0, static_argnames="method")
def apply(model, params, *inputs, method=None):
    """Runs model.apply as one program, which compiles faster than operation by operation."""
    return model.apply({"params": params}, *inputs, method=method)


@functools.cache
def param_shapes(model):
    return jax.eval_shape(lambda: init_params(model, 0))


def make_params(model, seed=0):
    """Returns parameters drawn by NumPy, as compiling an initialiser takes seconds."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        group, name = path[0].key, path[-1].key
        if name in ("logit_scale", "log_tau"):
            return np.full(leaf.shape, np.log(1 / 0.07) if name == "logit_scale" else -3.0)
        if name == "scale" or "bias" in name:
            return np.full(leaf.shape, float(name == "scale"))
        if group == "aggregation_matrices":
            return np.eye(*leaf.shape)
        # E x 3 x N x K of a layer: a larger scale would saturate attention, and amplify rounding.
        fan_in = leaf.shape[-4] if "qkv" in str(path) and name == "kernel" else leaf.shape[-2:][0]
        return rng.normal(0, fan_in**-0.5, leaf.shape)

    def on_device(path, leaf):
        return jnp.asarray(draw(path, leaf), jnp.float32)

    return jax.tree_util.tree_map_with_path(on_device, param_shapes(model))


def make_model(path, texts=("a red dog", "a blue cat and"), seed=0, **model):
    """Writes a model directory with random weights, with fields of config.model set by `model`."""
    tokenizer = learn_tokenizer(list(texts) * 2, max_words=8)
    c = make_config("")
    c.model.update(model)
    model_config = configure_model(c, tokenizer.vocab_size)
    params = make_params(XClip(model_config), seed)
    save_model(path, model_config, params, tokenizer=tokenizer, extra={"step": 0})
    return path


def run_jobs_here(function, jobs, done):
    """Replaces xclip_jax.workers.run_jobs without processes, which take seconds to start."""
    for index, job in enumerate(jobs):
        done(index, function(job))


def make_videos(folder, count=6):
    """Writes video files of six seconds, `clip0.mp4` and so on, returns their paths.

    All frames differ: scenes at rest would tie, and so would a scene with its mirror.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"clip{number}.mp4" for number in range(count)]
    scenes = rendered.draw_scenes("train", 40 * count)[::2]
    moving = [scene for scene in scenes if scene.events[0].motion != "still"]
    for path, scene in zip(paths, moving, strict=False):
        rendered.render_video(scene, path)
    return paths
