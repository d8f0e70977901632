"""A Table as Markdown, LaTeX and CSV, all in the paper's layout."""

import csv
import io
import re

from xclip_jax.report.table import DIRECTIONS
from xclip_jax.study.statistics import METRICS
from xclip_jax.study.table import best

_SHORT = {"text_to_video": "t→v", "video_to_text": "v→t"}


def metric_cells(table, row, bold):
    """A row of the paper's layout: both directions' metrics, the paper's R@1 where there is one."""
    records, cells = best(table), []
    for way, _ in DIRECTIONS:
        for metric in METRICS:
            stat = row.stats.get(way, {}).get(metric)
            mean = f"{stat.mean:.1f}" if stat else ""
            is_best = stat and round(stat.mean, 1) == records[way, metric]
            spread = f" ± {stat.std:.1f}" if stat and stat.std is not None else ""
            cells.append((bold(mean) if is_best else mean) + spread)
    paper = [f"{row.paper:.1f}" if row.paper else ""] if _has_paper(table) else []
    return cells + paper


def interval_cells(row):
    """A row of the second table: R@1's interval and the distance from the reference, both ways."""
    cells = []
    for way, _ in DIRECTIONS:
        stat, d = row.stats.get(way, {}).get("R@1"), row.differences.get(way)
        cells.append(f"{stat.low:.1f} to {stat.high:.1f}" if stat else "")
        cells.append(
            f"{d.mean:+.1f} ({d.low:+.1f} to {d.high:+.1f})".replace("-", "−") if d else ""
        )
    return cells


def _has_paper(table):
    return any(row.paper is not None for row in table.rows)


def headings(table):
    """Headings: of the labels, of a direction in the first table, in the second, of the paper."""
    second = ["R@1, 95 %", f"minus “{table.reference}”, 95 %"]
    return list(table.columns), list(METRICS), second, ["paper"] if _has_paper(table) else []


def legend(table):
    """What the numbers mean: a few sentences."""
    seeds = max(len(row.seeds) - len(row.missing) for row in table.rows)
    spread = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
    over = "test videos and seeds" if seeds > 1 else "test videos alone"
    text = (
        f"{table.facts}; {spread}; R@K in percent, MnR the mean rank, the best mean in bold. "
        "Intervals: of R@1 by resampling the test videos with their queries, of differences over "
        f"{over}."
    )
    paper = " paper: R@1 text to video that X-CLIP reports for MSR-VTT, not ours."
    return text + (paper if _has_paper(table) else "") + (f" {table.note}" if table.note else "")


def problems(table):
    """A sentence for each row that has results, but not of all seeds."""
    return [f"{row.name}: {row.problem}" for row in table.rows if row.stats and row.problem]


def markdown(table):
    """A heading, both tables with their columns aligned, the legend, what is missing."""
    labels, metrics, second, paper = headings(table)
    names = [[_escape(label) for label in row.labels] for row in table.rows]
    first, other = [], []
    for row, name in zip(table.rows, names, strict=True):
        cells = metric_cells(table, row, "**{}**".format) if row.stats else [_escape(row.problem)]
        first.append(name + cells)
        other.append(name + interval_cells(row))

    def both_ways(head):
        return [f"{_SHORT[way]} {name}" for way, _ in DIRECTIONS for name in head]

    missing = "\n".join(f"- {_escape(problem)}" for problem in problems(table))
    parts = [
        f"### {table.title}",
        _aligned([*labels, *both_ways(metrics), *paper], first),
        _aligned([*labels, *both_ways(second)], other),
        legend(table),
        missing,
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _escape(text):
    return re.sub(r"([\\`*<>|])", r"\\\1", text.replace("\n", " "))


def _aligned(head, rows):
    """A Markdown table; the reason in a row that is short may be wider than its column."""
    whole = [head, *(row for row in rows if len(row) == len(head))]
    rows = [row + [""] * (len(head) - len(row)) for row in rows]
    widths = [max(len(row[k]) for row in whole) for k in range(len(head))]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines)


_LATEX = {
    **{c: f"\\{c}" for c in "&%$#_{}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
    **{"τ": r"$\tau$", "✓": r"$\checkmark$", "±": r"$\pm$", "Δ": r"$\Delta$", "→": r"$\to$"},
    **{"−": "$-$", "–": "--", "<": "$<$", ">": "$>$"},
}


def escape_latex(text):
    """Text that LaTeX prints as it is."""
    return "".join(_LATEX.get(character, character) for character in text)


def latex(table, name):
    """Both tables for the packages booktabs and amssymb; the legend is the first one's caption.

    `name`: of the study, for its labels tab:NAME and tab:NAME-intervals.
    """
    labels, metrics, second, paper = headings(table)
    bold = "\\textbf{{{}}}".format
    first, other = [], []
    for row in table.rows:
        texts = [escape_latex(label) for label in row.labels]
        span = (
            f"\\multicolumn{{{2 * len(metrics) + len(paper)}}}{{l}}{{{escape_latex(row.problem)}}}"
        )
        cells = [escape_numbers(cell) for cell in metric_cells(table, row, bold)]
        first.append(texts + (cells if row.stats else [span]))
        other.append(texts + [escape_latex(cell) for cell in interval_cells(row)])
    title = escape_latex(table.title)
    return "\n".join(
        [
            "% \\usepackage{booktabs,amssymb}",
            *_environment(
                labels, metrics, paper, first, name, f"{title}. {escape_latex(legend(table))}"
            ),
            *_environment(labels, second, [], other, f"{name}-intervals", f"{title}: intervals."),
            "",
        ]
    )


def _environment(labels, columns, paper, rows, name, caption):
    width, first = len(columns), len(labels) + 1
    spans = [f"\\multicolumn{{{width}}}{{c}}{{{way}}}" for _, way in DIRECTIONS]
    rules = [f"\\cmidrule(lr){{{a}-{a + width - 1}}}" for a in (first, first + width)]
    head = [escape_latex(text) for text in (*labels, *columns, *columns, *paper)]
    return [
        "\\begin{table}",
        "\\centering\\small\\setlength{\\tabcolsep}{4pt}",
        f"\\caption{{{caption}}}\\label{{tab:{name}}}",
        f"\\begin{{tabular}}{{{'l' * len(labels)}{'r' * (2 * width + len(paper))}}}",
        "\\toprule",
        " & ".join([*[""] * len(labels), *spans, *[""] * len(paper)]) + " \\\\",
        " ".join(rules),
        " & ".join(head) + " \\\\",
        "\\midrule",
        *(" & ".join(row) + " \\\\" for row in rows),
        "\\bottomrule",
        "\\end{tabular}",
        "\\end{table}",
    ]


def escape_numbers(cell):
    """A cell that may hold LaTeX's own bold."""
    return cell.replace("±", "$\\pm$")


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
