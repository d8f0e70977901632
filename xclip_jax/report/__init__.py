"""Writes the report of an evaluation, a folder of web pages and pictures, and renders templates."""

import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from jaxtyping import Float, Int, UInt8

from xclip_jax.metrics import expected_ranks, retrieval_counts
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
    settings: Mapping[str, Any] = {},
    defaults: Mapping[str, Any] = {},
) -> Path:
    """Writes a report and returns the path of its index.html.

    Args:
        directory: created if missing; an older report in it is replaced.
        results: content of results.json, recalls in percent; the `name` is the title, a `note` is
            shown at the top.
        sim_TxV: finite logits; every video has a text.
        captions: texts with any content.
        text_video_T: index of the video that each text describes.
        clip_names: names of the videos, with any content.
        load_frames: returns the real frames of a video index; called for shown videos only.
        attentions: attention maps of a few pairs.
        curves: lines of metrics.jsonl.
        settings, defaults: {dotted field: value} of the run; those that differ are shown first.
    """
    directory = Path(directory)
    _clear(directory)
    counts = retrieval_counts(sim_TxV, text_video_T)
    rank_Q = {name: expected_ranks(*counts[way]) for way, name in DIRECTIONS.items()}
    figures.draw_ranks(directory / "ranks.png", rank_Q, len(clip_names))
    ranked = figures.rank_queries(sim_TxV, text_video_T, captions, clip_names)
    by_text, by_video = ranked.values()
    strips = _draw_strips(directory / "strips", by_text, by_video, load_frames)
    figures.draw_queries(directory / "text_to_video.png", by_text, strips, are_texts=True)
    figures.draw_queries(directory / "video_to_text.png", by_video, strips, are_texts=False)
    attentions = [one for one in attentions if one.weights_WxF.size]
    for k, attention in enumerate(attentions, 1):
        figures.draw_attention(directory / f"attention_{k}.png", attention)
    page = render(
        "report.html",
        facts=list_facts(results),
        results=results,
        metrics=METRICS,
        directions=DIRECTIONS,
        rows=_metric_rows(results),
        **_describe_run(results, settings, defaults),
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


def _describe_run(
    results: Mapping[str, Any], settings: Mapping[str, Any], defaults: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the values of the report's sections on settings and provenance."""
    pairs = {field: (value, defaults.get(field)) for field, value in settings.items()}
    return {
        "changed": {field: pair for field, pair in pairs.items() if pair[0] != pair[1]},
        "unchanged": {field: pair[0] for field, pair in pairs.items() if pair[0] == pair[1]},
        "provenance": list_provenance(results.get("provenance", {})),
    }


def _clear(directory: Path) -> None:
    """Creates the folder of a report, or removes an older report from it."""
    (directory / "strips").mkdir(parents=True, exist_ok=True)
    for pattern in ("index.html", "attention_*.png", "curves.png", "strips/clip_*.png"):
        for path in directory.glob(pattern):
            path.unlink()


def _draw_strips(
    folder: Path,
    by_text: Sequence[figures.ShownQuery],
    by_video: Sequence[figures.ShownQuery],
    load_frames: Callable[[int], UInt8[np.ndarray, "F S S 3"]],
) -> figures.Strips:
    """Writes the frames of each shown video as a picture and returns them by video."""
    shown = {query.item for query in by_video}
    shown |= {item.item for query in by_text for item in (query.truth, *query.hits)}
    strips = {video: figures.make_strip(load_frames(video)) for video in sorted(shown)}
    for video, strip in strips.items():
        strip.save(folder / f"clip_{video:05}.png", optimize=True)
    return strips


def list_pictures(directory: Path) -> dict[str, Path]:
    """Returns {name: file} of a report's pictures of results, without its training curves."""
    files = [directory / f"{name}.png" for name in ("ranks", *DIRECTIONS)]
    files += sorted(directory.glob("attention_*.png"))
    return {file.stem: file for file in files}


def list_provenance(provenance: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns labelled texts on where results come from, of the `provenance` of results.json.

    What is not known is left out, and of the evaluation what does not differ from the training.
    """
    training, evaluation = (provenance.get(key, {}) for key in ("training", "evaluation"))
    size, rate = provenance.get("parameters"), training.get("examples_per_second")
    speed = f"{rate:g} pairs/s" if rate else ""
    rows = [("parameters", f"{size:,}" if size else "")]
    rows.append(("trained", _join([*_when(training), speed])))
    if resumed := training.get("resumed"):
        times = f"{len(resumed)} time{'s' * (len(resumed) != 1)}"
        last = f"the last from step {resumed[-1]['step']}"
        rows.append(("resumed", _join([times, last, *_when(resumed[-1])])))
    rows.append(("evaluated", _join(_when(evaluation))))
    first, second = _describe_process(training), _describe_process(evaluation)
    for name, text in second.items():
        rows.append((name, first.get(name) or text))
        if first.get(name) and first[name] != text:
            rows.append((f"{name} of the evaluation", text))
    return [row for row in rows if row[1]]


def _when(record: Mapping[str, Any]) -> list[str]:
    """Returns date and duration of an attempt as texts, "" where unknown."""
    date = (record.get("date") or "").replace("T", " ").replace("+00:00", " UTC")
    return [date, format_duration(record.get("seconds"))]


def _describe_process(record: Mapping[str, Any]) -> dict[str, str]:
    """Returns {label: text} on the command, the code and the machine of an attempt."""
    devices, versions = record.get("devices", {}), record.get("versions", {})
    processes = devices.get("processes", 1)
    kind = f"{devices['count']} x {devices['kind']}" if devices else ""
    return {
        "command": record.get("command") or "",
        "commit": record.get("commit") or "",
        "devices": kind + f" in {processes} processes" * (processes > 1),
        "versions": _join(f"{name} {version}" for name, version in versions.items()),
    }


def _join(texts: Iterable[str]) -> str:
    return ", ".join(filter(None, texts))


def format_duration(seconds: float | None) -> str:
    """Returns a duration such as "5 min 34 s", or "" if it is None."""
    if seconds is None:
        return ""
    total = round(seconds)
    if total < 60:
        return f"{seconds:.3g} s"
    hours, minutes = divmod(total // 60, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {total % 60} s"


def format_setting(value: Any) -> str:
    """Returns the value of a config field as a text that is not empty."""
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "()"
    return f"{value:g}" if isinstance(value, float) else str(value) or '""'


def format_table(results: Mapping[str, Any]) -> str:
    """Returns the metrics of results.json as an aligned plain-text table."""
    *rows, _ = _metric_rows(results)  # without chance
    width = max(len(label) for label, _, _ in rows)
    note = [f"note: {results['note']}"] if results.get("note") else []
    lines = [", ".join(list_facts(results)), *note]
    lines.append(" " * width + "".join(f"{name:>8}" for name in METRICS))
    for label, metrics, _ in rows:
        values = [metrics.get(name) for name in METRICS]
        cells = (f"{'-':>8}" if value is None else f"{value:8.1f}" for value in values)
        lines.append(f"{label:{width}}" + "".join(cells))
    return "\n".join(lines)


def list_facts(results: Mapping[str, Any]) -> list[str]:
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
    environment.filters["setting"] = format_setting
    environment.filters["clean"] = lambda text: control.sub("", text).strip()
    for name, escapes in (("latex", _LATEX_ESCAPES), ("markdown", _MARKDOWN_ESCAPES)):
        environment.filters[name] = operator.methodcaller("translate", str.maketrans(escapes))
    return environment.get_template(template).render(**values)
