"""MSVD: 1,970 clips from YouTube with about 40 captions each, all of them used.

    python -m xclip_jax.prepare --dataset=msvd --videos=YouTubeClips/ \
        --annotations=msvd_data/ --output=data/msvd
    python -m xclip_jax.convert --input=ViT-B-32.pt --output=models/clip_b32 \
        --vocab=bpe_simple_vocab_16e6.txt.gz
    python -m xclip_jax.main --config=configs/msvd.py

Variants: --config=configs/msvd.py:vit_b16,official (backbone vit_b32 or vit_b16, preset paper,
official or best).
Downloads (links and layout: docs/data.md): CLIP4Clip's msvd_data.zip, captions and splits;
YouTubeClips.tar, videos; OpenAI's ViT-B-32.pt or ViT-B-16.pt and its vocabulary.
Settings: paper: batch 300, 3 epochs. official (the release's scripts): batch 300 (B/16: 80), 5
epochs. best: as paper, but for the fields of xclip_jax.config.BEST (docs/studies.md).
Hardware: the release's scripts use 4 GPUs. Time and accuracy of this code are not measured yet.
Protocol: text to video ranks each of the 27,763 test captions by itself; video to text takes the
best-scoring caption of each candidate video. Weights are selected on the 100 validation videos.

Expected accuracy, from the paper, R@1 / R@5 / MnR:

    ViT-B/32    text to video 47.1 / 77.8 / 9.5    video to text 60.9 / 87.8 / 4.7
    ViT-B/16    text to video 50.4 / 80.6 / 8.4    video to text 66.8 / 90.4 / 4.2
"""

from typing import Any

from xclip_jax.config import benchmark


def get_config(arguments: str = "") -> Any:
    """Returns the config of `arguments`: backbone and preset, separated by commas."""
    return benchmark("msvd", arguments, paper=(300, 3), official=(300, 5), official_b16=(80, 5))
