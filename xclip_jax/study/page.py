"""index.html over all studies of a report folder; everything printed is escaped."""

from importlib.resources import files
from urllib.parse import quote

from xclip_jax.report.page import safe, section
from xclip_jax.report.table import DIRECTIONS
from xclip_jax.study.formats import headings, interval_cells, legend, metric_cells, problems

_STYLE = """
main td { font-size: .9rem; background: none; font-weight: 400 }
th[colspan] { text-align: center } main td b { font-weight: 700 } main .table { max-width: none }
main th, main td { padding: .4rem .6rem } th.label { text-align: left; white-space: normal }
figure img { min-width: 0; max-width: 46rem }
.failed { color: var(--bad); text-align: left }
nav a { margin-right: 1rem }
"""


def page(tables):
    """The whole index.html.

    Args:
        tables: {name of the study: Table}; beside the page lie NAME.png, .md, .tex, .csv.
    """
    style = files("xclip_jax.report").joinpath("style.css").read_text(encoding="utf-8") + _STYLE
    links = " ".join(f'<a href="#{safe(k)}">{safe(t.title)}</a>' for k, t in tables.items())
    content = "".join(_section(name, table) for name, table in tables.items())
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        'content="width=device-width, initial-scale=1"><meta name="color-scheme" '
        f'content="light dark"><title>Studies</title><style>{style}</style></head><body>'
        f"<header><h1>Studies</h1><nav>{links}</nav></header><main>{content}</main></body></html>\n"
    )


def _section(name, table):
    safe_name = safe(quote(name))
    formats = ", ".join(f'<a href="{safe_name}.{e}">{e}</a>' for e in ("md", "tex", "csv", "json"))
    missing = "".join(f'<p class="note">{safe(problem)}</p>' for problem in problems(table))
    content = (
        f'{_metrics(table)}{missing}<figure class="curves"><img src="{safe_name}.png" '
        f'alt="chart of {safe(table.title)}"></figure>{_intervals(table)}'
        f"<p class=lead>As {formats}.</p>"
    )
    return (
        f'<div id="{safe(name)}">{section(safe(table.title), safe(legend(table)), content)}</div>'
    )


def _metrics(table):
    labels, metrics, _, paper = headings(table)
    rows = []
    for row in table.rows:
        cells = metric_cells(table, row, "<b>{}</b>".format)
        failed = f'<td class="failed" colspan={len(cells)}>{safe(row.problem)}</td>'
        rows.append((row, _cells(cells) if row.stats else failed))
    return _table(labels, metrics, paper, rows)


def _intervals(table):
    labels, _, second, _ = headings(table)
    rows = [(row, _cells(map(safe, interval_cells(row)))) for row in table.rows if row.stats]
    return _table(labels, second, [], rows) if rows else ""


def _cells(cells):
    return "".join(f"<td>{cell}</td>" for cell in cells)


def _table(labels, columns, paper, rows):
    groups = "".join(f"<th colspan={len(columns)}>{way}</th>" for _, way in DIRECTIONS)
    first = "".join(f'<th class="label">{safe(label)}</th>' for label in labels)
    second = "".join(f"<th>{safe(name)}</th>" for name in (*columns, *columns, *paper))
    body = ""
    for row, cells in rows:
        names = "".join(f'<th class="label">{safe(label)}</th>' for label in row.labels)
        body += f"<tr>{names}{cells}</tr>"
    return (
        f'<div class="scroll table"><table><tr><th colspan={len(labels)}></th>{groups}</tr>'
        f"<tr>{first}{second}</tr>{body}</table></div>"
    )
