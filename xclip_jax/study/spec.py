"""What a study file says, and how it is read."""

import dataclasses
import glob
import runpy
from pathlib import Path

from xclip_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Variant:
    """A row of a table.

    Attributes:
        overrides: {"model.tau": 0.1}, fields of the config that it changes.
        paper: {"ViT-B/32": 46.1}, the paper's R@1 text to video on MSR-VTT's 1k-A, by backbone.
        option: what is read of the results: "" the plain metrics, or a test-time option whose name
            starts so ("dual softmax", "QB-Norm"; its eval.* fields must be in `overrides`).
        cells: what stands in the row's columns; its name alone if empty.
    """

    overrides: dict = dataclasses.field(default_factory=dict)
    paper: dict = dataclasses.field(default_factory=dict)
    option: str = ""
    cells: tuple[str, ...] = ()


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
        patterns: comma-free paths; words after a colon go to get_study: fig5.py:500,1000.
        config: the config that the variants change, for get_study to look at.

    Raises:
        InputError: no such file, or one that is not a study.
    """
    studies = {}
    for pattern in patterns:
        path, _, arguments = pattern.partition(":")
        found = sorted(glob.glob(path))
        if not found:
            raise InputError(
                f"--study={path}: no such file; those that come along: configs/studies/*.py"
            )
        for file in found:
            name = Path(file).stem
            if name in studies:
                raise InputError(f"--study: two files are named {name}")
            studies[name] = _load(file, config, arguments)
    return studies


def _load(file, config, arguments):
    try:
        get_study = runpy.run_path(file)["get_study"]
        study = get_study(config, *([arguments] if arguments else []))
    except InputError:
        raise
    except Exception as error:  # the file is the user's: anything can be wrong in it
        reason = str(error) if str(error) else type(error).__name__
        raise InputError(f"--study={file}: {type(error).__name__}: {reason}") from None
    if not isinstance(study, Study) or not study.variants:
        raise InputError(f"--study={file}: get_study must return a Study with variants")
    reference = study.reference or list(study.variants)[-1]
    if reference not in study.variants:
        raise InputError(f"--study={file}: reference = {reference!r} is none of its variants")
    for name in study.variants:
        if len(study.cells(name)) != len(study.columns):
            raise InputError(f"--study={file}: variant {name!r} does not fill {study.columns}")
    return dataclasses.replace(study, reference=reference)
