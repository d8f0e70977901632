"""Writes the report of an evaluation: a folder of web pages and pictures.

The plain-text table of metrics and the rendering of all HTML and LaTeX templates are here too.
"""

import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jinja2
import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image

from xclip_jax.report import figures
from xclip_jax.report.figures import WordFrameAttention
from xclip_jax.report.queries import text_queries, video_queries

__all__ = ["WordFrameAttention", "format_table", "write_report"]

METRICS = ("R@1", "R@5", "R@10", "MdR", "MnR")
DIRECTIONS = {"text_to_video": "text to video", "video_to_text": "video to text"}
# LaTeX is full of braces, so its templates use other delimiters.
_LATEX_DELIMITERS: dict[str, Any] = {
    **{"block_start_string": "<%", "block_end_string": "%>"},
    **{"variable_start_string": "<<", "variable_end_string": ">>"},
}
_LATEX_ESCAPES = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
    **{"τ": r"$\tau$", "✓": r"$\checkmark$", "±": r"$\pm$", "Δ": r"$\Delta$", "→": r"$\to$"},
    **{"−": "$-$", "–": "--", "<": "$<$", ">": "$>$"},
}


class MetricRow(NamedTuple):
    """A line of the metric table: this model, with a test-time option, the paper, or chance."""

    label: str
    metrics: Mapping[str, int | float | None]  # recalls in percent; None where not reported
    kind: Literal["ours", "option", "paper", "chance"]

    def cells(self) -> list[str]:
        """Returns the metrics as text, in the order of METRICS, with - for missing ones."""
        values = map(self.metrics.get, METRICS)
        return ["-" if value is None else f"{value:.1f}" for value in values]


def write_report(
    directory: str | Path,
    results: Mapping[str, Any],
    sim_TxV: Float[np.ndarray, "T V"],
    *,
    captions: Sequence[str],
    text_video_T: Int[np.ndarray, " T"],
    clip_names: Sequence[str],
    load_frames: Callable[[int], UInt8[np.ndarray, "F S S 3"]],
    attentions: Iterable[WordFrameAttention] = (),
    curves: Iterable[Mapping[str, Any]] = (),
) -> Path:
    """Writes a report and returns the path of its index.html.

    Args:
        directory: created if missing; an older report in it is replaced.
        results: content of results.json, recalls in percent; a `note` is shown at the top.
        sim_TxV: finite logits, rows texts, columns videos; every video has a text.
        captions: T strings with any content.
        text_video_T: index of the video that each text describes.
        clip_names: V strings with any content.
        load_frames: returns the real frames of a video index; called for shown videos only.
        attentions: attention maps of a few pairs.
        curves: lines of metrics.jsonl: dicts with `step` and some scalars.
    """
    directory = Path(directory)
    (directory / "strips").mkdir(parents=True, exist_ok=True)
    pictures = ("text_to_video.png", "video_to_text.png", "attention_*.png", "curves.png")
    for pattern in ("index.html", *pictures, "strips/clip_*.png"):  # and no other files
        for path in directory.glob(pattern):
            path.unlink()
    by_text, by_video = text_queries(sim_TxV, text_video_T), video_queries(sim_TxV, text_video_T)
    shown = {query.item for query in by_video}
    shown |= {item.item for query in by_text for item in (query.truth, *query.hits)}
    strips = {video: figures.make_strip(load_frames(video)) for video in sorted(shown)}
    for video, strip in strips.items():
        Image.fromarray(strip).save(directory / f"strips/clip_{video:05}.png", optimize=True)
    gallery = figures.Gallery(captions, clip_names, strips)
    figures.draw_text_to_video(directory / "text_to_video.png", by_text, gallery)
    figures.draw_video_to_text(directory / "video_to_text.png", by_video, gallery)
    attentions = [one for one in attentions if one.weights_WxF.size]
    for k, attention in enumerate(attentions, 1):
        figures.draw_attention(directory / f"attention_{k}.png", attention)
    page = render(
        "report.html",
        facts=list_facts(results),
        results=results,
        metrics=METRICS,
        rows=[*metric_rows(results), chance_row(results["num_videos"])],
        num_videos=format_count(results["num_videos"], "video"),
        gallery=gallery,
        full_width=figures.strip_width(),
        by_text=by_text,
        by_video=by_video,
        many_captions=len(captions) > len(clip_names),
        attentions=attentions,
        has_curves=figures.draw_curves(directory / "curves.png", curves),
    )
    (directory / "index.html").write_text(page, encoding="utf-8", errors="replace")
    return directory / "index.html"


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
    """Returns short texts on the data, the protocol and the weights of an evaluation."""
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
    """Returns the rows of each direction: this model, with test-time options, and the paper."""
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
    """Returns the expected metrics of a random ranking of `num_videos` videos."""
    middle = (num_videos + 1) / 2
    recalls = {f"R@{k}": 100 * min(1, k / num_videos) for k in (1, 5, 10)}
    return MetricRow("chance", {**recalls, "MdR": middle, "MnR": middle}, "chance")


def format_count(number: int, noun: str) -> str:
    """Returns "1 video" or "2,000 videos"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def render(template: str, **values: Any) -> str:
    """Renders a file of templates/ with the given values, escaped if it is HTML."""
    is_latex = template.endswith(".tex")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("xclip_jax.report"),
        autoescape=not is_latex,  # captions and file names are untrusted
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
        **(_LATEX_DELIMITERS if is_latex else {}),
    )
    environment.filters["clean"] = _remove_control_characters
    environment.filters["latex"] = lambda text: text.translate(str.maketrans(_LATEX_ESCAPES))
    return environment.get_template(template).render(**values)


def _remove_control_characters(text: str) -> str:
    hidden = ("Cc", "Cs")
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in hidden).strip()
