"""Writes the report of an evaluation, a folder of web pages and pictures, and renders templates."""

import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from jaxtyping import Float, Int, UInt8

from xclip_jax.report import figures

METRICS = ("R@1", "R@5", "R@10", "MdR", "MnR")
DIRECTIONS = {"text_to_video": "text to video", "video_to_text": "video to text"}
_LATEX_DELIMITERS = ("<%", "%>", "<<", ">>")  # as LaTeX is full of braces
_LATEX_ESCAPES = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
    **{"τ": r"$\tau$", "✓": r"$\checkmark$", "±": r"$\pm$", "Δ": r"$\Delta$", "→": r"$\to$"},
    **{"−": "$-$", "–": "--", "<": "$<$", ">": "$>$"},
}
_MARKDOWN_ESCAPES = {"\n": " ", **{character: f"\\{character}" for character in "\\`*<>|"}}
# A line of the metric table: label; metrics, recalls in percent, None where not reported; and kind,
# "ours", "option" (of ours, at test time), "paper" or "chance".
_Row = tuple[str, Mapping[str, float | None], str]


def write_report(
    directory: str | Path,
    results: Mapping[str, Any],
    sim_TxV: Float[np.ndarray, "T V"],
    *,
    captions: Sequence[str],
    text_video_T: Int[np.ndarray, " T"],
    clip_names: Sequence[str],
    load_frames: Callable[[int], UInt8[np.ndarray, "F S S 3"]],
    attentions: Iterable[figures.WordFrameAttention] = (),
    curves: Iterable[Mapping[str, Any]] = (),
) -> Path:
    """Writes a report and returns the path of its index.html.

    Args:
        directory: created if missing; an older report in it is replaced.
        results: content of results.json, recalls in percent; a `note` is shown at the top.
        sim_TxV: finite logits; every video has a text.
        captions: texts with any content.
        text_video_T: index of the video that each text describes.
        clip_names: names of the videos, with any content.
        load_frames: returns the real frames of a video index; called for shown videos only.
        attentions: attention maps of a few pairs.
        curves: lines of metrics.jsonl.
    """
    directory = Path(directory)
    (directory / "strips").mkdir(parents=True, exist_ok=True)
    for pattern in ("index.html", "attention_*.png", "curves.png", "strips/clip_*.png"):
        for path in directory.glob(pattern):
            path.unlink()
    ranked = figures.rank_queries(sim_TxV, text_video_T, captions, clip_names)
    by_text, by_video = ranked.values()
    shown = {query.item for query in by_video}
    shown |= {item.item for query in by_text for item in (query.truth, *query.hits)}
    strips = {video: figures.make_strip(load_frames(video)) for video in sorted(shown)}
    for video, strip in strips.items():
        strip.save(directory / f"strips/clip_{video:05}.png", optimize=True)
    figures.draw_queries(directory / "text_to_video.png", by_text, strips, are_texts=True)
    figures.draw_queries(directory / "video_to_text.png", by_video, strips, are_texts=False)
    attentions = [one for one in attentions if one.weights_WxF.size]
    for k, attention in enumerate(attentions, 1):
        figures.draw_attention(directory / f"attention_{k}.png", attention)
    page = render(
        "report.html",
        facts=_list_facts(results),
        results=results,
        metrics=METRICS,
        rows=_metric_rows(results),
        strips=strips,
        full_width=figures.STRIP_WIDTH,
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
    *rows, _ = _metric_rows(results)  # without chance
    width = max(len(label) for label, _, _ in rows)
    note = [f"note: {results['note']}"] if results.get("note") else []
    lines = [", ".join(_list_facts(results)), *note]
    lines.append(" " * width + "".join(f"{name:>8}" for name in METRICS))
    for label, metrics, _ in rows:
        values = [metrics.get(name) for name in METRICS]
        cells = (f"{'-':>8}" if value is None else f"{value:8.1f}" for value in values)
        lines.append(f"{label:{width}}" + "".join(cells))
    return "\n".join(lines)


def _list_facts(results: Mapping[str, Any]) -> list[str]:
    """Returns short texts on the data, the protocol and the weights of an evaluation."""
    dataset, selected_on = results["dataset"], results["selected_on"]
    selection = {None: "", "last step": " (the last)"}
    texts, videos = results["num_texts"], results["num_videos"]
    surplus = videos - results["expected_videos"]
    facts = [
        dataset if dataset != "captions" else "",
        f"{results['split']} split",
        f"step {results['step']}{selection.get(selected_on, f' (selected on {selected_on})')}",
        results["protocol"],
        f"up to second {results['max_seconds']:g}" if results["max_seconds"] else "",
        f"{texts:,} text{'s' * (texts != 1)}",
        f"{videos:,} video{'s' * (videos != 1)}",
        f"{-surplus:,} missing" if surplus <= 0 else f"{surplus:,} more than expected",
    ]
    return [fact for fact in facts if fact]


def _metric_rows(results: Mapping[str, Any]) -> list[_Row]:
    """Returns the rows of each direction (model, test-time options, paper), and of chance."""
    rows = []
    for key, name in DIRECTIONS.items():
        rows.append((name, results[key], "ours"))
        for option, both in results.get("normalized", {}).items():
            if key in both:
                rows.append((f"  with {option}", both[key], "option"))
        for backbone, both in results.get("paper", {}).items():
            rows.append((f"  paper, {backbone}", both[key], "paper"))
    if queries := results.get("queries"):
        label = f"{queries['num_texts']:,} {queries['name']}"
        rows.append((label, queries["text_to_video"], "ours"))
        rows.append(("  in random order", queries["chance"], "option"))
    total = results["num_videos"]
    chance = {f"R@{k}": 100 * min(1, k / total) for k in (1, 5, 10)}
    return [*rows, ("chance", chance | dict.fromkeys(("MdR", "MnR"), (total + 1) / 2), "chance")]


def render(template: str, **values: Any) -> str:
    """Renders a file of templates/. HTML templates escape the values."""
    environment = jinja2.Environment(
        *(_LATEX_DELIMITERS if template.endswith(".tex") else ()),
        loader=jinja2.PackageLoader("xclip_jax.report"),
        autoescape=template.endswith(".html"),  # captions and file names are untrusted
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    control = re.compile(r"[\0-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")  # and surrogates
    environment.filters["clean"] = lambda text: control.sub("", text).strip()
    for name, escapes in (("latex", _LATEX_ESCAPES), ("markdown", _MARKDOWN_ESCAPES)):
        environment.filters[name] = operator.methodcaller("translate", str.maketrans(escapes))
    return environment.get_template(template).render(**values)
