"""The report of studies: a table in four formats and a chart each, one page over all."""

import contextlib
import os

from xclip_jax.study import chart, formats, page
from xclip_jax.study.table import as_json, from_json, make_table


def write_study(directory, name, study, runs):
    """Writes NAME.json, .md, .tex, .csv and .png of a study, and index.html over all there.

    Args:
        directory: the report's folder.
        runs: {variant: [Run of each seed]}; what is not finished is said to be missing.
    """
    directory.mkdir(parents=True, exist_ok=True)
    table = make_table(study, runs)
    _replace(directory / f"{name}.md", formats.markdown(table))
    _replace(directory / f"{name}.tex", formats.latex(table, name))
    _replace(directory / f"{name}.csv", formats.comma_separated(table))
    picture = directory / f"{name}.png.{os.getpid()}.part"
    chart.draw(table, picture)
    os.replace(picture, directory / f"{name}.png")
    _replace(directory / f"{name}.json", as_json(table))
    tables = {}
    for path in sorted(directory.glob("*.json")):
        with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError):  # not a study's
            tables[path.stem] = from_json(path.read_text(encoding="utf-8"))
    _replace(directory / "index.html", page.page(tables))


def _replace(path, text):
    """Whole or not at all, also where two processes write."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
