"""A study as a picture: R@1 both ways with intervals; told apart without colour."""

from textwrap import shorten

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from xclip_jax.report.canvas import DOTS_PER_INCH, INK, LINE, MUTED, boxes_for_missing_glyphs
from xclip_jax.report.table import DIRECTIONS

_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "hatch.linewidth": 0.6,
    "text.parse_math": False,
}
_FILLS = ({"facecolor": "#a3adc2"}, {"facecolor": "white", "hatch": "////"})
# One for each line of a chart: how it is dashed, its mark, its shade.
_LINES = (
    ("-", "o", INK),
    ("--", "s", "#3d4a63"),
    (":", "^", "#55617a"),
    ("-.", "D", "#6b7484"),
    ((0, (6, 1, 1, 1, 1, 1)), "v", "#828b9a"),
    ((0, (1, 3)), "X", "#949cab"),
)


@boxes_for_missing_glyphs()
def draw(table, path):
    """Writes the chart of a Table as a PNG."""
    with matplotlib.rc_context(_STYLE):
        (_draw_lines if table.lines else _draw_bars)(table, path)


def _draw_bars(table, path):
    """A pair of bars a row: filled text to video, hatched video to text; a dot a seed."""
    figure = Figure((6.6, 1.9 + 0.48 * len(table.rows)), facecolor="white", layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(table.rows))
    for (way, label), shift, fill in zip(DIRECTIONS, (-0.2, 0.2), _FILLS, strict=True):
        found = [(k, row.stats[way]["R@1"]) for k, row in enumerate(table.rows) if way in row.stats]
        at = np.array([place for place, _ in found], float) + shift
        means = [stat.mean for _, stat in found]
        axes.barh(at, means, 0.36, edgecolor=INK, linewidth=0.8, label=label, **fill)
        _intervals(axes, at, [stat for _, stat in found], sideways=True)
        if any(len(stat.seeds) > 1 for _, stat in found):
            dots = [(one, y) for y, (_, stat) in zip(at, found, strict=True) for one in stat.seeds]
            axes.plot(*zip(*dots, strict=True), "o", ms=3.2, mfc="white", mec=INK, mew=0.8)
    for place, row in enumerate(table.rows):
        if not row.stats:
            axes.text(0.5, place, row.problem[:60], va="center", color=MUTED, style="italic")
    axes.set_yticks(places, [shorten(row.name, 40) for row in table.rows])
    axes.set_ylim(len(table.rows) - 0.5, -0.5)  # the first row on top
    axes.set_xlabel("R@1, %")
    axes.set_xlim(0, None if any(row.stats for row in table.rows) else 100)
    axes.grid(axis="x", color=LINE, linewidth=0.8)
    _finish(figure, [axes], table, path)


def _draw_lines(table, path):
    """A panel a direction: R@1 over the numbers in the second column, a line for each series."""
    figure = Figure((8.6, 4.2), facecolor="white", layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (way, label) in zip(panels, DIRECTIONS, strict=True):
        names = list(dict.fromkeys(row.labels[0] for row in table.rows))
        for name, (dashes, mark, shade) in zip(names, _LINES * len(names), strict=False):
            rows = [row for row in table.rows if row.labels[0] == name and way in row.stats]
            at = np.array([float(row.labels[1]) for row in rows])
            stats = [row.stats[way]["R@1"] for row in rows]
            at = at * 1.012 ** (names.index(name) - len(names) / 2)  # intervals side by side
            axes.plot(
                at, [stat.mean for stat in stats], ls=dashes, marker=mark, color=shade, ms=6,
                mfc="white", mew=1.3, label=name,
            )  # fmt: skip
            _intervals(axes, at, stats, sideways=False, color=shade)
        axes.set_title(label, fontsize=10, color=MUTED)
        axes.set_xscale("log")
        numbers = sorted({float(row.labels[1]) for row in table.rows})
        axes.set_xticks(numbers, [f"{number:g}" for number in numbers])
        axes.minorticks_off()
        axes.set_xlabel(table.columns[1])
        axes.grid(axis="y", color=LINE, linewidth=0.8)
    panels[0].set_ylabel("R@1, %")
    panels[0].set_ylim(0, None)
    _finish(figure, panels, table, path)


def _intervals(axes, at, stats, sideways, color=INK):
    means = np.array([stat.mean for stat in stats])
    ends = np.array([(stat.low, stat.high) for stat in stats]).reshape(-1, 2).T
    errors = {"xerr" if sideways else "yerr": abs(ends - means)}
    x, y = (means, at) if sideways else (at, means)
    axes.errorbar(x, y, **errors, fmt="none", ecolor=color, elinewidth=1.1, capsize=2.5)


def _finish(figure, panels, table, path):
    for axes in panels:
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color("#b8bfca")
        axes.tick_params(colors=INK, length=0)
    figure.suptitle(table.title, x=0.01, ha="left", fontweight="bold", fontsize=11)
    handles, labels = panels[0].get_legend_handles_labels()
    if handles:
        below = {"loc": "outside lower center", "ncols": len(labels)}
        figure.legend(handles, labels, **below, frameon=False, handlelength=3)
    figure.savefig(path, dpi=DOTS_PER_INCH, format="png")
