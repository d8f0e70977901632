"""Repeats an experiment of the paper, or one of your own, and makes its table and chart.

    python -m xclip_jax.study --study=configs/studies/table9.py --config=configs/demo.py:study
    python -m xclip_jax.study --study='configs/studies/*.py' --config=configs/msrvtt.py --seeds=3
    python -m xclip_jax.study --study=configs/studies/table6.py --config=... --print_commands

Each variant and seed is a run of xclip_jax.main in OUTPUT/runs/; the same command again goes on
with what is not finished and tries again what failed. The tables, as Markdown, LaTeX and CSV, and
the charts are in OUTPUT/report/, index.html shows them all. The same command started twice, each on
a device of its own, shares the runs out; --print_commands lists them for a cluster's job array,
--report_only makes the report of what it has done.
How to write a study: docs/studies.md.
"""

import argparse
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from xclip_jax import prepare
from xclip_jax.cli import (
    CommandParser,
    InputError,
    one_line_errors,
    parse_with_config,
    run_command,
)
from xclip_jax.config import validate
from xclip_jax.distributed import PREEMPTED
from xclip_jax.study.plan import plan
from xclip_jax.study.report import write_study
from xclip_jax.study.runs import work_off
from xclip_jax.study.spec import load_studies


def _parser() -> CommandParser:
    parser = CommandParser(prog="python -m xclip_jax.study", description=__doc__)
    add = parser.add_argument
    text = "a file of configs/studies/, or a pattern in quotes; may be repeated"
    add("--study", action="append", required=True, help=text)
    text = "number of runs of each variant, with seeds from config.seed on (default 1)"
    add("--seeds", type=int, default=1, help=text)
    add("--only", action="append", default=[], help="run only this variant; may be repeated")
    add("--output", help="folder of runs and report (default runs/studies/CONFIG_NAME)")
    text = "print the commands of the unfinished runs instead of running them"
    add("--print_commands", action="store_true", help=text)
    add("--report_only", action="store_true", help="write the report of finished runs; run none")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(PREEMPTED))
    with one_line_errors():
        arguments, base, overrides = parse_with_config(_parser(), argv)
        if arguments.seeds < 1:
            raise InputError(f"--seeds={arguments.seeds}: must be at least 1")
        validate(base)
        prepare.render_if_missing(base)
        studies = load_studies(arguments.study, base)
        output = Path(arguments.output or f"runs/studies/{base.name}")
        planned = plan(studies, arguments.config, base, overrides, arguments.seeds, output)
        for run in {id(run): run for runs in planned.values() for run in runs}.values():
            run.check()
        chosen = _chosen(studies, planned, arguments)
        if arguments.print_commands:
            _print_commands(chosen)
        elif not _work_off(studies, planned, [] if arguments.report_only else chosen, output):
            sys.exit(1)


def _chosen(studies, planned, arguments: argparse.Namespace):
    """The runs of --only's variants, first seeds first, each once."""
    names = list(dict.fromkeys(name for study in studies.values() for name in study.variants))
    unknown = [name for name in arguments.only if name not in names]
    if unknown:
        raise InputError(f"--only={unknown[0]}: no such variant, there are {', '.join(names)}")
    wanted = [runs for (_, name), runs in planned.items() if name in (arguments.only or names)]
    ordered = (runs[k] for k in range(arguments.seeds) for runs in wanted)
    return list({run.workdir: run for run in ordered}.values())


def _print_commands(runs):
    for run in runs:
        if run.results() is None:
            print(shlex.join(["python", "-m", "xclip_jax.main", *run.arguments]))


def _work_off(studies, planned, chosen, output):
    """Runs what is left and reports after each run; returns whether all went well."""
    # The seeds of a variant are one program: it is compiled once.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str((output / "compiled").absolute()))

    def report(run=None):
        for name, study in studies.items():
            runs = {variant: planned[name, variant] for variant in study.variants}
            if run is None or any(run in of_seeds for of_seeds in runs.values()):
                write_study(output / "report", name, study, runs)

    report()
    work_off(chosen, report)
    for name in studies:
        print(f"\n{(output / 'report' / f'{name}.md').read_text()}")
    print(f"report: {output / 'report' / 'index.html'}")
    return all(run.results() is not None for run in chosen)


if __name__ == "__main__":
    run_command(main)
