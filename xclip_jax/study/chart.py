"""Draws the chart of a study: R@1 in both directions with intervals, legible without colour."""

from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from xclip_jax.report import DIRECTIONS
from xclip_jax.report.canvas import CHART_STYLE, INK, MUTED, ignore_missing_glyphs
from xclip_jax.study.table import Stat, Table

_STYLE: dict[Any, Any] = {
    **CHART_STYLE,
    **{"hatch.linewidth": 0.6, "xtick.color": INK, "ytick.color": INK},
}
_FILLS: tuple[dict[str, Any], ...] = (
    {"facecolor": "#a3adc2"},
    {"facecolor": "white", "hatch": "////"},
)
_CAPS: dict[str, Any] = {"elinewidth": 1.1, "capsize": 2.5}  # of the intervals
# Dashes, marker and shade of each line.
_LINES = (
    ("-", "o", INK),
    ("--", "s", "#3d4a63"),
    (":", "^", "#55617a"),
    ("-.", "D", "#6b7484"),
    ((0, (6, 1, 1, 1, 1, 1)), "v", "#828b9a"),
    ((0, (1, 3)), "X", "#949cab"),
)


@ignore_missing_glyphs()
def draw_chart(table: Table, path: Path) -> None:
    """Writes the chart of a table as a PNG."""
    with matplotlib.rc_context(_STYLE):
        (_draw_lines if table.lines else _draw_bars)(table, path)


def _draw_bars(table: Table, path: Path) -> None:
    """Draws two bars per row (the one of video-to-text is hatched) and a dot for each seed."""
    figure = Figure((6.6, 1.9 + 0.48 * len(table.rows)), facecolor="white", layout="constrained")
    axes = figure.subplots()
    for (way, label), shift, fill in zip(DIRECTIONS.items(), (-0.2, 0.2), _FILLS, strict=True):
        rows = [(k, row.stats[way]["R@1"]) for k, row in enumerate(table.rows) if way in row.stats]
        y, stats = np.array([k + shift for k, _ in rows]), [stat for _, stat in rows]
        means = [stat.mean for stat in stats]
        axes.barh(y, means, 0.36, edgecolor=INK, linewidth=0.8, label=label, **fill)
        axes.errorbar(means, y, xerr=_interval_lengths(stats), fmt="none", ecolor=INK, **_CAPS)
        if any(len(stat.seeds) > 1 for stat in stats):
            dots = [(value, k) for k, stat in zip(y, stats, strict=True) for value in stat.seeds]
            axes.plot(*zip(*dots, strict=True), "o", ms=3.2, mfc="white", mec=INK, mew=0.8)
    for k, row in enumerate(table.rows):
        if not row.stats:
            axes.text(0.5, k, row.problem[:60], va="center", color=MUTED, style="italic")
    axes.set_yticks(np.arange(len(table.rows)), [shorten(row.name, 40) for row in table.rows])
    axes.set_ylim(len(table.rows) - 0.5, -0.5)  # the first row on top
    axes.set_xlabel("R@1, %")
    axes.set_xlim(0, None if any(row.stats for row in table.rows) else 100)
    axes.grid(axis="x")
    _finish(figure, table, path)


def _draw_lines(table: Table, path: Path) -> None:
    """Draws R@1 over the second column, a line for each series and a panel for each direction."""
    figure = Figure((8.6, 4.2), facecolor="white", layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (way, label) in zip(panels, DIRECTIONS.items(), strict=True):
        names = list(dict.fromkeys(row.labels[0] for row in table.rows))
        for name, (dashes, mark, shade) in zip(names, _LINES * len(names), strict=False):
            rows = [row for row in table.rows if row.labels[0] == name and way in row.stats]
            stats = [row.stats[way]["R@1"] for row in rows]
            shift = 1.012 ** (names.index(name) - len(names) / 2)  # intervals side by side
            x = shift * np.array([float(row.labels[1]) for row in rows])
            means, lengths = [stat.mean for stat in stats], _interval_lengths(stats)
            style = {"ls": dashes, "marker": mark, "color": shade, "ms": 6, "mfc": "white"}
            axes.plot(x, means, mew=1.3, label=name, **style)
            axes.errorbar(x, means, yerr=lengths, fmt="none", ecolor=shade, **_CAPS)
        axes.set_title(label, fontsize=10, color=MUTED)
        axes.set_xscale("log")
        numbers = sorted({float(row.labels[1]) for row in table.rows})
        axes.set_xticks(numbers, [f"{number:g}" for number in numbers])
        axes.minorticks_off()
        axes.set_xlabel(table.columns[1])
        axes.grid(axis="y")
    panels[0].set_ylabel("R@1, %")
    panels[0].set_ylim(0, None)
    _finish(figure, table, path)


def _interval_lengths(stats: Sequence[Stat]) -> Float[np.ndarray, "2 N"]:
    """Returns the distances of N means to both ends of their intervals."""
    return np.array([(s.mean - s.low, s.high - s.mean) for s in stats]).reshape(-1, 2).T


def _finish(figure: Figure, table: Table, path: Path) -> None:
    """Adds the title and the legend, and writes the file."""
    figure.suptitle(table.title, x=0.01, ha="left", fontweight="bold", fontsize=11)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if handles:
        below = {"loc": "outside lower center", "ncols": len(labels)}
        figure.legend(handles, labels, **below, handlelength=3)
    figure.savefig(path, format="png")
