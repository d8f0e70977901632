"""ActivityNet Captions: 15,000 long videos, whose sentences form one paragraph per video.

    python -m xclip_jax.prepare --dataset=activitynet --videos=ActivityNet/videos/ \
        --annotations=ActivityNet/ --output=data/activitynet
    python -m xclip_jax.convert --input=ViT-B-32.pt --output=models/clip_b32 \
        --vocab=bpe_simple_vocab_16e6.txt.gz
    python -m xclip_jax.main --config=configs/activitynet.py

Variants: --config=configs/activitynet.py:vit_b16,official,val_2 (backbone vit_b32 or vit_b16,
preset paper, official or best, split val_1 or val_2; for val_2 prepare with --split=val_2 into
data/activitynet_val_2).
Downloads (links and layout: docs/data.md): captions.zip of ActivityNet Captions, videos on
request from activity-net.org; OpenAI's ViT-B-32.pt or ViT-B-16.pt and its vocabulary.
Settings: 64 words, 64 frames. paper: batch 64, 20 epochs. official (the release's scripts): batch
112 (B/16: 32), 20 epochs. best: as paper, but for the fields of xclip_jax.config.BEST
(docs/studies.md).
Hardware: the release's scripts use 8 GPUs. Time and accuracy of this code are not measured yet.
Protocol: paragraph to video on val_1. There is no other split to select on: the weights of the last
step are evaluated (--config.train.select=test selects on val_1, as the release does).

Expected accuracy, from the paper, R@1 / R@5 / MnR:

    ViT-B/32    text to video 44.3 / 74.1 / 7.9    video to text 43.9 / 73.9 / 7.6
    ViT-B/16    text to video 46.2 / 75.5 / 6.8    video to text 46.4 / 75.9 / 6.4
"""

from typing import Any

from xclip_jax.config import benchmark


def get_config(arguments: str = "") -> Any:
    """Returns the config of `arguments`: backbone, preset and split, separated by commas."""
    return benchmark(
        "activitynet",
        arguments,
        paper=(64, 20),
        official=(112, 20),
        official_b16=(32, 20),
        max_words=64,
        max_frames=64,
    )
