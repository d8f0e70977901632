"""A Table as Markdown, LaTeX and CSV, all in the paper's layout."""

import csv
import io
import re

from xclip_jax.report.table import DIRECTIONS
from xclip_jax.study.statistics import METRICS
from xclip_jax.study.table import best

_SHORT = {"text_to_video": "t→v", "video_to_text": "v→t"}


def grid(table, bold, escape=str):
    """The rows as lists of texts: labels, both directions' metrics and difference, the paper's.

    Args:
        bold: makes a number bold: the best of its column.
        escape: applied to all other text.

    Yields:
        (labels, cells), or (labels, None) for a row without a result.
    """
    records, paper = best(table), any(row.paper is not None for row in table.rows)
    for row in table.rows:
        labels = [escape(label) for label in row.labels]
        if not row.stats:
            yield labels, None
            continue
        cells = []
        for way, _ in DIRECTIONS:
            for metric in METRICS:
                stat = row.stats.get(way, {}).get(metric)
                is_best = stat and round(stat.mean, 1) == records[way, metric]
                cells.append(escape(_number(stat, metric)) if stat else "")
                if is_best:
                    cells[-1] = re.sub(r"^[\d.]+", lambda mean: bold(mean[0]), cells[-1])
            cells.append(escape(_signed(row.differences.get(way))))
        yield labels, cells + ([f"{row.paper:.1f}" if row.paper else ""] if paper else [])


def _number(stat, metric):
    spread = "" if stat.std is None else f" ± {stat.std:.1f}"
    interval = f" [{stat.low:.1f}, {stat.high:.1f}]" if metric == "R@1" else ""
    return f"{stat.mean:.1f}{spread}{interval}"


def _signed(difference):
    if difference is None:
        return "–"
    d = difference
    return f"{d.mean:+.1f} [{d.low:+.1f}, {d.high:+.1f}]".replace("-", "−")


def headings(table):
    """(labels' headings, those of each direction, that of the paper or nothing)."""
    paper = ["paper"] if any(row.paper is not None for row in table.rows) else []
    return list(table.columns), [*METRICS, "Δ R@1"], paper


def legend(table):
    """What the numbers mean: a few sentences."""
    seeds = max(len(row.seeds) for row in table.rows)
    spread = f"mean ± standard deviation of {seeds} seeds" if seeds > 1 else "one seed"
    over = "queries and seeds" if seeds > 1 else "queries alone"
    text = (
        f"{table.facts}; {spread}. R@K in percent, MnR: mean rank. In brackets: 95 % interval, of "
        f"R@1 by resampling queries; of Δ, the distance from “{table.reference}”, over {over}. "
        "Bold: the best mean."
    )
    paper = " paper: R@1 text to video that X-CLIP reports for MSR-VTT, not ours."
    return text + (paper if headings(table)[2] else "") + (f" {table.note}" if table.note else "")


def problems(table):
    """A sentence for each row that has results, but not of all seeds."""
    return [f"{row.name}: {row.problem}" for row in table.rows if row.stats and row.problem]


def markdown(table):
    """A heading, the table with its columns aligned, the legend, what is missing."""

    def escape(text):
        return text.replace("|", "\\|").replace("\n", " ")

    labels, metrics, paper = headings(table)
    short = [f"{_SHORT[way]} {metric}" for way, _ in DIRECTIONS for metric in metrics]
    head = [*labels, *short, *paper]
    found = list(grid(table, "**{}**".format, escape))
    filled = [head, *(names + (cells or [""] * len(short + paper)) for names, cells in found)]
    widths = [max(len(line[k]) for line in filled) for k in range(len(head))]
    for line, row, (_, cells) in zip(filled[1:], table.rows, found, strict=True):
        line[len(labels)] = escape(row.problem) if cells is None else line[len(labels)]
    lines = [head, ["-" * width for width in widths], *filled[1:]]
    rows = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines]
    missing = [f"- {problem}" for problem in problems(table)]
    parts = [f"### {table.title}", "\n".join(rows), legend(table), "\n".join(missing)]
    return "\n\n".join(part for part in parts if part) + "\n"


_LATEX = {
    **{c: f"\\{c}" for c in "&%$#_{}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
    **{"τ": r"$\tau$", "✓": r"$\checkmark$", "±": r"$\pm$", "Δ": r"$\Delta$", "→": r"$\to$"},
    **{"−": "$-$", "–": "--", "<": "$<$", ">": "$>$"},
}


def escape_latex(text):
    """Text that LaTeX prints as it is."""
    return "".join(_LATEX.get(character, character) for character in text)


def latex(table):
    """A table environment for the packages booktabs and amssymb, its legend as the caption."""
    labels, metrics, paper = headings(table)
    width, first = len(metrics), len(labels) + 1
    spans = [f"\\multicolumn{{{width}}}{{c}}{{{name}}}" for _, name in DIRECTIONS]
    rules = [f"\\cmidrule(lr){{{a}-{a + width - 1}}}" for a in (first, first + width)]
    lines = [
        "% \\usepackage{booktabs,amssymb}",
        "\\begin{table}",
        "\\centering",
        f"\\caption{{{escape_latex(table.title)}. {escape_latex(legend(table))}}}",
        f"\\begin{{tabular}}{{{'l' * len(labels)}{'r' * (2 * width + len(paper))}}}",
        "\\toprule",
        " & ".join([*[""] * len(labels), *spans, *[""] * len(paper)]) + " \\\\",
        " ".join(rules),
        " & ".join(map(escape_latex, [*labels, *metrics, *metrics, *paper])) + " \\\\",
        "\\midrule",
    ]
    bold = "\\textbf{{{}}}".format
    for row, (names, cells) in zip(table.rows, grid(table, bold, escape_latex), strict=True):
        span = f"\\multicolumn{{{2 * width + len(paper)}}}{{l}}{{{escape_latex(row.problem)}}}"
        lines.append(" & ".join(names + ([span] if cells is None else cells)) + " \\\\")
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}", "\\end{table}", ""])


def comma_separated(table):
    """A line a row with every number unrounded, and each seed's own."""
    numbers = [
        (way, metric, part)
        for way, _ in DIRECTIONS
        for metric in METRICS
        for part in ("mean", "std", "low", "high", "seeds")
    ]
    parts = ("mean", "low", "high")
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(
        [*table.columns, *(" ".join(number) for number in numbers)]
        + [f"{way} difference {part}" for way, _ in DIRECTIONS for part in parts]
        + ["paper", "problem"]
    )
    for row in table.rows:
        found = [getattr(row.stats.get(w, {}).get(m), p, None) for w, m, p in numbers]
        apart = [getattr(row.differences.get(w), p, None) for w, _ in DIRECTIONS for p in parts]
        cells = [" ".join(map(str, x)) if isinstance(x, list) else x for x in found]
        writer.writerow([*row.labels, *cells, *apart, row.paper, row.problem])
    return file.getvalue()
