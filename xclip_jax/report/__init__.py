"""The report of an evaluation: a folder of pages and pictures, opened from disk."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image

from xclip_jax.report import figures
from xclip_jax.report.figures import WordFrameAttention
from xclip_jax.report.page import (
    METRICS,
    chance_row,
    format_count,
    format_table,
    list_facts,
    metric_rows,
    render,
)
from xclip_jax.report.queries import text_queries, video_queries

__all__ = ["WordFrameAttention", "format_table", "write_report"]


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
        results: as in results.json, recalls in percent; a `note` is shown prominently.
        sim_TxV: finite logits, rows texts, columns videos; every video has a text.
        captions: T strings with any content.
        text_video_T: index of the video that each text describes.
        clip_names: V strings with any content.
        load_frames: returns the real frames of a video index; called for shown videos only.
        attentions: of a few pairs.
        curves: lines of metrics.jsonl: dicts with `step` and some scalars.
    """
    directory = Path(directory)
    _remove_old_report(directory)
    (directory / "strips").mkdir(parents=True, exist_ok=True)
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
    has_curves = figures.draw_curves(directory / "curves.png", curves)
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
        has_curves=has_curves,
    )
    (directory / "index.html").write_text(page, encoding="utf-8", errors="replace")
    return directory / "index.html"


def _remove_old_report(directory: Path) -> None:
    """Removes the files of an earlier report, and no others."""
    patterns = ("index.html", "text_to_video.png", "video_to_text.png", "curves.png")
    for pattern in (*patterns, "attention_*.png", "strips/clip_*.png"):
        for path in directory.glob(pattern):
            path.unlink()
