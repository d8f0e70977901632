"""Plans and executes the runs of studies, each in a work directory of xclip_jax.main."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import operator
import re
import signal
import sys
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from ml_collections import ConfigDict
from tqdm import tqdm

from xclip_jax.cli import InputError, progress
from xclip_jax.config import validate
from xclip_jax.data.builder import Dataset
from xclip_jax.evaluate import RANKS_FILE
from xclip_jax.models import read_model_config
from xclip_jax.monitor import read_metrics
from xclip_jax.report import DIRECTIONS
from xclip_jax.study import Study
from xclip_jax.workdir import check_same_run, plain_fields
from xclip_jax.workers import start_module

# Files of a work directory.
RESULTS = "results.json"
FAILED = "failed.txt"  # why the last attempt failed
MAX_FOLDER_NAME = 150
POLL_SECONDS = 1
Plan = dict[tuple[str, str], list["Run"]]  # by study and variant, one for each seed

_open_dataset = functools.cache(Dataset)


@dataclasses.dataclass(kw_only=True, eq=False)
class Run:
    """A training of one variant with one seed."""

    name: str  # study, variant and seed, of the first study if several share the run
    config_file: str  # as on the command line
    workdir: Path
    config: Any  # all fields
    fields: dict[str, Any]  # those on its command line
    evaluation: dict[str, Any] = dataclasses.field(default_factory=dict)  # {"eval.qb_norm": 5}

    @property
    def arguments(self) -> list[str]:
        """Arguments of `python -m xclip_jax.main`."""
        fields = {**self.fields, **self.evaluation}.items()
        options = [f"--config.{field}={value}" for field, value in fields]
        return [f"--config={self.config_file}", f"--workdir={self.workdir}", *options]

    def check_workdir(self) -> None:
        """Raises InputError if the work directory belongs to a run with another config."""
        try:
            json.loads((self.workdir / "config.json").read_text())
        except (OSError, ValueError):
            return  # not started; a corrupted file is reported by the run itself
        dataset = _open_dataset(self.config.data.path)
        check_same_run(self.workdir, self.config, dataset, option="--output")

    def load_ranks(self) -> dict[str, np.ndarray] | None:
        """Returns the arrays of ranks.npz, or None if the run is unfinished or a file corrupted."""
        try:
            evaluation = json.loads((self.workdir / RESULTS).read_text())["eval"]
            with np.load(self.workdir / RANKS_FILE) as file:
                ranks = dict(file)
        except (OSError, ValueError, EOFError, KeyError, TypeError, zipfile.BadZipFile):
            return None
        current = {field: evaluation.get(field.removeprefix("eval.")) for field in self.evaluation}
        return ranks if current == self.evaluation else None

    def why_missing(self) -> str:
        """Returns why an unfinished run has no results."""
        path = self.workdir / FAILED
        return f"failed: {path.read_text()}" if path.is_file() else "not run yet"


def plan_runs(studies: Mapping[str, Study], base: Run, num_seeds: int) -> Plan:
    """Returns the runs of every (study, variant), one for each seed from that of `base` on.

    Variants with the same training share their runs, within a study and between studies. `base` is
    the run that they change: its `config` has the `fields` of the command line applied, its
    `workdir` is the folder of all runs. Raises InputError if a variant changes an unknown field or
    uses a wrong type, or two variants need different test-time options of the same run.
    """
    by_folder, planned = {}, {}
    for study_name, study in studies.items():
        for name, variant in study.variants.items():
            where = f"--study={study_name}, variant {name!r}"
            effective = _effective_overrides(base.config, variant.overrides, where)
            training = {k: v for k, v in effective.items() if not k.startswith("eval.")}
            planned[study_name, name] = []
            for seed in range(base.config.seed, base.config.seed + num_seeds):
                fields = {**base.fields, **training, "seed": seed}
                run = Run(
                    name=f"{study_name}: {name}, seed {seed}",
                    config_file=base.config_file,
                    workdir=base.workdir / folder_name(training) / f"seed{seed}",
                    config=_apply_overrides(base.config, fields, where),
                    fields=fields,
                )
                run = by_folder.setdefault(run.workdir, run)
                planned[study_name, name].append(run)
                for field in effective.keys() - training:
                    value = effective[field]
                    if (other := run.evaluation.setdefault(field, value)) != value:
                        raise InputError(
                            f"{where}: config.{field} = {value!r}, but {other!r} in a variant "
                            "with the same training: run one of them with another --output"
                        )
    return planned


def _apply_overrides(config: Any, overrides: Mapping[str, Any], where: str) -> Any:
    """Returns a copy of a config with some fields changed, checked against their types."""
    config = ConfigDict(config.to_dict(), convert_dict=True).lock()
    for field, value in overrides.items():
        try:
            if isinstance(value, Mapping):
                raise TypeError(f"is a group of fields: write {field}.NAME")
            config.update_from_flattened_dict({field: value})
        except (KeyError, TypeError) as error:
            reason = " ".join(str(error.args[0]).split())
            raise InputError(f"{where}: config.{field} = {value!r}: {reason}") from None
    return config


def _effective_overrides(base: Any, overrides: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Returns the overrides without those that have no effect on the base config.

    An invalid config keeps all of them, and its run reports the error.
    """
    if "seed" in overrides:
        raise InputError(f"{where}: seeds are set by --seeds and --config.seed")

    def resolve(config: Any) -> dict[str, Any]:
        plain = plain_fields(config)
        return {**plain, "model": read_model_config(plain["model"])}  # with the preset's fields

    changed = _apply_overrides(base, overrides, where)
    effective = {field: operator.attrgetter(field)(changed) for field in overrides}
    with contextlib.suppress(InputError):
        validate(changed)
        for field in overrides:
            rest = {other: value for other, value in effective.items() if other != field}
            if resolve(_apply_overrides(base, rest, where)) == resolve(changed):
                effective = rest
    return effective


def folder_name(overrides: Mapping[str, Any]) -> str:
    """Returns a folder name unique to the overrides: "base", "model.tau=0.1"."""
    texts = {k: "+".join(v) if isinstance(v, tuple) else v for k, v in overrides.items()}
    exact = ",".join(f"{field}={texts[field]}" for field in sorted(texts)) or "base"
    name = re.sub(r"[^\w.+=,-]+", "_", exact)
    if name == exact and len(name) <= MAX_FOLDER_NAME:
        return name
    return f"{name[:MAX_FOLDER_NAME]}~{hashlib.sha256(exact.encode()).hexdigest()[:8]}"


def execute_runs(runs: Sequence[Run], report: Callable[[Run], None]) -> None:
    """Executes the unfinished runs, one at a time, and calls `report(run)` after each.

    Several processes can do so at the same time: a run that one executes is skipped by the others.
    If a run fails, the reason is written to its work directory, and the other runs continue.
    """
    start = time.time()
    pending = [run for run in runs if run.load_ranks() is None]
    with progress(len(runs), "runs", "run", initial=len(runs) - len(pending)) as bar:
        while pending:
            before = len(pending)
            for run in list(pending):
                run.workdir.mkdir(parents=True, exist_ok=True)
                with contextlib.suppress(Timeout), FileLock(run.workdir / "run.lock", timeout=0):
                    _finish_run(run, start, bar)
                    pending.remove(run)
                    bar.update()
                    report(run)
            if len(pending) == before:
                status = f"{before} under way in another process"
                bar.set_postfix_str(status, refresh=sys.stderr.isatty())
                time.sleep(POLL_SECONDS)


def _finish_run(run: Run, start: float, bar: tqdm) -> None:
    """Executes a run unless it has ended after `start`, and prints its results or its failure."""
    failed = run.workdir / FAILED
    if run.load_ranks() is not None or (failed.is_file() and failed.stat().st_mtime > start):
        return
    failed.unlink(missing_ok=True)
    log = run.workdir / "log.txt"  # output of all attempts
    log.touch()
    log_start = log.stat().st_size
    process = start_module("xclip_jax.main", run.arguments, log)
    try:
        while process.exitcode is None:
            process.join(POLL_SECONDS)
            steps = [0, *(line["step"] for line in read_metrics(run.workdir))]
            bar.set_postfix_str(f"{run.name}, step {steps[-1]}", refresh=sys.stderr.isatty())
    finally:
        if process.exitcode is None:  # this process is ending: the run saves, to be resumed later
            process.terminate()
            process.join()
    if process.exitcode == 0 and run.load_ranks() is not None:
        results = json.loads((run.workdir / RESULTS).read_text())
        recalls = " / ".join(f"{results[way]['R@1']:.1f}" for way in DIRECTIONS)
        bar.write(f"{run.name}: R@1 {recalls}")
    else:
        output = log.read_bytes()[log_start:].decode(errors="replace")
        failed.write_text(failure_reason(process.exitcode, output))
        bar.write(f"{run.name}: failed: {failed.read_text()}")


def failure_reason(exit_status: int | None, output: str) -> str:
    """Returns why a run failed: its signal, its last error line, its last line, or its status."""
    if exit_status and exit_status < 0:
        name = signal.Signals(-exit_status).name
        return f"ended by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    lines = [line.strip() for line in re.split(r"[\r\n]+", output) if line.strip()]
    errors = [line for line in lines if re.match(r"error: |[\w.]+(Error|Exception)\b", line)]
    return (errors or lines or [f"exit status {exit_status}"])[-1].removeprefix("error: ")
