"""Trains the variants of a study, such as a table of the paper, and writes a table and a chart.

    python -m xclip_jax.study --study=configs/studies/table9.py --config=configs/demo.py:study
    python -m xclip_jax.study --study='configs/studies/*.py' --config=configs/msrvtt.py --seeds=3
    python -m xclip_jax.study --study=configs/studies/table6.py --config=... --print_commands

Each variant and seed is a run of xclip_jax.main in OUTPUT/runs/. The same command resumes
unfinished runs and retries failed ones. Tables (Markdown, LaTeX, CSV) and charts are in
OUTPUT/report/, with all of them in index.html. Started on several devices, the same command
divides the runs between them. --print_commands lists the runs for a cluster's job array, and
--report_only writes the report of the finished ones.
How to write a study: docs/studies.md.
"""

import itertools
import os
import shlex
import signal
import sys
from collections.abc import Sequence

from xclip_jax import prepare
from xclip_jax.allocator import use_huge_pages
from xclip_jax.cli import (
    CommandParser,
    InputError,
    check_local,
    one_line_errors,
    parse_with_config,
    run_command,
)
from xclip_jax.distributed import PREEMPTED
from xclip_jax.initialization import adopt_encoders
from xclip_jax.study import load_studies
from xclip_jax.study.report import write_study
from xclip_jax.study.runs import Run, execute_runs, plan_runs


def _parser() -> CommandParser:
    parser = CommandParser(prog="python -m xclip_jax.study", description=__doc__)
    add = parser.add_argument
    add("--study", action="append", required=True, help="file or quoted pattern; may be repeated")
    add("--seeds", type=int, default=1, help="runs per variant, from config.seed on (default 1)")
    add("--only", action="append", default=[], help="run only this variant; may be repeated")
    add("--output", help="folder of runs and report (default runs/studies/CONFIG_NAME)")
    add("--print_commands", action="store_true", help="print the unfinished runs' commands only")
    add("--report_only", action="store_true", help="write the report of finished runs; run none")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(PREEMPTED))
    with one_line_errors():
        arguments, base, overrides = parse_with_config(_parser(), argv)
        if arguments.seeds < 1:
            raise InputError(f"--seeds={arguments.seeds}: must be at least 1")
        adopt_encoders(base, overrides)
        if not (arguments.report_only or arguments.print_commands):
            prepare.render_if_missing(base)
        studies = load_studies(arguments.study, base)
        output = check_local("--output", arguments.output or f"runs/studies/{base.name}")
        run = Run(
            name=base.name,
            config_file=arguments.config,
            workdir=output / "runs",
            config=base,
            fields=overrides,
        )
        planned = plan_runs(studies, run, arguments.seeds)
        known = list(dict.fromkeys(name for _, name in planned))
        for name in arguments.only:
            if name not in known:
                raise InputError(f"--only={name}: no such variant, choose from {', '.join(known)}")
        for run in itertools.chain(*planned.values()):
            run.check_workdir()
        chosen = [runs for (_, name), runs in planned.items() if name in (arguments.only or known)]
        selected = list(dict.fromkeys(itertools.chain(*zip(*chosen, strict=True))))  # seed by seed
        if arguments.print_commands:
            for run in selected:
                if run.load_ranks() is None:
                    print(shlex.join(["python", "-m", "xclip_jax.main", *run.arguments]))
            return
        # The seeds of a variant share a program, compiled once.
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str((output / "compiled").absolute()))
        reports = output / "report"

        def report(finished: Run | None = None) -> None:
            for name, study in studies.items():
                runs = {variant: planned[name, variant] for variant in study.variants}
                if finished is None or any(finished in of_variant for of_variant in runs.values()):
                    write_study(reports, name, study, runs)

        report()
        if not arguments.report_only:
            execute_runs(selected, report)
        for name in studies:
            print(f"\n{(reports / f'{name}.md').read_text()}")
        print(f"report: {reports / 'index.html'}")
        if not arguments.report_only and any(run.load_ranks() is None for run in selected):
            sys.exit(1)


if __name__ == "__main__":
    use_huge_pages()  # its runs are worker processes
    run_command(main)
