"""The runs of a study: each an ordinary work directory of xclip_jax.main, shared by all studies."""

import contextlib
import dataclasses
import functools
import json
import re
import signal
import time
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout
from ml_collections import ConfigDict

from xclip_jax.config import FREE_FIELDS, field_value
from xclip_jax.data.builder import Dataset
from xclip_jax.errors import InputError
from xclip_jax.evaluate import RANKS
from xclip_jax.models import resolve
from xclip_jax.progress import progress
from xclip_jax.report.table import DIRECTIONS
from xclip_jax.workdir import check_same_run, is_below
from xclip_jax.workers import start_module
from xclip_jax.writer import read_metrics

RESULTS = "results.json"
FAILED = "failed.txt"  # in a work directory: why its last try failed
LOG = "log.txt"  # and what it printed
POLL_SECONDS = 1


@dataclasses.dataclass
class Run:
    """One training of one variant with one seed.

    Attributes:
        config_file: as on the command line.
        workdir: its work directory.
        config: its config, complete.
        overrides: {field: value} of its command line.
        options: test-time options that its results must have, see Variant.
    """

    config_file: str
    workdir: Path
    config: ConfigDict
    overrides: dict
    options: set[str] = dataclasses.field(default_factory=set)

    @property
    def arguments(self):
        """What follows `python -m xclip_jax.main`."""
        fields = [f"--config.{field}={value}" for field, value in self.overrides.items()]
        return [f"--config={self.config_file}", f"--workdir={self.workdir}", *fields]

    def results(self):
        """{name as in ranks.npz: 2 x Q}, or None where the run is not finished.

        Raises:
            InputError: the directory holds a run of another config.
        """
        if not all((self.workdir / name).is_file() for name in (RESULTS, RANKS)):
            return None
        config = self.config
        check_same_run(self.workdir, config, _dataset(config.data.path))
        with np.load(self.workdir / RANKS) as file:
            ranks = dict(file)
        return ranks if all(find_option(ranks, option) for option in self.options) else None

    def failure(self):
        """Why the last try failed; None if it did not."""
        path = self.workdir / FAILED
        return path.read_text() if path.is_file() else None


_dataset = functools.cache(Dataset)


def find_option(ranks, option):
    """{direction: 2 x Q} of a test-time option (its name's beginning), or of "": plain."""
    found = {}
    for name, counts in ranks.items():
        prefix, _, way = name.rpartition("/")
        if prefix.startswith(option) if option else not prefix:
            found[way] = counts
    return found


def plan(studies, config_file, base, given, seeds, output):
    """The runs of studies: {(study, variant): [Run of each seed]}.

    Variants that train the same thing share their runs, whatever study they are of.

    Args:
        studies: {name: Study}.
        config_file: on the command line, with the words after its colon.
        base: the config that it and `given` make.
        given: {field: value} of its overrides, which every run repeats.
        seeds: how many.
        output: folder of all.

    Raises:
        InputError: a variant changes a field that there is not, or to a value of another type.
    """
    by_folder, planned = {}, {}
    for study_name, study in studies.items():
        for name, variant in study.variants.items():
            where = f"--study={study_name}, variant {name!r}"
            overrides = _effective(base, variant.overrides, where)
            folder = output / "runs" / slug(overrides)
            runs = []
            for seed in range(base.seed, base.seed + seeds):
                together = {**given, **overrides, "seed": seed}
                config = _changed(base, together, where)
                run = Run(config_file, folder / f"seed{seed}", config, together)
                run = by_folder.setdefault(run.workdir, run)
                run.overrides |= {k: v for k, v in overrides.items() if is_below(k, "eval")}
                run.options |= {variant.option} - {""}
                runs.append(run)
            planned[study_name, name] = runs
    return planned


def _changed(config, overrides, where):
    config = ConfigDict(config.to_dict(), convert_dict=True).lock()
    for field, value in overrides.items():
        group, _, name = field.rpartition(".")
        try:
            setattr(field_value(config, group) if group else config, name, value)
        except (AttributeError, KeyError, TypeError) as error:
            reason = " ".join(str(error.args[0] if error.args else error).split())
            raise InputError(f"{where}: config.{field} = {value!r}: {reason}") from None
    return config


def _effective(base, overrides, where):
    """Those overrides that change anything: one that repeats the base's value is left out."""
    kept = dict(overrides)
    for field in overrides:
        without = {other: value for other, value in kept.items() if other != field}
        if _meaning(_changed(base, kept, where)) == _meaning(_changed(base, without, where)):
            kept = without
    return kept


def _meaning(config):
    """A config with what the preset and the head say filled in."""
    plain = json.loads(config.to_json())
    return {**plain, "model": resolve(plain["model"])}


def slug(overrides):
    """A folder's name for overrides: base, model.tau=0.1; without what changes no training."""
    parts = []
    for field, value in sorted(overrides.items()):
        if not any(is_below(field, free) for free in FREE_FIELDS):
            text = "+".join(value) if isinstance(value, tuple) else str(value)
            parts.append(re.sub(r"[^\w.+=-]+", "_", f"{field}={text}"))
    return ",".join(parts) or "base"


def work_off(runs, done):
    """Runs what is not finished, one at a time, and calls `done(run)` after each.

    Several processes may do so side by side: a run that another one has under way is left to it.
    One that fails leaves its reason in its work directory, and the others go on.
    """
    start = time.time()
    todo = [run for run in runs if run.results() is None]
    with progress(len(runs), "runs", "run", initial=len(runs) - len(todo)) as bar:
        while todo:
            before = len(todo)
            for run in list(todo):
                if _try(run, start, bar):
                    todo.remove(run)
                    bar.update()
                    done(run)
            if len(todo) == before:
                _show(bar, f"{before} under way in another process")
                time.sleep(POLL_SECONDS)


def _try(run, start, bar):
    """Whether the run came to an end, here or in another process since `start`."""
    run.workdir.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(Timeout), FileLock(run.workdir / "run.lock", timeout=0):
        failed = run.workdir / FAILED
        ended = failed.is_file() and failed.stat().st_mtime > start
        if not ended and run.results() is None:
            failed.unlink(missing_ok=True)
            reason = _execute(run, bar)
            if reason:
                failed.write_text(reason)
            bar.write(f"{_name(run)}: " + (f"failed: {reason}" if reason else _recalls(run)))
        return True
    return False


def _execute(run, bar):
    """Trains and evaluates; returns why it failed, None if it did not."""
    log = run.workdir / LOG
    log.touch()
    printed_before = log.stat().st_size
    process = start_module("xclip_jax.main", run.arguments, log)
    try:
        while process.exitcode is None:
            process.join(POLL_SECONDS)
            lines = read_metrics(run.workdir)
            _show(bar, f"{_name(run)}, step {lines[-1]['step'] if lines else 0}")
    finally:
        if process.exitcode is None:  # this process is told to end: the run saves and goes on later
            process.terminate()
            process.join()
    if process.exitcode == 0:
        return None if run.results() is not None else f"its results lack {', '.join(run.options)}"
    return _reason(process.exitcode, log.read_bytes()[printed_before:].decode(errors="replace"))


def _reason(status, printed):
    """Why a process ended, from its exit status and what it printed."""
    lines = [line.strip() for line in re.split(r"[\r\n]+", printed) if line.strip()]
    if status < 0:
        name = signal.Signals(-status).name
        return f"ended by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    errors = [line for line in lines if re.match(r"error: |[\w.]+(Error|Exception)\b", line)]
    return (errors or lines or [f"exit status {status}"])[-1].removeprefix("error: ")


def _recalls(run):
    results = json.loads((run.workdir / RESULTS).read_text())
    numbers = " / ".join(f"{results[way]['R@1']:.1f}" for way, _ in DIRECTIONS)
    return f"R@1 {numbers}"


def _name(run):
    return f"{run.workdir.parent.name} {run.workdir.name}"


def _show(bar, text):
    bar.set_postfix_str(text, refresh=False)
    bar.refresh()
