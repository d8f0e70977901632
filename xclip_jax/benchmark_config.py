"""What the configs of the five benchmarks share: CLIP's backbones, the two presets, the splits."""

from xclip_jax import config
from xclip_jax.data.datasets import DATASETS
from xclip_jax.errors import InputError

BACKBONES = {"vit_b32": 32, "vit_b16": 16}  # -> patch size
PRESETS = ("paper", "official")


def benchmark(dataset, arguments, paper, official, official_b16, max_words=32, max_frames=12):
    """The config of a benchmark.

    Args:
        dataset: a --dataset of xclip_jax.prepare.
        arguments: words after the config file's name, with commas between them: a backbone, a
            preset, a variant of the data set; e.g. "vit_b16,official". Defaults: the first of each.
        paper, official, official_b16: (batch size, epochs) of the paper, and of the release's
            scripts for each backbone.
        max_words, max_frames: lengths.

    Raises:
        InputError: an unknown word, or two of a kind.
    """
    kinds = tuple(BACKBONES), PRESETS, DATASETS[dataset].VARIANTS
    backbone, preset, variant = chosen = _choose(arguments, kinds)
    unusual = [
        word for word, kind in zip(chosen, kinds, strict=True) if word not in ("", *kind[:1])
    ]
    c = config.get_config()
    c.name = "_".join([dataset, *unusual])
    c.data.dataset, c.data.variant = dataset, variant
    c.data.path = f"data/{dataset}" + (f"_{variant}" if variant in unusual else "")
    c.init.clip = f"models/clip_{backbone.removeprefix('vit_')}"
    c.model.vision.patch_size = BACKBONES[backbone]
    c.model.update(max_words=max_words, max_frames=max_frames)
    batch_size, epochs = paper
    if preset == "official":
        batch_size, epochs = official_b16 if backbone == "vit_b16" else official
        c.model.preset = "official"
        c.optimizer.update(name="bert_adam", freeze_layers=0)
    c.train.update(batch_size=batch_size, epochs=epochs)
    return c


def _choose(arguments, kinds):
    """For each kind the word that is given, or its first (or ""), whatever the words' order."""
    words = [word for word in arguments.split(",") if word]
    known = [word for kind in kinds for word in kind]
    chosen = [[word for word in words if word in kind] for kind in kinds]
    if not set(words) <= set(known) or any(len(few) > 1 for few in chosen):
        raise InputError(
            f"--config=FILE:{arguments}: after the colon, at most one of each of "
            + "; ".join(", ".join(kind) for kind in kinds if kind)
        )
    defaults = [kind[0] if kind else "" for kind in kinds]
    return [few[0] if few else default for few, default in zip(chosen, defaults, strict=True)]
