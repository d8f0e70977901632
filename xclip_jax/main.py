"""Trains X-CLIP and evaluates it: metrics both ways, pictures of what was retrieved.

    python -m xclip_jax.main --config=configs/demo.py
    python -m xclip_jax.main --config=configs/captions.py --config.data.path=data/mine
    python -m xclip_jax.main --config=configs/msrvtt.py:vit_b16,official
    python -m xclip_jax.main --config=configs/demo.py --config.mode=eval

Any field of xclip_jax/config.py can be set as --config.a.b=value. The same command again goes on
where the last one stopped. On SIGTERM it saves and exits with status 75. Several processes train as
one: Cloud TPU, GKE and SLURM are detected, elsewhere see --coordinator.
"""

import logging
import sys

import jax
from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from xclip_jax import compile_only, evaluate, prepare, train
from xclip_jax.config import validate
from xclip_jax.data.builder import dataset_folder
from xclip_jax.distributed import (
    connect,
    is_first,
    leave,
    named_if_it_fails,
    stop_when_preempted,
    wait_for_all,
)
from xclip_jax.errors import InputError, one_line_errors, run_command

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "A file of configs/; single fields by --config.a.b=value.", lock_config=True
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where checkpoints, metrics and the report go; default runs/NAME_OF_CONFIG."
)

_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "HOST:PORT of the first process; Cloud TPU, GKE and SLURM need none."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "With --coordinator: of how many.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "With --coordinator: which, from 0.")
_COMPILE_ONLY = flags.DEFINE_bool(
    "compile_only", False, "Compile the training step, print memory, work, communication; no data."
)
_TOPOLOGY = flags.DEFINE_string(
    "topology", "", "With --compile_only: a TPU slice such as v6e:2x4 (needs the libtpu wheel)."
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
        if _COMPILE_ONLY.value:
            compile_only.run(config, _TOPOLOGY.value)
            return
        if _TOPOLOGY.value:
            raise InputError("--topology: only with --compile_only")
        connect(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
        if jax.process_count() == 1 or config.mode == "eval":
            stop_when_preempted()
        workdir = _WORKDIR.value or f"runs/{config.name}"
        if config.data.rendered and not dataset_folder(config.data.path).is_dir():
            image_size, scenes = config.model.vision.image_size, config.data.rendered
            if is_first():
                prepare.prepare_rendered(config.data.path, image_size, num_train=scenes)
            wait_for_all("the demo's data")
        with named_if_it_fails():
            if config.mode == "train":
                train.run(config, workdir)
                stop_when_preempted()
            evaluate.run(config, workdir)
            leave()


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
