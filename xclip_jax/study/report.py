"""Writes the report of studies: tables as Markdown, LaTeX, CSV and JSON, charts, and a page."""

import contextlib
import csv
import io
import itertools
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup

from xclip_jax.report import DIRECTIONS, render
from xclip_jax.study import Study
from xclip_jax.study.chart import draw_chart
from xclip_jax.study.runs import Run
from xclip_jax.study.table import (
    STUDY_METRICS,
    Row,
    Stat,
    Table,
    make_table,
    table_from_json,
    table_to_json,
)

_ARROWS = ("t→v", "v→t")  # of DIRECTIONS


def write_study(
    directory: Path, name: str, study: Study, runs: Mapping[str, Sequence[Run]]
) -> None:
    """Writes NAME.md, .tex, .csv, .png and .json, and an index.html of all studies in the folder.

    `runs` are those of each variant, one for each seed. Unfinished ones are listed as missing.
    """
    directory.mkdir(parents=True, exist_ok=True)
    table = make_table(study, runs)
    _write_atomically(directory / f"{name}.md", format_markdown(table))
    _write_atomically(directory / f"{name}.tex", format_latex(table, name))
    _write_atomically(directory / f"{name}.csv", format_csv(table))
    picture = directory / f"{name}.png.{os.getpid()}.part"
    draw_chart(table, picture)
    os.replace(picture, directory / f"{name}.png")
    _write_atomically(directory / f"{name}.json", table_to_json(table))
    tables = {}
    for path in sorted(directory.glob("*.json")):
        with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError):  # another JSON
            tables[path.stem] = table_from_json(path.read_text(encoding="utf-8"))
    _write_atomically(directory / "index.html", format_html(tables))


def _write_atomically(path: Path, text: str) -> None:
    """Writes a file atomically, since another process may write it at the same time."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


class Grid(NamedTuple):
    """One of a study's two printed tables."""

    labels: tuple[str, ...]  # headings of the first columns
    columns: tuple[str, ...]  # headings below each of the two directions
    last: tuple[str, ...]  # headings after both directions
    rows: list[tuple[Row, list[str]]]  # each with its cells, none if the row has no results


def metric_grid(table: Table, bold: Callable[[str], str]) -> Grid:
    """Returns means ± standard deviations in the paper's layout, with the best means in bold."""
    columns = []
    for way, metric in itertools.product(DIRECTIONS, STUDY_METRICS):
        stats = [row.stats.get(way, {}).get(metric) for row in table.rows]
        means = [round(stat.mean, 1) for stat in stats if stat]
        best = (min if metric == "MnR" else max)(means, default=None)
        columns.append([_format_mean(stat, best, bold) for stat in stats])
    if table.has_paper:
        columns.append([f"{row.paper:.1f}" if row.paper else "" for row in table.rows])
    cells = map(list, zip(*columns, strict=True))
    rows = [(row, c if row.stats else []) for row, c in zip(table.rows, cells, strict=True)]
    return Grid(table.columns, STUDY_METRICS, ("paper",) if table.has_paper else (), rows)


def _format_mean(stat: Stat | None, best: float | None, bold: Callable[[str], str]) -> str:
    if stat is None:
        return ""
    mean = f"{stat.mean:.1f}"
    mean = bold(mean) if round(stat.mean, 1) == best else mean
    return mean if stat.std is None else mean + f" ± {stat.std:.1f}"


def interval_grid(table: Table) -> Grid:
    """Returns the intervals of R@1 and of its differences to the reference."""
    rows = []
    for row in table.rows:
        cells = []
        for way in DIRECTIONS:
            stat, d = row.stats.get(way, {}).get("R@1"), row.differences.get(way)
            difference = f"{d.mean:+.1f} ({d.low:+.1f} to {d.high:+.1f})" if d else ""
            interval = f"{stat.low:.1f} to {stat.high:.1f}" if stat else ""
            cells += [interval, difference.replace("-", "−")]
        rows.append((row, cells))
    return Grid(table.columns, ("R@1, 95 %", f"minus “{table.reference}”, 95 %"), (), rows)


def legend(table: Table) -> str:
    """Returns a few sentences that explain the numbers."""
    seeds = max(list(row.seeds.values()).count(None) for row in table.rows)
    spread = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
    over = "test videos and seeds" if seeds > 1 else "test videos alone"
    sentences = [
        f"{table.facts}; {spread}; R@K in percent, MnR the mean rank, the best mean in bold.",
        "Intervals: of R@1 by resampling the test videos with their queries, of differences over "
        f"{over}.",
    ]
    if table.has_paper:
        sentences.append("paper: R@1 text to video that X-CLIP reports for MSR-VTT, not ours.")
    return " ".join([*sentences, *([table.note] if table.note else [])])


def list_problems(table: Table) -> list[str]:
    """Returns a sentence for each row that lacks the results of some seeds."""
    return [f"{row.name}: {row.problem}" for row in table.rows if row.stats and row.problem]


def format_html(tables: Mapping[str, Table]) -> str:
    """Returns the page of all studies, given their tables by file name."""
    studies = [
        {
            "name": name,
            "title": table.title,
            "legend": legend(table),
            "problems": list_problems(table),
            "metrics": metric_grid(table, Markup("<b>{}</b>").format),
            "intervals": interval_grid(table),
        }
        for name, table in tables.items()
    ]
    return render("studies.html", studies=studies, directions=DIRECTIONS)


def format_markdown(table: Table) -> str:
    """Returns both tables with their columns aligned, the legend, and the missing seeds."""
    parts = [
        f"### {table.title}",
        _markdown_table(metric_grid(table, "**{}**".format)),
        _markdown_table(interval_grid(table)),
        legend(table),
        "\n".join(f"- {_escape_markdown(problem)}" for problem in list_problems(table)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _escape_markdown(text: str) -> str:
    return re.sub(r"([\\`*<>|])", r"\\\1", text.replace("\n", " "))


def _markdown_table(grid: Grid) -> str:
    """Returns a Markdown table with aligned columns, except in rows without results."""
    both = [f"{arrow} {name}" for arrow in _ARROWS for name in grid.columns]
    lines = [[*grid.labels, *both, *grid.last]]
    for row, cells in grid.rows:
        labels = map(_escape_markdown, row.labels)
        lines.append([*labels, *(cells or [_escape_markdown(row.problem)])])
    full = [line for line in lines if len(line) == len(lines[0])]
    widths = [max(map(len, column)) for column in zip(*full, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    padded = (line + [""] * (len(widths) - len(line)) for line in lines)
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in padded)


def format_latex(table: Table, name: str) -> str:
    """Returns both tables, labelled tab:NAME and tab:NAME-intervals (needs booktabs, amssymb)."""
    metrics = metric_grid(table, r"\textbf{{{}}}".format)
    tables = [
        (metrics, name, f"{table.title}. {legend(table)}"),
        (interval_grid(table), f"{name}-intervals", f"{table.title}: intervals."),
    ]
    return render("tables.tex", tables=tables, directions=DIRECTIONS)


def format_csv(table: Table) -> str:
    """Returns a line for each row, with all numbers unrounded, also those of each seed."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    for row in table.rows:
        numbers: dict[str, Any] = {}
        for way, metric in itertools.product(DIRECTIONS, STUDY_METRICS):
            stat = row.stats.get(way, {}).get(metric)
            for part in ("mean", "std", "low", "high"):
                numbers[f"{way} {metric} {part}"] = getattr(stat, part, None)
            numbers[f"{way} {metric} seeds"] = " ".join(map(str, stat.seeds)) if stat else None
        for way, part in itertools.product(DIRECTIONS, ("mean", "low", "high")):
            numbers[f"{way} difference {part}"] = getattr(row.differences.get(way), part, None)
        numbers |= {"paper": row.paper, "problem": row.problem}
        if row is table.rows[0]:
            writer.writerow([*table.columns, *numbers])
        writer.writerow([*row.labels, *numbers.values()])
    return file.getvalue()
