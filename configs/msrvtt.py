"""MSR-VTT: 10,000 clips with 20 captions each, tested on the 1,000 pairs of 1k-A.

    python -m xclip_jax.prepare --dataset=msrvtt --videos=MSRVTT/ \
        --annotations=msrvtt_data/ --output=data/msrvtt
    python -m xclip_jax.convert --input=ViT-B-32.pt --output=models/clip_b32 \
        --vocab=bpe_simple_vocab_16e6.txt.gz
    python -m xclip_jax.main --config=configs/msrvtt.py

Variants: --config=configs/msrvtt.py:vit_b16,official,7k (backbone vit_b32 or vit_b16, preset
paper, official or best, split 9k, 7k or full; for 7k or full prepare with --split into
data/msrvtt_7k or data/msrvtt_full).
Downloads (links and layout: docs/data.md): CLIP4Clip's msrvtt_data.zip, captions and splits;
Frozen in Time's MSRVTT.zip, videos; OpenAI's ViT-B-32.pt or ViT-B-16.pt and its vocabulary.
Settings: paper: batch 300, 3 epochs. official (the release's scripts): batch 300 (B/16: 80), 5
epochs. best: as paper, but for the fields of xclip_jax.config.BEST (docs/studies.md).
Hardware: the release's scripts use 4 GPUs. Time and accuracy of this code are not measured yet.
Protocol: each training caption is a pair of its own. There is no validation split: the weights of
the last step are evaluated (--config.train.select=test selects on the test split, as the release
does).

Expected accuracy, from the paper, R@1 / R@5 / MnR:

    ViT-B/32    text to video 46.1 / 73.0 / 13.2    video to text 46.8 / 73.3 / 9.1
    ViT-B/16    text to video 49.3 / 75.8 / 12.2    video to text 48.9 / 76.8 / 8.1
"""

from typing import Any

from xclip_jax.config import benchmark


def get_config(arguments: str = "") -> Any:
    """Returns the config of `arguments`: backbone, preset and split, separated by commas."""
    return benchmark("msrvtt", arguments, paper=(300, 3), official=(300, 5), official_b16=(80, 5))
