"""LSMDC 2016: 118,081 clips from films, a sentence each; tested on 1,000 of them.

    python -m xclip_jax.prepare --dataset=lsmdc --videos=LSMDC/videos/ \
        --annotations=LSMDC/ --output=data/lsmdc
    python -m xclip_jax.convert --input=ViT-B-32.pt --output=models/clip_b32 \
        --vocab=bpe_simple_vocab_16e6.txt.gz
    python -m xclip_jax.main --config=configs/lsmdc.py

Variants: --config=configs/lsmdc.py:vit_b16,official (backbone vit_b32 or vit_b16, preset paper or
official).
Downloads (links and layout: docs/data.md): access is gated; the three LSMDC16 lists and the
clips; OpenAI's ViT-B-32.pt or ViT-B-16.pt and its vocabulary.
Settings: the paper's, batch 300 and 3 epochs; official: the scripts', 5 epochs, batch 300 (B/16:
80).
Hardware: the release's scripts run on 4 GPUs.
Protocol: the 1,000 clips of the challenge list, never the 7,408 of the validation list, which
choose the weights.

The paper's numbers (not ours), R@1 / R@5 / MnR:

    ViT-B/32    text to video 23.3 / 43.0 / 56.0    video to text 22.5 / 42.2 / 50.7
    ViT-B/16    text to video 26.1 / 48.4 / 46.7    video to text 26.9 / 46.2 / 41.9
"""

from xclip_jax.config import benchmark


def get_config(arguments=""):
    """arguments: backbone, preset; see above."""
    return benchmark("lsmdc", arguments, paper=(300, 3), official=(300, 5), official_b16=(80, 5))
