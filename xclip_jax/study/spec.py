"""What a study file says, and how it is read."""

import dataclasses
import glob
import re
import runpy
import traceback
from pathlib import Path

from xclip_jax.cli import InputError

OPTIONS = {"eval.dual_softmax": "dual softmax", "eval.qb_norm": "QB-Norm"}


@dataclasses.dataclass(frozen=True)
class Variant:
    """A row of a table.

    Attributes:
        overrides: {"model.tau": 0.1}, fields of the config that it changes. With a test-time
            option, eval.dual_softmax or eval.qb_norm, the row has the metrics with it.
        paper: {"ViT-B/32": 46.1}, the paper's R@1 text to video on MSR-VTT's 1k-A, by backbone.
        cells: what stands in the row's columns; its name alone if empty.
    """

    overrides: dict = dataclasses.field(default_factory=dict)
    paper: dict = dataclasses.field(default_factory=dict)
    cells: tuple[str, ...] = ()

    @property
    def option(self):
        """What the name of its test-time option begins with, in the results; "": it has none."""
        chosen = [name for field, name in OPTIONS.items() if self.overrides.get(field)]
        return chosen[0] if chosen else ""


@dataclasses.dataclass(frozen=True)
class Study:
    """A table and its chart.

    Attributes:
        title: its heading.
        columns: headings of the first columns, those that tell the variants apart.
        variants: {name: Variant}, the rows.
        reference: name of the variant that the others are compared with; "": the last.
        lines: the chart has lines, one for each text in the first column, over the numbers in the
            second; otherwise bars.
        note: a sentence under the table.
    """

    title: str
    columns: tuple[str, ...]
    variants: dict[str, Variant]
    reference: str = ""
    lines: bool = False
    note: str = ""

    def cells(self, name):
        """What stands in the columns of the variant."""
        return self.variants[name].cells or (name,)


def load_studies(patterns, config):
    """{name of the file: Study} of paths or patterns such as configs/studies/table*.py.

    Args:
        patterns: paths; words after a colon go to get_study: fig5.py:500,1000. Of a file that is
            given twice, the last counts.
        config: the config that the variants change, for get_study to look at.

    Raises:
        InputError: no such file, or one that is not a study.
    """
    files = {}
    for pattern in patterns:
        path, _, arguments = pattern.partition(":")
        found = sorted(glob.glob(path))
        if not found:
            raise InputError(
                f"--study={path}: no such file; those that come along: configs/studies/*.py"
            )
        files |= {str(Path(file).resolve()): (file, arguments) for file in found}
    names = [Path(file).stem for file in files]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"--study: two files are named {name}.py")
    return {name: _load(*given, config) for name, given in zip(names, files.values(), strict=True)}


def _load(file, arguments, config):
    try:
        get_study = runpy.run_path(file)["get_study"]
        study = get_study(config, *([arguments] if arguments else []))
    except InputError:
        raise
    except Exception as error:  # the file is the user's: anything can be wrong in it
        lines = [
            at.lineno for at in traceback.extract_tb(error.__traceback__) if at.filename == file
        ]
        line = f", line {lines[-1]}" if lines else ""
        raise InputError(f"--study={file}{line}: {type(error).__name__}: {error}") from None
    problem = _problem(study)
    if problem:
        raise InputError(f"--study={file}: {problem}")
    return dataclasses.replace(study, reference=study.reference or list(study.variants)[-1])


def _problem(study):
    """What is wrong with what get_study returned; None if nothing is."""
    if not isinstance(study, Study) or not isinstance(study.variants, dict) or not study.variants:
        return "get_study must return a Study with a dict of variants"
    if not _are_texts(study.columns):
        return f"columns = {study.columns!r}: must be a tuple of texts"
    if study.reference and study.reference not in study.variants:
        return f"reference = {study.reference!r} is none of its variants"
    if study.lines and len(study.columns) != 2:
        return "lines=True needs two columns: the series, and a number"
    for name, variant in study.variants.items():
        problem = _variant_problem(study, name, variant)
        if problem:
            return f"variant {name!r}: {problem}"
    return None


def _variant_problem(study, name, variant):
    if not isinstance(name, str) or not isinstance(variant, Variant):
        return "must be a text and a Variant({field: value})"
    if not (isinstance(variant.overrides, dict) and isinstance(variant.paper, dict)):
        return "overrides and paper must be dicts"
    if sum(bool(variant.overrides.get(field)) for field in OPTIONS) > 1:
        return f"must have one test-time option at most, of {', '.join(OPTIONS)}"
    cells = study.cells(name)
    if not _are_texts(cells) or len(cells) != len(study.columns):
        return f"cells = {cells!r} do not fill the columns {study.columns!r}"
    if study.lines and not re.fullmatch(r"[0-9.]+", cells[1]):
        return f"cells = {cells!r}: the second must be a number, for the lines"
    return None


def _are_texts(values):
    return isinstance(values, tuple) and all(isinstance(value, str) for value in values)
