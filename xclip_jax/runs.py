"""Writes a page over all runs: a sortable table and the training curves, overlaid.

    xclip-jax runs                       # all work directories below runs/
    xclip-jax runs runs/studies --output=studies.html

The page is one file, DIR/index.html by default, with links to the report of each run. The table is
printed, too. Unfinished, failed and corrupted runs are listed with their state.
"""

import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from xclip_jax.cli import (
    CommandParser,
    InputError,
    check_local,
    first_line,
    one_line_errors,
    read_json,
    run_command,
    write_atomically,
)
from xclip_jax.monitor import METRICS_FILE, read_metrics
from xclip_jax.provenance import measure_training, read_record
from xclip_jax.report import DIRECTIONS, METRICS, format_duration, format_setting, render
from xclip_jax.study.runs import FAILED, RESULTS
from xclip_jax.workdir import changed_settings, read_settings

_MARKS = (METRICS_FILE, RESULTS, FAILED, "checkpoints", "train.lock")  # each makes a work directory
_POINTS = 200  # of a curve
_WIDTH = 60  # characters of a run's name in the printed table


@dataclasses.dataclass(kw_only=True)
class RunSummary:
    """The row of a run: `state` is "finished", or why there are no results."""

    name: str
    report: str  # address relative to the page, "" without one
    state: str = "unfinished"
    results: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    record: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of the training
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    changed: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # those shown
    measured: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of metrics.jsonl
    curves: Mapping[str, list] = dataclasses.field(default_factory=dict)  # by title: [step, value]


def find_workdirs(folder: Path) -> Iterator[Path]:
    """Yields the work directories at and below a folder, in order of their paths."""
    visited = set()
    for path, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(path)
        if real in visited:  # a link to a folder that contains it
            folders.clear()
        elif not set(_MARKS).isdisjoint([*files, *folders]):
            folders.clear()
            yield Path(path)
        visited.add(real)
        folders.sort()


def summarize_run(workdir: Path, name: str, page_folder: Path) -> RunSummary:
    """Reads a work directory. What is missing or corrupted is left out, and named by `state`."""
    page = workdir / "report" / "index.html"
    address = quote(os.fsencode(os.path.relpath(page, page_folder))) if page.is_file() else ""
    run = RunSummary(name=name, report=address)
    problems = []

    def read(attribute: str, file: str, load: Callable[[], Any]) -> None:
        try:
            setattr(run, attribute, load())
        except FileNotFoundError:
            pass
        except Exception as error:  # a file of any content
            missing = f"has no entry {error}" if isinstance(error, KeyError) else ""
            reason = missing or first_line(error).removeprefix(f"{workdir / file}: ")
            problems.append(f"{file} is corrupted: {reason}")

    read("results", RESULTS, lambda: _check_results(read_json(workdir / RESULTS)))
    read("settings", "config.json", lambda: read_settings(workdir))
    read("record", "config.json", lambda: _check_record(workdir))
    read("measured", METRICS_FILE, lambda: _check_metrics(workdir))
    read("curves", METRICS_FILE, lambda: read_curves(workdir))
    if run.results:
        run.state = "finished"
    elif (workdir / FAILED).is_file():
        run.state = "failed: " + (workdir / FAILED).read_text(errors="replace").strip()
    run.state = problems[0] if problems else run.state
    return run


def _check_results(results: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the numbers of results.json that are shown, or raises any exception."""
    metrics = {way: {k: float(results[way][k]) for k in METRICS} for way in DIRECTIONS}
    parameters = results.get("provenance", {}).get("parameters")
    names = {key: str(results.get(key, "")) for key in ("dataset", "split")}
    return metrics | names | {"parameters": parameters and int(parameters)}


def _check_record(workdir: Path) -> dict[str, Any]:
    """Returns what config.json says of a training, without what it does not, or raises an error."""
    kinds = {"date": str, "commit": str, "total_steps": int, "parameters": int}
    record = read_record(workdir)
    return {k: kind(record[k]) for k, kind in kinds.items() if record.get(k) is not None}


def _check_metrics(workdir: Path) -> dict[str, Any]:
    """Returns the last step, duration and speed of metrics.jsonl, or raises any exception."""
    steps = [int(line["step"]) for line in read_metrics(workdir)]
    return {"step": max(steps), **measure_training(workdir)} if steps else {}


def read_curves(workdir: Path) -> dict[str, list[list[float]]]:
    """Returns points [step, value] of the loss, and of R@1 on validation by direction.

    Of a long curve, each point is the mean of a few neighbours.
    """
    lines = read_metrics(workdir)
    curves = {
        "loss": [[line["step"], line["train/loss"]] for line in lines if "train/loss" in line]
    }
    for way, title in DIRECTIONS.items():
        key = f"/{way}/R@1"
        values = [(line["step"], v) for line in lines for k, v in line.items() if k.endswith(key)]
        curves[f"validation R@1, {title}"] = [[step, value] for step, value in values]
    return {title: _thin(points) for title, points in curves.items() if points}


def _thin(points: list[list[float]]) -> list[list[float]]:
    array = np.array([point for point in points if all(map(math.isfinite, point))])
    groups = np.array_split(array, min(_POINTS, len(array))) if len(array) else []
    return [group.mean(0).round(4).tolist() for group in groups]


def show_differences(runs: Sequence[RunSummary]) -> None:
    """Sets the settings shown of each run: those unlike the defaults and not the same in all."""
    changed = [changed_settings(run.settings) for run in runs]
    fields = dict.fromkeys(field for one in changed for field in one)
    known = [run.settings for run in runs if run.settings]
    if len(known) > 1:
        fields = [f for f in fields if any(one.get(f) != known[0].get(f) for one in known)]
    for run in runs:
        run.changed = {f: format_setting(run.settings[f]) for f in fields if f in run.settings}


def table_rows(runs: Sequence[RunSummary]) -> list[list[tuple[str, Any]]]:
    """Returns for each run (text, sort key or None) of each column of `COLUMNS`."""
    return [[_cell(value) for value in _row(run)] for run in runs]


COLUMNS = ("data set", "split", *METRICS * 2, "step", "parameters", "pairs/s", "duration")
COLUMNS += ("started", "commit", "settings")
TEXTS = ("data set", "split", "started", "commit", "settings")  # sorted as such, not as numbers


def _row(run: RunSummary) -> list[Any]:
    results, record, measured = run.results, run.record, run.measured
    step, seconds = measured.get("step"), measured.get("seconds")
    total = f" / {total:,}" if (total := record.get("total_steps")) else ""
    parameters = record.get("parameters") or results.get("parameters")
    date, commit = record.get("date") or "", record.get("commit") or ""
    settings = ", ".join(f"{field}={value}" for field, value in run.changed.items())
    return [
        results.get("dataset"),
        results.get("split"),
        *(results[way][k] if results else None for way in DIRECTIONS for k in METRICS),
        ("" if step is None else f"{step:,}{total}", step),
        (f"{parameters:,}", parameters) if parameters else None,
        measured.get("examples_per_second"),
        (format_duration(seconds), seconds),
        date[:16].replace("T", " "),
        commit[:8] + "-dirty" * commit.endswith("-dirty"),
        settings,
    ]


def _cell(value: Any) -> tuple[str, Any]:
    if isinstance(value, tuple):
        return value[0] or "", value[1]
    if isinstance(value, float):
        return f"{value:.1f}", value
    return str(value or ""), value or None


def format_runs(runs: Sequence[RunSummary]) -> str:
    """Returns the main columns of the table as aligned plain text."""
    rows = [("run", *DIRECTIONS.values(), "step", "state")]
    for run in runs:
        recalls = [f"{run.results[way]['R@1']:.1f}" if run.results else "-" for way in DIRECTIONS]
        name = run.name.encode("utf-8", "replace").decode()  # a terminal refuses other names
        name = name if len(name) <= _WIDTH else f"…{name[-_WIDTH + 1 :]}"
        step = str(run.measured.get("step", "-"))
        rows.append((name, *recalls, step, " ".join(run.state.split())[:200]))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *cells, state in rows:
        aligned = [f"{cell:>{width}}" for cell, width in zip(cells, widths[1:-1], strict=True)]
        lines.append("  ".join([f"{name:{widths[0]}}", *aligned, state]).rstrip())
    return "\n".join(["R@1 in percent", *lines])


def write_runs_page(folder: Path, output: Path) -> list[RunSummary]:
    """Writes the page over the runs below a folder and returns them.

    Raises InputError if there are none.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder: pass the folder of the work directories")
    workdirs = list(find_workdirs(folder))
    if not workdirs:
        raise InputError(f"{folder}: no work directory of xclip-jax train or study is below it")
    runs = []
    for workdir in workdirs:
        name = workdir.name if workdir == folder else str(workdir.relative_to(folder))
        runs.append(summarize_run(workdir, name, output.absolute().parent))
    show_differences(runs)
    titles = list(dict.fromkeys(title for run in runs for title in run.curves))
    page = render(
        "runs.html",
        folder=str(folder),
        columns=COLUMNS,
        texts=TEXTS,
        metrics=METRICS,
        directions=DIRECTIONS,
        rows=list(zip(runs, table_rows(runs), strict=True)),
        titles=titles,
        curves=[{"name": run.name, "curves": run.curves} for run in runs],
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(output, page.encode("utf-8", "replace"))
    return runs


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = CommandParser(prog="python -m xclip_jax.runs", description=__doc__)
    add = parser.add_argument
    add("folder", nargs="?", default="runs", metavar="DIR", help="folder of runs (default runs)")
    add("--output", help="file of the page (default DIR/index.html)")
    with one_line_errors():
        arguments = parser.parse_args(argv)
        folder = check_local("DIR", arguments.folder)
        output = check_local("--output", arguments.output or folder / "index.html")
        if output.is_dir():
            raise InputError(f"--output={output}: is a folder; name a file")
        print(f"{format_runs(write_runs_page(folder, output))}\n\nruns: {output}")


if __name__ == "__main__":
    run_command(main)
