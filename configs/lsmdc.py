"""LSMDC 2016: 118,081 clips from films with one sentence each, tested on 1,000 of them.

    python -m xclip_jax.prepare --dataset=lsmdc --videos=LSMDC/videos/ \
        --annotations=LSMDC/ --output=data/lsmdc
    python -m xclip_jax.convert --input=ViT-B-32.pt --output=models/clip_b32 \
        --vocab=bpe_simple_vocab_16e6.txt.gz
    python -m xclip_jax.main --config=configs/lsmdc.py

Variants: --config=configs/lsmdc.py:vit_b16,official (backbone vit_b32 or vit_b16, preset paper,
official or best).
Downloads (links and layout: docs/data.md): the three LSMDC16 lists and the clips, on request;
OpenAI's ViT-B-32.pt or ViT-B-16.pt and its vocabulary.
Settings: paper: batch 300, 3 epochs. official (the release's scripts): batch 300 (B/16: 80), 5
epochs. best: as paper, but for the fields of xclip_jax.config.BEST (docs/studies.md).
Hardware: the release's scripts use 4 GPUs. Time and accuracy of this code are not measured yet.
Protocol: tested on the 1,000 clips of the challenge list; weights are selected on the 7,408 clips
of the validation list.

Expected accuracy, from the paper, R@1 / R@5 / MnR:

    ViT-B/32    text to video 23.3 / 43.0 / 56.0    video to text 22.5 / 42.2 / 50.7
    ViT-B/16    text to video 26.1 / 48.4 / 46.7    video to text 26.9 / 46.2 / 41.9
"""

from typing import Any

from xclip_jax.config import benchmark


def get_config(arguments: str = "") -> Any:
    """Returns the config of `arguments`: backbone and preset, separated by commas."""
    return benchmark("lsmdc", arguments, paper=(300, 3), official=(300, 5), official_b16=(80, 5))
