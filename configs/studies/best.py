"""The preset `best` beside the paper's, trained for the config's epochs and for twice as many.

python -m xclip_jax.study --study=configs/studies/best.py --config=configs/msrvtt.py
"""

import operator

from xclip_jax.cli import InputError
from xclip_jax.config import BEST
from xclip_jax.study import Study, Variant


def get_study(config):
    """Returns the study, or raises InputError if the config is not of preset `paper`."""
    if any(operator.attrgetter(field)(config) == value for field, value in BEST.items()):
        raise InputError("--config: must be of preset paper, such as configs/demo.py:study")
    variants = {}
    for epochs in (config.train.epochs, 2 * config.train.epochs):
        for preset, fields in (("best", BEST), ("paper", {})):
            length = {} if epochs == config.train.epochs else {"train.epochs": epochs}
            cells = preset, str(epochs)
            variants[f"{preset}, {epochs}"] = Variant({**fields, **length}, cells=cells)
    return Study(title="Presets", columns=("preset", "epochs"), variants=variants)
