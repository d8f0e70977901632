"""Every config of configs/ with every argument: valid, and with the settings of its docstring."""

import importlib.util
import itertools
from pathlib import Path

import pytest

from xclip_jax.cli import InputError
from xclip_jax.config import validate
from xclip_jax.data.benchmarks import DATASETS
from xclip_jax.paper import paper_results

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
BENCHMARKS = [name for name in DATASETS if name != "captions"]


def load(name):
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_combination_is_valid(name):
    variants = DATASETS[name].variants
    paths = set()
    for words in itertools.product(
        ("", "vit_b32", "vit_b16"), ("", "paper", "official"), ("", *variants)
    ):
        c = load(name).get_config(",".join(filter(None, words)))
        validate(c)
        backbone, preset, variant = words
        assert c.model.vision.patch_size == (16 if backbone == "vit_b16" else 32)
        assert c.init.clip == f"models/clip_b{c.model.vision.patch_size}"
        assert c.model.preset == (preset or "paper")
        assert c.data.variant == (variant or (variants[0] if variants else ""))
        assert c.data.dataset == name
        unusual = [w for w in words if w not in ("", "vit_b32", "paper", *variants[:1])]
        assert c.name == "_".join([name, *unusual])
        paths.add(c.data.path)
    assert len(paths) == max(1, len(variants))


# Paper; the release's scripts for B/32 and for B/16: (batch, epochs).
SETTINGS = {
    "msrvtt": ((300, 3), (300, 5), (80, 5)),
    "msvd": ((300, 3), (300, 5), (80, 5)),
    "lsmdc": ((300, 3), (300, 5), (80, 5)),
    "didemo": ((64, 20), (64, 20), (16, 20)),
    "activitynet": ((64, 20), (112, 20), (32, 20)),
}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_settings(name):
    for arguments, expected in zip(
        ("", "official", "official,vit_b16"), SETTINGS[name], strict=True
    ):
        c = load(name).get_config(arguments)
        assert (c.train.batch_size, c.train.epochs) == expected
        long = name in ("didemo", "activitynet")
        assert (c.model.max_words, c.model.max_frames) == ((64, 64) if long else (32, 12))
        official = arguments.startswith("official")
        assert c.optimizer.name == ("bert_adam" if official else "adamw")
        assert c.optimizer.freeze_layers == (0 if official else -1)
        assert (c.optimizer.lr, c.optimizer.encoder_lr) == (1e-4, 1e-7)


@pytest.mark.parametrize("arguments", ["vit_l14", "vit_b32,vit_b16", "official,paper", "9k,7k"])
def test_wrong_arguments(arguments):
    with pytest.raises(InputError, match=f"{arguments}: after the colon, at most one of each of "):
        load("msrvtt").get_config(arguments)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_docstring_has_the_paper_s_numbers(name):
    """The two places that hold them agree."""
    variant = (*DATASETS[name].variants, "")[0]
    for patch_size, backbone in ((32, "ViT-B/32"), (16, "ViT-B/16")):
        vision = load(name).get_config(f"vit_b{patch_size}").model.vision
        ((row, metrics),) = paper_results(name, variant, vision).items()
        assert row == backbone
        texts = [
            " / ".join(str(metrics[way][m]) for m in ("R@1", "R@5", "MnR"))
            for way in ("text_to_video", "video_to_text")
        ]
        line = f"{backbone}    text to video {texts[0]}    video to text {texts[1]}"
        assert line in load(name).__doc__
    assert paper_results(name, "another", vision) == {}
