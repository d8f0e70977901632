"""Trains X-CLIP and evaluates it: metrics both ways, pictures of what was retrieved.

    python -m xclip_jax.main --config=configs/demo.py
    python -m xclip_jax.main --config=configs/captions.py --config.data.path=data/mine
    python -m xclip_jax.main --config=configs/msrvtt.py:vit_b16,official
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
from xclip_jax.errors import InputError, one_line_errors, run_command

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "A file of configs/; single fields by --config.a.b=value.", lock_config=True
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where checkpoints, metrics and the report go; default runs/NAME_OF_CONFIG."
)


def main(argv):
    """Dispatch."""
    absl_logging.set_verbosity(absl_logging.WARNING)
    logging.captureWarnings(True)
    with one_line_errors():
        if argv[1:]:
            raise InputError(f"{' '.join(argv[1:])}: every option starts with --, see --help")
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
    """absl's parsing, with one line for a mistake, and success for a call for help."""
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        lines = str(error).strip().splitlines()
        if "Traceback (most recent call last):" in lines:  # of a config file that raised
            lines = [lines[0].split("Error whilst")[0], lines[-1].split("InputError: ")[-1]]
        sys.exit("error: " + " ".join(" ".join(lines).split()))
    except (AttributeError, KeyError, TypeError) as error:
        field = " ".join(str(error.args[0] if error.args else error).split()).strip("\"'")
        field = field.partition(" Other fields present:")[0]
        sys.exit(f"error: --config has no field {field}: see xclip_jax/config.py for all of them")
    except SystemExit:
        sys.exit(0 if any(arg.lstrip("-").startswith("help") for arg in argv[1:]) else 1)


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    run_command(lambda: app.run(main, flags_parser=parse_flags))
