"""The demo: rendered scenes, from random weights, on any machine.

    python -m xclip_jax.main --config=configs/demo.py

Needs no downloads: renders 4,280 clips of moving shapes to data/demo, trains a small X-CLIP on
4,000 of them, with six captions each, and evaluates it on 220 clips with combinations of objects
and motions that are not in the training split: on one full caption of each clip, and on 220 short
sentences that may fit several clips ("something red", "an object that rises").
Hardware: any. Takes 2 min 24 s on 2 CPU cores with a matrix product of 327 GFLOP/s (2026-11-27),
about 6.5 minutes on slower ones. R@1: 97.3 text to video, 96.4 video to text; 99.1 % of the short
sentences find a clip that fits. On another CPU: 97.7, 97.7, 98.6 %.

The similarity is that of the preset `best`, which learns the order of events sooner
(docs/studies.md): AOSM of sentence-video and word-frame with a temperature of 0.1. Variants:

    python -m xclip_jax.main --config=configs/demo.py:paper
    python -m xclip_jax.main --config=configs/demo.py:clip
    python -m xclip_jax.study --study=configs/studies/table8.py --config=configs/demo.py:study

paper: all four granularities, with a temperature of 0.01.
clip: trains encoders for the cosine of a sentence and the mean frame, as CLIP's are for the paper.
study: as paper, but starts from these encoders and trains for one epoch, 375 steps; the weights of
the last step are evaluated.
"""

from typing import Any

from xclip_jax import config
from xclip_jax.cli import InputError


def get_config(variant: str = "") -> Any:
    """Returns the config of a variant: "", "paper", "clip" or "study"."""
    if variant not in ("", "paper", "clip", "study"):
        rule = "after the colon must be paper, clip or study"
        raise InputError(f"--config=configs/demo.py:{variant}: {rule}")
    c = config.get_config()
    c.name = "demo"
    c.data.path = "data/demo"
    c.data.rendered = 4000
    c.eval.queries = "scenes/short_queries.jsonl"

    model = c.model
    model.embed_dim = 64
    model.max_words = 16
    model.max_frames = 6
    model.vision.update(image_size=32, patch_size=16, width=64, layers=2, heads=2)
    model.text.update(vocab_size=0, context_length=16, width=64, layers=3, heads=4)
    model.temporal.update(layers=2, heads=4)

    c.train.update(batch_size=64, epochs=4)
    c.loss.same_video = "ignore"
    c.optimizer.update(lr=1.5e-3, encoder_lr=1.5e-3, weight_decay=0.1)
    if not variant:
        c.update_from_flattened_dict(config.BEST)
        return c
    c.name = f"demo_{variant}"
    if variant in ("clip", "study"):
        c.train.update(select="last", eval_every=1_000_000)
    if variant == "clip":
        model.head = "mean_pooling"
        c.train.epochs = 3
    if variant == "study":
        c.init.clip = "runs/demo_clip"
        c.train.epochs = 1
        c.report.attention_pairs = 0
    return c
