"""report/: a folder that shows what a model retrieves, readable from disk without a server."""

from pathlib import Path

import numpy as np
from PIL import Image

from xclip_jax.report import figures
from xclip_jax.report.figures import Attention
from xclip_jax.report.page import (
    CURVES,
    attention_section,
    page,
    strip_path,
    text_section,
    video_section,
)
from xclip_jax.report.queries import text_queries, video_queries
from xclip_jax.report.strips import make_strip
from xclip_jax.report.table import format_table

__all__ = ["Attention", "format_table", "write_report"]


def write_report(
    directory,
    results,
    sim_TxV,
    captions,
    text_video,
    clip_names,
    load_frames,
    attentions=(),
    curves=(),
):
    """Writes the report and returns the path of its index.html.

    Args:
      directory: made if missing; an older report in it is replaced.
      results: as in results.json, recalls in percent; a `note` is shown prominently.
      sim_TxV: finite logits, rows texts, columns videos; every video has a text.
      captions: T strings, of any content.
      text_video: for each text the index of the video it describes, T.
      clip_names: V strings.
      load_frames: video index -> its real frames, uint8 F x S x S x 3; asked for shown videos only.
      attentions: `Attention` of a few pairs.
      curves: lines of metrics.jsonl: dicts with `step` and some scalars.
    """
    directory = Path(directory)
    remove_old(directory)
    (directory / "strips").mkdir(parents=True, exist_ok=True)
    sim_TxV, text_video = np.asarray(sim_TxV, np.float32), np.asarray(text_video)

    by_text, by_video = text_queries(sim_TxV, text_video), video_queries(sim_TxV, text_video)
    shown = {query.item for query in by_video} | {query.answers[0] for query in by_text}
    shown |= {hit.item for query in by_text for hit in query.hits}
    strips = {video: make_strip(load_frames(video)) for video in sorted(shown)}
    for video, strip in strips.items():
        Image.fromarray(strip).save(directory / strip_path(video), optimize=True)

    found = (captions, clip_names, strips)
    figures.draw_text_to_video(directory / "text_to_video.png", by_text, *found)
    figures.draw_video_to_text(directory / "video_to_text.png", by_video, *found)
    attentions = [one for one in attentions if np.size(one.weights_WxF)]
    for k, attention in enumerate(attentions, 1):
        figures.draw_attention(directory / f"attention_{k}.png", attention)
    has_curves = figures.draw_curves(directory / "curves.png", curves)

    widths = {video: strip.shape[1] for video, strip in strips.items()}
    several = len(captions) > sim_TxV.shape[1]
    sections = [
        text_section(by_text, captions, clip_names, widths),
        video_section(by_video, captions, clip_names, widths, several),
        *([attention_section(attentions)] if attentions else []),
        *([CURVES] if has_curves else []),
    ]
    index = directory / "index.html"
    index.write_text(page(results, sections), encoding="utf-8", errors="replace")
    return index


def remove_old(directory):
    """Removes what an earlier report left, and nothing else."""
    patterns = ("index.html", "text_to_video.png", "video_to_text.png", "curves.png")
    for pattern in (*patterns, "attention_*.png", "strips/clip_*.png"):
        for path in directory.glob(pattern):
            path.unlink()
