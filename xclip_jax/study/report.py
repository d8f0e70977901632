"""Writes the report of studies: tables of means with intervals, charts, and a page of all."""

import contextlib
import csv
import dataclasses
import io
import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import scipy.stats
from jaxtyping import Float, Int
from markupsafe import Markup
from matplotlib.figure import Figure

from xclip_jax.cli import write_atomically
from xclip_jax.metrics import expected_ranks, recall
from xclip_jax.paper import backbone
from xclip_jax.report import DIRECTIONS, render
from xclip_jax.report.canvas import INK, MUTED, drawing_style
from xclip_jax.study import Study
from xclip_jax.study.runs import RESULTS, Run

Runs = Mapping[str, Sequence[Run]]  # of each variant, one for each seed
METRICS = ("R@1", "R@5", "R@10", "MnR")
Values = dict[str, dict[int, dict[str, np.ndarray]]]  # of V videos by direction, seed and metric
Counts = Int[np.ndarray, "S 2 Q"]  # `rank_counts` of S seeds
Videos = Int[np.ndarray, " Q"]
ByVideo = Float[np.ndarray, "S V"]  # a metric of every seed and test video
BOLD = {"studies.html": Markup("<b>{}</b>"), "study.md": "**{}**", "tables.tex": r"\textbf{{{}}}"}
# Charts are legible without colour.
_FILLS: Any = ({"fc": "#a3adc2"}, {"fc": "white", "hatch": "////"})
_CAPS: Any = {"elinewidth": 1.1, "capsize": 2.5}  # of the intervals
_LINES: Any = {
    "linestyle": ["-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)), (0, (1, 3))],
    "marker": list("os^DvX"),
    "color": [INK, "#3d4a63", "#55617a", "#6b7484", "#828b9a", "#949cab"],
}


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Stat(Interval):
    """A metric of a variant. The interval is over test videos (with their queries), not seeds."""

    std: float | None  # standard deviation over seeds (n - 1); None with one seed
    seeds: list[float]  # the metric of each seed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """The table row of a variant."""

    name: str
    labels: Sequence[str]  # texts of the first columns
    stats: dict[str, dict[str, Stat]]  # by direction and metric, over the finished seeds
    differences: dict[str, Interval]  # of R@1 to the reference, by direction, over common seeds
    seeds: dict[str, str | None]  # None, or why a seed has no result
    paper: float | None  # R@1 text to video in the paper, on the paper's data only

    @property
    def problem(self) -> str:
        """Reasons why seeds have no results, or ""."""
        first, *others = set(self.seeds.values())
        if not others:
            return first or ""
        return "; ".join(f"seed {seed} {reason}" for seed, reason in self.seeds.items() if reason)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """The rows of a study, and `facts`, a sentence on the test data."""

    title: str
    columns: Sequence[str]
    rows: list[Row]
    reference: str
    lines: bool
    note: str
    facts: str


def write_study(directory: Path, name: str, study: Study, runs: Runs) -> None:
    """Writes NAME.md, .tex, .csv, .png and .json, and an index.html of all studies in the folder.

    Each file is replaced atomically, since another process may write it at the same time.
    """
    directory.mkdir(parents=True, exist_ok=True)
    table = make_table(study, runs)
    tables = {name: table}
    for path in directory.glob("*.json"):
        with contextlib.suppress(ValueError, TypeError):  # another JSON
            tables.setdefault(path.stem, table_from_json(path.read_text(encoding="utf-8")))
    plain = dataclasses.asdict(table)
    texts = {
        f"{name}.md": format_tables("study.md", {name: table}),
        f"{name}.tex": format_tables("tables.tex", {name: table}),
        f"{name}.csv": format_csv(table),
        f"{name}.json": json.dumps(plain, indent=1, ensure_ascii=False),
        "index.html": format_tables("studies.html", dict(sorted(tables.items()))),
    }
    for file, content in (texts | {f"{name}.png": draw_chart(table)}).items():
        write_atomically(directory / file, content)


def make_table(study: Study, runs: Runs) -> Table:
    """Returns the Table of a study with the runs of each variant."""
    values = {name: _load_values(runs[name], study.variants[name].option) for name in runs}
    rows = []
    for name, variant in study.variants.items():
        stats, differences, config = {}, {}, runs[name][0].config
        for way, finished in values[name].items():
            if finished:
                arrays = {m: np.stack([v[m] for v in finished.values()]) for m in METRICS}
                stats[way] = {m: estimate_metric(array) for m, array in arrays.items()}
            reference = values[study.reference][way]
            common = [seed for seed in finished if seed in reference]
            if common and name != study.reference:
                pair = (np.stack([of[s]["R@1"] for s in common]) for of in (finished, reference))
                differences[way] = estimate_difference(*pair)
        finished = values[name]["text_to_video"]
        seeds = {str(run.config.seed): run.why_missing() for run in runs[name]}
        seeds |= dict.fromkeys(map(str, finished))
        is_paper_data = (config.data.dataset, config.data.variant) == ("msrvtt", "9k")
        paper = variant.paper.get(backbone(config.model.vision)) if is_paper_data else None
        numbers: Any = {"stats": stats, "differences": differences, "paper": paper}
        rows.append(Row(name=name, labels=study.labels(name), seeds=seeds, **numbers))
    names = ("title", "columns", "reference", "lines", "note")
    facts, every_run = config.name, itertools.chain(*runs.values())
    if run := next((run for run in every_run if run.load_ranks() is not None), None):
        results = json.loads((run.workdir / RESULTS).read_text())
        note = f" ({results['note']})" if "note" in results else ""
        sizes = f"{results['num_texts']:,} texts, {results['num_videos']:,} videos"
        if missing := results.get("missing_videos"):
            sizes += f" ({missing:,} missing: not comparable with results on all)"
        facts += f", {results['split']} split, {sizes}{note}"
    return Table(rows=rows, facts=facts, **{name: getattr(study, name) for name in names})


def _load_values(runs: Sequence[Run], option: str) -> Values:
    """Returns the values of the finished runs, with a test-time option ("": without)."""
    values: Values = {way: {} for way in DIRECTIONS}
    for run in runs:
        ranks = run.load_ranks() or {}
        for name, counts_2xQ in ranks.items():
            prefix, _, way = name.rpartition("/")  # "", "dual softmax" or "QB-Norm (9 captions)"
            if way in DIRECTIONS and prefix.partition(" (")[0] == option:
                video_Q = ranks["text_video"] if way == "text_to_video" else None
                by_metric = {m: metric_values(counts_2xQ[None], m, video_Q)[0] for m in METRICS}
                values[way][run.config.seed] = by_metric
    return values


def metric_values(counts_Sx2xQ: Counts, metric: str, video_Q: Videos | None = None) -> ByVideo:
    """Returns a metric of every seed and test video, whose mean over videos is the metric.

    `video_Q` is the video of each query, or None if every query has its own. A video with several
    captions is one sample, since its captions are not independent. Its value is the mean over all
    queries plus the video's share of their deviations (the linearised ratio of sums, Cochran,
    Sampling Techniques, 1977, Sec. 6).
    """
    better_SxQ, equal_SxQ = np.moveaxis(counts_Sx2xQ, 1, 0)
    if metric == "MnR":
        values_SxQ = expected_ranks(better_SxQ, equal_SxQ)
    else:
        values_SxQ = recall(better_SxQ, equal_SxQ, int(metric.removeprefix("R@")))
    if video_Q is None:
        return values_SxQ
    mean_Sx1 = values_SxQ.mean(1, keepdims=True)
    deviations = [np.bincount(video_Q, values_Q) for values_Q in values_SxQ - mean_Sx1]
    return mean_Sx1 + np.array(deviations) * (video_Q.max() + 1) / len(video_Q)


def estimate_metric(values_SxV: ByVideo) -> Stat:
    """Returns the Stat of a metric of every seed and test video."""
    seeds_S, videos_V = values_SxV.mean(1), values_SxV.mean(0)
    options = {"n_resamples": 2000, "batch": 100, "method": "percentile", "rng": 0}
    low, high = scipy.stats.bootstrap((videos_V,), np.mean, **options).confidence_interval
    std = float(seeds_S.std(ddof=1)) if len(seeds_S) > 1 else None
    return Stat(float(seeds_S.mean()), float(low), float(high), std, seeds_S.tolist())


def estimate_difference(values_SxV: ByVideo, reference_SxV: ByVideo) -> Interval:
    """Returns the mean difference of two variants with the same seeds and test videos.

    Its variance is that of the mean over videos plus that of the mean over seeds. The interval is
    Student's, with the degrees of freedom of Satterthwaite (1946), https://doi.org/10.2307/3002019.
    With one seed the interval covers the choice of videos alone.
    """
    difference_SxV = values_SxV - reference_SxV
    means = difference_SxV.mean(0), difference_SxV.mean(1)  # of videos, of seeds
    means = [x for x in means if len(x) > 1]
    variances = [x.var(ddof=1) / len(x) for x in means]
    mean, variance = float(difference_SxV.mean()), sum(variances)
    if not variance:
        return Interval(mean, mean, mean)
    terms = [v**2 / (len(x) - 1) for v, x in zip(variances, means, strict=True)]
    freedom = variance**2 / sum(terms)
    return Interval(mean, *map(float, scipy.stats.t.interval(0.95, freedom, mean, variance**0.5)))


def table_from_json(text: str) -> Table:
    """Returns the Table that `dataclasses.asdict` turned into JSON."""
    kinds = {"rows": Table, "labels": Row, "std": Stat, "low": Interval}

    def restore(fields: dict[str, Any]) -> Any:
        return next((kind for field, kind in kinds.items() if field in fields), dict)(**fields)

    if isinstance(table := json.loads(text, object_hook=restore), Table):
        return table
    raise TypeError("not the table of a study")


class Grid(NamedTuple):
    """One of a study's two printed tables."""

    labels: Sequence[str]  # headings of the first columns
    columns: tuple[str, ...]  # headings below each of the two directions
    last: tuple[str, ...]  # headings after both directions
    rows: list[tuple[Row, list[str]]]  # each with its cells, none if the row has no results


def metric_grid(table: Table, bold: Callable[[str], str]) -> Grid:
    """Returns means ± standard deviations in the paper's layout, with the best means in bold."""
    columns = []
    for way, metric in itertools.product(DIRECTIONS, METRICS):
        stats = [row.stats.get(way, {}).get(metric) for row in table.rows]
        means = [f"{stat.mean:.1f}" if stat else "" for stat in stats]
        best = (min if metric == "MnR" else max)(filter(None, means), key=float, default=None)
        means = [bold(mean) if mean == best else mean for mean in means]
        stds = [f" ± {stat.std:.1f}" if stat and stat.std is not None else "" for stat in stats]
        columns.append([mean + std for mean, std in zip(means, stds, strict=True)])
    paper = [f"{row.paper:.1f}" if row.paper else "" for row in table.rows]
    columns += [paper] if any(paper) else []
    cells = map(list, zip(*columns, strict=True))
    rows = [(row, c if row.stats else []) for row, c in zip(table.rows, cells, strict=True)]
    return Grid(table.columns, METRICS, ("paper",) if any(paper) else (), rows)


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


def format_tables(template: str, tables: Mapping[str, Table]) -> str:
    """Returns studies.html, study.md or tables.tex (needs booktabs, amssymb).

    `tables` are given by file name.
    """
    bold = BOLD[template].format
    studies = []
    for name, table in tables.items():
        seeds = max(list(row.seeds.values()).count(None) for row in table.rows)
        has_paper = any(row.paper for row in table.rows)
        legend = render("legend.txt", table=table, seeds=seeds, has_paper=has_paper)
        grids = metric_grid(table, bold), interval_grid(table)
        studies.append((name, table, *grids, " ".join(legend.split())))
    return render(template, studies=studies, directions=DIRECTIONS, align=_align)


def _align(text: str) -> str:
    """Returns a Markdown table with aligned columns, except in rows without results."""
    lines = [line[2:-2].split(" | ") for line in text.splitlines()]
    full = [line for line in lines if len(line) == len(lines[0])]
    widths = [max(map(len, column)) for column in zip(*full, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    padded = (line + [""] * (len(widths) - len(line)) for line in lines)
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in padded)


def format_csv(table: Table) -> str:
    """Returns a line for each row, with all numbers unrounded, including those of each seed."""
    file = io.StringIO()
    writer, parts = csv.writer(file, lineterminator="\n"), ("mean", "std", "low", "high", "seeds")
    for row in table.rows:
        numbers: dict[str, Any] = {}
        for way, metric, part in itertools.product(DIRECTIONS, METRICS, parts):
            value = getattr(row.stats.get(way, {}).get(metric), part, None)
            is_list = isinstance(value, list)
            numbers[f"{way} {metric} {part}"] = " ".join(map(str, value)) if is_list else value
        for way, part in itertools.product(DIRECTIONS, ("mean", "low", "high")):
            numbers[f"{way} difference {part}"] = getattr(row.differences.get(way), part, None)
        numbers |= {"paper": row.paper, "problem": row.problem}
        if row is table.rows[0]:
            writer.writerow([*table.columns, *numbers])
        writer.writerow([*row.labels, *numbers.values()])
    return file.getvalue()


@drawing_style()
def draw_chart(table: Table) -> bytes:
    """Returns a PNG with R@1 in both directions, with intervals."""
    matplotlib.rcParams.update({"hatch.linewidth": 0.6, "xtick.color": INK, "ytick.color": INK})
    size = (8.6, 4.2) if table.lines else (6.6, 1.9 + 0.48 * len(table.rows))
    figure = Figure(size, layout="constrained")
    (_draw_lines if table.lines else _draw_bars)(figure, table)
    figure.suptitle(table.title, x=0.01, ha="left", fontweight="bold", fontsize=11)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    place = {"loc": "outside lower center", "ncols": max(1, len(labels)), "handlelength": 3}
    figure.legend(handles, labels, **place)
    file = io.BytesIO()
    figure.savefig(file)
    return file.getvalue()


def _draw_bars(figure: Figure, table: Table) -> None:
    """Draws two bars per row (the one of video-to-text is hatched) and a dot for each seed."""
    axes = figure.subplots()
    for (way, label), shift, fill in zip(DIRECTIONS.items(), (-0.2, 0.2), _FILLS, strict=True):
        stats = {k + shift: r.stats[way]["R@1"] for k, r in enumerate(table.rows) if way in r.stats}
        means, lengths = _means_with_intervals(stats.values())
        style = {"ec": INK, "ecolor": INK, "linewidth": 0.8, "error_kw": _CAPS} | fill
        axes.barh(list(stats), means, 0.36, xerr=lengths, label=label, **style)
        for y, stat in stats.items():
            if stat.std is not None:
                y_S = [y] * len(stat.seeds)
                axes.plot(stat.seeds, y_S, "o", ms=3.2, mfc="white", mec=INK, mew=0.8)
    for k, row in enumerate(table.rows):
        if not row.stats:
            axes.text(0.5, k, row.problem[:60], va="center", color=MUTED, style="italic")
    axes.set_yticks(range(len(table.rows)), [shorten(row.name, 40) for row in table.rows])
    right = None if any(row.stats for row in table.rows) else 100
    axes.set(xlabel="R@1, %", xlim=(0, right), ylim=(len(table.rows) - 0.5, -0.5))  # first on top
    axes.grid(axis="x")


def _draw_lines(figure: Figure, table: Table) -> None:
    """Draws R@1 over the second column, a line for each series and a panel for each direction."""
    panels = figure.subplots(1, 2, sharey=True)
    numbers = sorted({float(row.labels[1]) for row in table.rows})
    names = list(dict.fromkeys(row.labels[0] for row in table.rows))
    for axes, (way, label) in zip(panels, DIRECTIONS.items(), strict=True):
        axes.set_prop_cycle(**_LINES)
        for k, name in enumerate(names):
            rows = [row for row in table.rows if row.labels[0] == name and way in row.stats]
            means, lengths = _means_with_intervals(row.stats[way]["R@1"] for row in rows)
            shift = 1.012 ** (k - len(names) / 2)  # intervals side by side
            x = [shift * float(row.labels[1]) for row in rows]
            axes.errorbar(x, means, lengths, label=name, mfc="white", mew=1.3, **_CAPS)
        axes.set_title(label, fontsize=10, color=MUTED)
        axes.set(xscale="log", xlabel=table.columns[1])
        axes.set_xticks(numbers, [f"{number:g}" for number in numbers])
        axes.minorticks_off()
        axes.grid(axis="y")
    panels[0].set(ylabel="R@1, %", ylim=(0, None))


def _means_with_intervals(stats: Iterable[Stat]) -> tuple[list[float], np.ndarray]:
    """Returns N means, and the 2 x N distances to both ends of their intervals."""
    stats = list(stats)
    lengths = np.array([(s.mean - s.low, s.high - s.mean) for s in stats]).reshape(-1, 2).T
    return [stat.mean for stat in stats], lengths
