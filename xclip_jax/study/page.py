"""index.html over all studies of a report folder; everything printed is escaped."""

from importlib.resources import files

from xclip_jax.report.page import safe, section
from xclip_jax.report.table import DIRECTIONS
from xclip_jax.study.formats import grid, headings, legend, problems

_STYLE = """
main td { font-size: .9rem; background: none; font-weight: 400 }
th[colspan] { text-align: center } main td b { font-weight: 700 } main .table { max-width: none }
main th, main td { padding: .4rem .6rem } th.label { text-align: left }
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
    name = safe(name)
    formats = ", ".join(f'<a href="{name}.{end}">{end}</a>' for end in ("md", "tex", "csv", "json"))
    missing = "".join(f'<p class="note">{safe(problem)}</p>' for problem in problems(table))
    content = (
        f'<div class="scroll table">{_table(table)}</div>{missing}<p class=lead>As {formats}.</p>'
        f'<figure class="curves"><img src="{name}.png" alt="chart of {safe(table.title)}"></figure>'
    )
    return f'<div id="{name}">{section(safe(table.title), safe(legend(table)), content)}</div>'


def _table(table):
    labels, metrics, paper = headings(table)
    groups = "".join(f"<th colspan={len(metrics)}>{way}</th>" for _, way in DIRECTIONS)
    first = "".join(f'<th class="label">{safe(label)}</th>' for label in labels)
    second = "".join(f"<th>{safe(name)}</th>" for name in (*metrics, *metrics, *paper))
    body = ""
    for row, (names, cells) in zip(table.rows, grid(table, "<b>{}</b>".format, safe), strict=True):
        body += "<tr>" + "".join(f'<th class="label">{name}</th>' for name in names)
        if cells is None:
            body += f'<td class="failed" colspan={2 * len(metrics)}>{safe(row.problem)}</td>'
        body += "".join(f"<td>{cell}</td>" for cell in cells or ()) + "</tr>"
    return (
        f"<table><tr><th colspan={len(labels)}></th>{groups}</tr><tr>{first}{second}</tr>"
        f"{body}</table>"
    )
