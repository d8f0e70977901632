"""A report's numbers as plain text, and the templates of all HTML and LaTeX."""

import functools
import unicodedata
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jinja2

METRICS = ("R@1", "R@5", "R@10", "MdR", "MnR")
DIRECTIONS = {"text_to_video": "text to video", "video_to_text": "video to text"}
_LATEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
    **{"τ": r"$\tau$", "✓": r"$\checkmark$", "±": r"$\pm$", "Δ": r"$\Delta$", "→": r"$\to$"},
    **{"−": "$-$", "–": "--", "<": "$<$", ">": "$>$"},
}
Metrics = Mapping[str, int | float | None]  # {"R@1": percent, ...}; None where it is not reported


class MetricRow(NamedTuple):
    """A line of the metric table: ours, ours with a test-time option, the paper's, or chance."""

    label: str
    metrics: Metrics
    kind: Literal["ours", "option", "paper", "chance"]

    def cells(self) -> list[str]:
        """Returns the metrics as text, in the order of METRICS, with - for missing ones."""
        values = map(self.metrics.get, METRICS)
        return ["-" if value is None else f"{value:.1f}" for value in values]


def format_table(results: Mapping[str, Any]) -> str:
    """Returns the metrics of results.json as an aligned plain-text table."""
    lines = [", ".join(list_facts(results))]
    if results.get("note"):
        lines.append(f"note: {results['note']}")
    rows = metric_rows(results)
    width = max(len(row.label) for row in rows)
    lines.append(" " * width + "".join(f"{name:>8}" for name in METRICS))
    for row in rows:
        lines.append(f"{row.label:{width}}" + "".join(f"{cell:>8}" for cell in row.cells()))
    return "\n".join(lines)


def list_facts(results: Mapping[str, Any]) -> list[str]:
    """Returns short texts on the data, the protocol and the weights behind the numbers."""
    texts, videos = results["num_texts"], results["num_videos"]
    surplus = videos - results["expected_videos"]
    selected_on = results["selected_on"]
    selection = {None: "", "last step": " (the last)"}.get(
        selected_on, f" (selected on {selected_on})"
    )
    return [
        *([results["dataset"]] if results["dataset"] != "captions" else []),
        f"{results['split']} split",
        f"step {results['step']}{selection}",
        results["protocol"],
        *([f"up to second {results['max_seconds']:g}"] if results["max_seconds"] else []),
        format_count(texts, "text"),
        format_count(videos, "video"),
        f"{-surplus:,} missing" if surplus <= 0 else f"{surplus:,} more than expected",
    ]


def metric_rows(results: Mapping[str, Any]) -> list[MetricRow]:
    """Returns each direction's rows: ours, with test-time options, and the paper's."""
    rows = []
    for key, name in DIRECTIONS.items():
        rows.append(MetricRow(name, results[key], "ours"))
        for option, both in results.get("normalized", {}).items():
            if key in both:
                rows.append(MetricRow(f"  with {option}", both[key], "option"))
        for backbone, both in results.get("paper", {}).items():
            rows.append(MetricRow(f"  paper, {backbone}", both[key], "paper"))
    return rows


def chance_row(num_videos: int) -> MetricRow:
    """Returns the expected metrics of a random order of so many videos."""
    middle = (num_videos + 1) / 2
    recalls = {f"R@{k}": 100 * min(1, k / num_videos) for k in (1, 5, 10)}
    return MetricRow("chance", {**recalls, "MdR": middle, "MnR": middle}, "chance")


def format_count(number: int, noun: str) -> str:
    """Returns "1 video" or "2,000 videos"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def render(template: str, **values: Any) -> str:
    """Returns a file of templates/ with values filled in, escaped if it is HTML."""
    environment = _environment()
    if template.endswith(".tex"):  # LaTeX is full of braces
        environment = environment.overlay(
            autoescape=False,
            block_start_string="<%",
            block_end_string="%>",
            variable_start_string="<<",
            variable_end_string=">>",
        )
    return environment.get_template(template).render(**values)


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("xclip_jax.report"),
        autoescape=True,  # captions and file names are untrusted
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"clean": _remove_control_characters, "latex": _escape_latex}
    return environment


def _remove_control_characters(text: str) -> str:
    hidden = ("Cc", "Cs")
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in hidden).strip()


def _escape_latex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)
