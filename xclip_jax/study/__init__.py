"""Defines studies: variants of a config, trained with several seeds and compared in a table.

A study is a file with a function get_study(config) that returns a Study, see configs/studies/.
"""

import dataclasses
import glob
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from xclip_jax.cli import InputError, call_user_file

OPTIONS = {
    "eval.dual_softmax": "dual softmax",
    "eval.qb_norm": "QB-Norm",
    "eval.hubness_bias": "hubness bias",
}


@dataclasses.dataclass(frozen=True)
class Variant:
    """A row of a study's table.

    If the overrides set a test-time option, a key of OPTIONS, the row shows the metrics with it.
    """

    overrides: dict[str, Any] = dataclasses.field(default_factory=dict)  # {"model.tau": 0.1}
    # R@1 text to video on MSR-VTT 1k-A in the paper, by backbone: {"ViT-B/32": 46.1}.
    paper: dict[str, float] = dataclasses.field(default_factory=dict)
    cells: tuple[str, ...] = ()  # texts of the row's columns; the variant's name if empty

    def __post_init__(self) -> None:
        """Raises ValueError if a field has a wrong type, or there are several test-time options."""
        if not isinstance(self.overrides, dict) or not isinstance(self.paper, dict):
            raise ValueError("overrides and paper of a Variant must be dicts")
        if sum(bool(self.overrides.get(field)) for field in OPTIONS) > 1:
            raise ValueError(f"a Variant has at most one test-time option of {', '.join(OPTIONS)}")

    @property
    def option(self) -> str:
        """Prefix of the test-time option's name in the results, or "" without an option."""
        return next((OPTIONS[field] for field in OPTIONS if self.overrides.get(field)), "")


@dataclasses.dataclass(frozen=True)
class Study:
    """A table of variants and the chart of their results.

    With lines=True, the chart has a line for each text in the first column and the numbers of the
    second on the x axis, otherwise bars.
    """

    title: str
    columns: tuple[str, ...]  # headings of the first columns, which distinguish the variants
    variants: dict[str, Variant]  # the rows by name
    reference: str = ""  # the variant that the others are compared with; the last if empty
    lines: bool = False
    note: str = ""  # a sentence below the table

    def __post_init__(self) -> None:
        """Raises ValueError if a field has a wrong type, or fields contradict each other."""
        columns = self.columns
        if not isinstance(columns, tuple) or not all(isinstance(text, str) for text in columns):
            raise ValueError(f"columns = {columns!r}: must be a tuple of strings")
        if not isinstance(self.variants, dict) or not self.variants:
            raise ValueError("variants must be a dict with at least one Variant")
        if self.reference not in ("", *self.variants):
            raise ValueError(f"reference = {self.reference!r}: must be one of the variants")
        if self.lines and len(columns) != 2:
            raise ValueError("lines=True needs two columns: the series and a number")
        for name, variant in self.variants.items():
            where = f"variant {name!r}"
            if not isinstance(name, str) or not isinstance(variant, Variant):
                raise ValueError(f"{where}: must be a string and a Variant")
            cells = self.labels(name)
            if [type(cell) for cell in cells] != [str] * len(columns):
                raise ValueError(f"{where}: {cells!r} must be one string for each of {columns!r}")
            if self.lines and not re.fullmatch(r"[0-9.]+", cells[1]):
                raise ValueError(f"{where}: {cells[1]!r} must be a number for lines=True")

    def labels(self, name: str) -> tuple[str, ...]:
        """Returns the texts of a variant's first columns."""
        return self.variants[name].cells or (name,)


def load_studies(patterns: Iterable[str], config: Any) -> dict[str, Study]:
    """Returns the studies of files such as configs/studies/table*.py, by file name.

    `patterns` are paths or glob patterns. Text after a colon is passed to get_study as a string:
    fig5.py:500,1000. If a file occurs twice, the last occurrence counts. Raises InputError if a
    file does not exist or does not define a valid study.
    """
    files = {}
    for pattern in patterns:
        path, colon, text = pattern.partition(":")
        matches = {Path(file).resolve(): file + colon + text for file in sorted(glob.glob(path))}
        if not matches:
            raise InputError(f"--study={path}: no such file, see configs/studies/*.py")
        files |= matches
    studies = {}
    for path, file in files.items():
        if path.stem in studies:
            raise InputError(f"--study: two files are named {path.name}")
        study = call_user_file("--study", file, "get_study", config)
        if not isinstance(study, Study):
            raise InputError(f"--study={file}: get_study must return a Study, not {study!r}")
        reference = study.reference or list(study.variants)[-1]
        studies[path.stem] = dataclasses.replace(study, reference=reference)
    return studies
