"""Trains X-CLIP and evaluates it: metrics both ways, pictures of what was retrieved.

    python -m xclip_jax.main --config=configs/demo.py
    python -m xclip_jax.main --config=configs/captions.py --config.data.path=data/mine
    python -m xclip_jax.main --config=configs/demo.py --config.mode=eval

Any field of xclip_jax/config.py can be set as --config.a.b=value. The same command again goes on
where the last one stopped.
"""

import logging
import sys

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from xclip_jax import evaluate, prepare, train
from xclip_jax.config import validate
from xclip_jax.data.builder import dataset_folder
from xclip_jax.errors import one_line_errors

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "A file of configs/; single fields by --config.a.b=value.", lock_config=True
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where checkpoints, metrics and the report go; default runs/NAME_OF_CONFIG."
)


def main(argv):
    """Dispatch."""
    del argv
    absl_logging.set_verbosity(absl_logging.WARNING)
    logging.captureWarnings(True)
    with one_line_errors():
        config = _CONFIG.value
        validate(config)
        workdir = _WORKDIR.value or f"runs/{config.name}"
        if config.data.rendered and not dataset_folder(config.data.path).is_dir():
            image_size = config.model.vision.image_size
            prepare.prepare_rendered(config.data.path, image_size, num_train=config.data.rendered)
        if config.mode == "train":
            train.run(config, workdir)
        evaluate.run(config, workdir)


def parse_flags(argv):
    """absl's parsing, with one line for a field that the config does not have."""
    try:
        return app.parse_flags_with_usage(argv)
    except (AttributeError, KeyError, TypeError) as error:
        field = str(error).strip("\"'")
        sys.exit(f"error: --config has no field {field}: see xclip_jax/config.py for all of them")


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main, flags_parser=parse_flags)
