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

import logging
import os
import shlex
import signal
import sys
from pathlib import Path

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from xclip_jax import prepare
from xclip_jax.cli import InputError, one_line_errors, parse_flags, run_command
from xclip_jax.config import validate
from xclip_jax.distributed import PREEMPTED
from xclip_jax.study.plan import plan
from xclip_jax.study.report import write_study
from xclip_jax.study.runs import work_off
from xclip_jax.study.spec import load_studies

_STUDY = flags.DEFINE_multi_string(
    "study", None, "A file of configs/studies/, or a pattern in quotes; may be repeated."
)
_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "What the variants change: a file of configs/, and --config.a.b=value."
)
_SEEDS = flags.DEFINE_integer("seeds", 1, "Runs of each variant, with seeds from config.seed on.")
_ONLY = flags.DEFINE_multi_string("only", [], "Run this variant alone; may be repeated.")
_OUTPUT = flags.DEFINE_string(
    "output", None, "Where runs and report go; default runs/studies/NAME_OF_CONFIG."
)
_PRINT = flags.DEFINE_bool(
    "print_commands", False, "Print the command of each run that is not finished, and run none."
)
_REPORT = flags.DEFINE_bool("report_only", False, "Make the report of what is there; run none.")


def main(argv):
    """Plans, runs and reports."""
    absl_logging.set_verbosity(absl_logging.WARNING)
    logging.captureWarnings(True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(PREEMPTED))
    with one_line_errors():
        if argv[1:]:
            raise InputError(f"{' '.join(argv[1:])}: every option starts with --, see --help")
        if _SEEDS.value < 1:
            raise InputError(f"--seeds={_SEEDS.value}: must be at least 1")
        base = _CONFIG.value
        validate(base)
        prepare.render_if_missing(base)
        studies = load_studies(_STUDY.value, base)
        output = Path(_OUTPUT.value or f"runs/studies/{base.name}")
        file = flags.FLAGS["config"]
        given = config_flags.get_override_values(file)
        path = config_flags.get_config_filename(file)
        planned = plan(studies, path, base, given, _SEEDS.value, output)
        for run in {id(run): run for runs in planned.values() for run in runs}.values():
            run.check()
        chosen = _chosen(studies, planned)
        if _PRINT.value:
            _print_commands(chosen)
        elif not _work_off(studies, planned, [] if _REPORT.value else chosen, output):
            sys.exit(1)


def _chosen(studies, planned):
    """The runs of --only's variants, first seeds first, each once."""
    names = list(dict.fromkeys(name for study in studies.values() for name in study.variants))
    unknown = [name for name in _ONLY.value if name not in names]
    if unknown:
        raise InputError(f"--only={unknown[0]}: no such variant, there are {', '.join(names)}")
    wanted = [runs for (_, name), runs in planned.items() if name in (_ONLY.value or names)]
    ordered = (runs[k] for k in range(_SEEDS.value) for runs in wanted)
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
    flags.mark_flags_as_required(["study", "config"])
    run_command(lambda: app.run(main, flags_parser=parse_flags))
