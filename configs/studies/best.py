"""The preset `best` beside the paper's, trained for the config's epochs and for twice as many.

python -m xclip_jax.study --study=configs/studies/best.py --config=configs/msrvtt.py
"""

from xclip_jax.cli import InputError
from xclip_jax.config import BEST
from xclip_jax.study import Study, Variant


def get_study(config):
    """Returns the study, or raises InputError if the config is not of preset `paper`."""
    model = config.model
    if (
        BEST.items()
        & {"model.granularities": tuple(model.granularities), "model.tau": model.tau}.items()
    ):
        raise InputError("--config: must be of preset paper, such as configs/demo.py:study")
    variants = {}
    for epochs in (config.train.epochs, 2 * config.train.epochs):
        for preset, fields in (("best", BEST), ("paper", {})):
            length = {} if epochs == config.train.epochs else {"train.epochs": epochs}
            cells = preset, str(epochs)
            variants[f"{preset}, {epochs}"] = Variant({**fields, **length}, cells=cells)
    return Study(title="Presets", columns=("preset", "epochs"), variants=variants)
