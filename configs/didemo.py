"""DiDeMo: 10,461 videos from Flickr, whose sentences form one paragraph per video.

    python -m xclip_jax.prepare --dataset=didemo --max_seconds=31 --videos=DiDeMo/videos/ \
        --annotations=DiDeMo/ --output=data/didemo
    python -m xclip_jax.convert --input=ViT-B-32.pt --output=models/clip_b32 \
        --vocab=bpe_simple_vocab_16e6.txt.gz
    python -m xclip_jax.main --config=configs/didemo.py

Variants: --config=configs/didemo.py:vit_b16,official (backbone vit_b32 or vit_b16, preset paper,
official or best).
Downloads (links and layout: docs/data.md): *_data.json and videos from LocalizingMoments,
*_list.txt from collaborative-experts; OpenAI's ViT-B-32.pt or ViT-B-16.pt and its vocabulary. The
release reads seconds 0 to 31 of a video, hence --max_seconds.
Settings: 64 words, 64 frames. paper: batch 64, 20 epochs. official (the release's scripts): the
same, with B/16 batch 16. best: as paper, but for the fields of xclip_jax.config.BEST
(docs/studies.md).
Hardware: the release's scripts use 4 GPUs. Time and accuracy of this code are not measured yet.
Protocol: paragraph to video; weights are selected on the 1,065 validation videos.

Expected accuracy, from the paper, R@1 / R@5 / MnR:

    ViT-B/32    text to video 45.2 / 74.0 / 14.6    video to text 43.1 / 72.2 / 10.9
    ViT-B/16    text to video 47.8 / 79.3 / 12.6    video to text 47.8 / 76.8 / 10.5
"""

from typing import Any

from xclip_jax.config import benchmark


def get_config(arguments: str = "") -> Any:
    """Returns the config of `arguments`: backbone and preset, separated by commas."""
    return benchmark(
        "didemo",
        arguments,
        paper=(64, 20),
        official=(64, 20),
        official_b16=(16, 20),
        max_words=64,
        max_frames=64,
    )
