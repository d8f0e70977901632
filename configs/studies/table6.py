"""Table 6: granularities of contrast, all 15 combinations.

python -m xclip_jax.study --study=configs/studies/table6.py --config=configs/msrvtt.py
"""

from xclip_jax.similarity import GRANULARITIES
from xclip_jax.study import Study, Variant

COLUMNS = {"SV": "sentence-video", "SF": "sentence-frame", "WV": "word-video", "WF": "word-frame"}
LETTERS = dict(zip(GRANULARITIES, ("SV", "WV", "SF", "WF"), strict=True))
PAPER = {
    **{"SV": 43.0, "SF": 42.7, "WV": 42.8, "WF": 42.7},
    **{"SF+WV": 44.6, "WV+WF": 45.6, "SF+WF": 44.1, "SV+SF": 45.4, "SV+WV": 44.0, "SV+WF": 44.8},
    **{"SF+WV+WF": 45.7, "SV+SF+WV": 45.7, "SV+SF+WF": 45.8, "SV+WV+WF": 45.5},
    "SV+SF+WV+WF": 46.1,
}


def get_study(config):
    """Returns the study with rows in the paper's order."""
    del config
    variants = {}
    for combination, recall in PAPER.items():
        names = combination.split("+")
        variants[combination] = Variant(
            {"model.granularities": tuple(g for g in GRANULARITIES if LETTERS[g] in names)},
            {"ViT-B/32": recall},
            cells=tuple("✓" if name in names else "" for name in COLUMNS),
        )
    return Study(
        title="Table 6: granularities of contrast",
        columns=tuple(COLUMNS.values()),
        variants=variants,
    )
