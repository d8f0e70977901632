"""Trains a model and evaluates it: retrieval metrics in both directions and a report.

    python -m xclip_jax.main --config=configs/demo.py
    python -m xclip_jax.main --config=configs/captions.py --config.data.path=data/mine
    python -m xclip_jax.main --config=configs/msrvtt.py:vit_b16,official
    python -m xclip_jax.main --config=configs/demo.py --config.mode=eval

--config.a.b=value sets any field of xclip_jax/config.py. Repeating a command resumes its run.
On SIGTERM the program saves a checkpoint and exits with status 75. Several processes train as one:
Cloud TPU, GKE and SLURM are detected, elsewhere use --coordinator.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from xclip_jax import compile_only, distributed, evaluate, prepare, train
from xclip_jax.allocator import use_huge_pages
from xclip_jax.cli import (
    CommandParser,
    InputError,
    check_local,
    first_line,
    one_line_errors,
    parse_with_config,
    run_command,
)
from xclip_jax.initialization import adopt_encoders
from xclip_jax.workdir import ignored_settings


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = CommandParser(prog="python -m xclip_jax.main", description=__doc__)
    add = parser.add_argument
    add("--workdir", help="folder of checkpoints, metrics and report (default runs/CONFIG_NAME)")
    add("--coordinator", metavar="HOST:PORT", help="address of process 0")
    add("--num_processes", type=int, help="with --coordinator: number of processes")
    add("--process_id", type=int, help="with --coordinator: index of this process, from 0")
    text = "compile the training step and print its memory, work and communication"
    add("--compile_only", action="store_true", help=text)
    add("--topology", default="", help="with --compile_only: a TPU slice, v6e:2x4 (needs libtpu)")
    with one_line_errors():
        arguments, config, fields = parse_with_config(parser, argv)
        adopt_encoders(config, fields)
        if arguments.compile_only:
            compile_only.compile_only(config, arguments.topology)
            return
        if arguments.topology:
            raise InputError("--topology requires --compile_only")
        distributed.connect(arguments.coordinator, arguments.num_processes, arguments.process_id)
        try:
            jax.devices()
        except RuntimeError as error:  # for example, a TPU serves one process at a time
            reason = f"{first_line(error)}: does another process use them?"
            raise InputError(f"the devices cannot be used: {reason}") from None
        if jax.process_count() == 1 or config.mode == "eval":
            distributed.stop_when_preempted()
        workdir = check_local("--workdir", arguments.workdir or f"runs/{config.name}")
        if distributed.is_first_process():
            prepare.render_if_missing(config)
        distributed.wait_for_all("the demo's data")
        try:
            if config.mode == "train":
                train.train(config, workdir)
                distributed.stop_when_preempted()
            elif ignored := ignored_settings(Path(workdir), config):
                names = ", ".join(ignored)
                distributed.print_once(f"note: without effect in an evaluation: {names}")
            evaluate.evaluate(config, workdir)
            distributed.shutdown()
        except jax.errors.JaxRuntimeError:
            if jax.process_count() > 1:
                name = f"process {jax.process_index()} of {jax.process_count()}"
                advice = "restart all processes; training resumes from the last checkpoint"
                print(f"{name} failed or lost a peer: {advice}", file=sys.stderr)
            raise


if __name__ == "__main__":
    use_huge_pages()
    run_command(main)
