"""The pictures of a report as PNG: rankings, word-frame attention, training curves."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float, UInt8
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from PIL import Image

from xclip_jax.report.canvas import (
    AMBER,
    BLUE,
    DOTS_PER_INCH,
    GREEN,
    INK,
    LINE,
    MUTED,
    ORANGE,
    PAPER,
    Canvas,
    Pixels,
    ignore_missing_glyphs,
    printable,
)
from xclip_jax.report.queries import RankedItem, ShownQuery

HEAT = LinearSegmentedColormap.from_list("heat", ["#f4f6fb", "#aebcf0", "#4a63d3", "#1b2a7a"])
STRIP_FRAMES, FRAME_SIDE, FRAME_GAP = 6, 112, 4  # frames of a strip, pixels of one, between two
CARD, MARGIN = 560, 20  # pixels: width of a query's card, space around the cards
INNER = CARD - 36  # width of a card's content
MAX_WORDS, MAX_THUMBNAILS = 30, 12  # of a heat map
LABELS, ROW = 150, 28  # pixels: left column and height of a word in a heat map
PANELS = (("Loss", "/loss"), ("Accuracy in the batch", "/accuracy"), ("R@1, %", "/R@1"))

Strips = Mapping[int, UInt8[np.ndarray, "S _ 4"]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class WordFrameAttention:
    """The weights with which AOSM averages a pair's word-frame similarities.

    Attributes:
        caption: the text.
        words: its W tokens that count as words.
        clip: name of the video.
        times: seconds of its F frames.
        frames_FxSxSx3: the frames.
        weights_WxF: share of the attention of each cell; they sum to 1.
    """

    caption: str
    words: list[str]
    clip: str
    times: list[float]
    frames_FxSxSx3: UInt8[np.ndarray, "F S S 3"]
    weights_WxF: Float[np.ndarray, "W F"]


def strip_width(frames: int = STRIP_FRAMES) -> int:
    """Returns the pixels of a strip of that many frames."""
    return frames * (FRAME_SIDE + FRAME_GAP) - FRAME_GAP


def make_strip(
    frames_FxSxSx3: UInt8[np.ndarray, "F S S 3"],
) -> UInt8[np.ndarray, "side width 4"]:
    """Returns up to six evenly spaced frames in a row, RGBA with transparent gaps."""
    count = len(frames_FxSxSx3)
    shown = np.unique(np.linspace(0, count - 1, min(count, STRIP_FRAMES)).round().astype(int))
    strip = np.zeros((FRAME_SIDE, strip_width(len(shown)), 4), np.uint8)
    for k, index in enumerate(shown):
        left = k * (FRAME_SIDE + FRAME_GAP)
        strip[:, left : left + FRAME_SIDE, :3] = _resize(frames_FxSxSx3[index], FRAME_SIDE)
        strip[:, left : left + FRAME_SIDE, 3] = 255
    return strip


def _resize(frame_SxSx3: np.ndarray, side: int) -> np.ndarray:
    image = Image.fromarray(np.ascontiguousarray(frame_SxSx3))
    return np.asarray(image.resize((side, side), Image.Resampling.BICUBIC))


def _draw_cards(count: int, height: Pixels) -> tuple[Canvas, list[tuple[Pixels, Pixels]]]:
    """Returns a sheet with empty cards in two columns, and each card's inner corner."""
    columns = min(2, max(1, count))
    rows = max(1, -(-count // columns))
    pitch = height + MARGIN
    canvas = Canvas(columns * (CARD + MARGIN) + MARGIN, rows * pitch + MARGIN)
    corners = []
    for k in range(count):
        x, y = MARGIN + k % columns * (CARD + MARGIN), MARGIN + k // columns * pitch
        canvas.box(x, y, CARD, height, 10)
        corners.append((x + 18, y + 14))
    return canvas, corners


def _draw_rank(canvas: Canvas, query: ShownQuery, x: Pixels, y: Pixels) -> None:
    color = GREEN if query.rank == 1 else AMBER
    canvas.text(x, y, query.rank_label, 12, color, weight="bold")
    canvas.text(x + INNER, y, query.reason, 11.5, MUTED, ha="right")


def _hit_count(queries: Sequence[ShownQuery]) -> int:
    return max((len(query.hits) for query in queries), default=0)


@ignore_missing_glyphs()
def draw_text_to_video(
    path: Path,
    queries: Sequence[ShownQuery],
    *,
    captions: Sequence[str],
    clip_names: Sequence[str],
    strips: Strips,
) -> None:
    """Draws each query's caption, the clip it describes, and the clips ranked first."""
    side = 62
    full_width = strip_width() / FRAME_SIDE * side

    def draw_row(answer: RankedItem, x: Pixels, y: Pixels) -> None:
        strip = strips[answer.item]
        width = strip.shape[1] / strip.shape[0] * side
        color = GREEN if answer.kind == "right" else MUTED
        canvas.text(x + 14, y + side / 2, answer.label, 13, color, ha="center", weight="bold")
        if answer.kind == "right":
            canvas.box(x + 33, y - 4, width + 8, side + 8, 4, facecolor=GREEN, edgecolor=GREEN)
        canvas.image(strip, x + 37, y, width, side, interpolation="lanczos")
        beside = x + 37 + full_width + 12
        canvas.text(beside, y + side / 2 - 9, f"{answer.score:.2f}", weight="bold")
        name = canvas.wrap(clip_names[answer.item], INNER - full_width - 49, 1, 10.5)[0]
        canvas.text(beside, y + side / 2 + 9, name, 10.5, MUTED)

    height = 14 + 78 + side + 22 + _hit_count(queries) * (side + 14) + 4
    canvas, corners = _draw_cards(len(queries), height)
    for query, (x, y) in zip(queries, corners, strict=True):
        _draw_rank(canvas, query, x, y + 8)
        canvas.paragraph(x, y + 44, captions[query.item], INNER, 2, size=15, weight="bold")
        draw_row(query.truth, x, y + 78)
        canvas.bar(x, y + 78 + side + 9, INNER, 1, LINE)
        for k, hit in enumerate(query.hits):
            draw_row(hit, x, y + 78 + side + 22 + k * (side + 14))
    canvas.save(path)


@ignore_missing_glyphs()
def draw_video_to_text(
    path: Path,
    queries: Sequence[ShownQuery],
    *,
    captions: Sequence[str],
    clip_names: Sequence[str],
    strips: Strips,
) -> None:
    """Draws each clip's frames, a caption that describes it, and the captions ranked first."""
    side, row = INNER * FRAME_SIDE / strip_width(), 46

    def draw_row(answer: RankedItem, x: Pixels, y: Pixels, note: str = "") -> None:
        color = GREEN if answer.kind == "right" else MUTED
        if answer.kind == "right":
            canvas.box(x, y - 21, INNER, 42, 5, facecolor="#e9f6ee", edgecolor=GREEN)
        canvas.text(x + 19, y, answer.label, 13, color, ha="center", weight="bold")
        canvas.paragraph(x + 42, y, captions[answer.item], INNER - 112, 2)
        right, above = x + INNER - 8, 8 if note else 0
        canvas.text(right, y - above, f"{answer.score:.2f}", ha="right", weight="bold")
        canvas.text(right, y + 9, note, 10.5, MUTED, ha="right")

    height = 14 + side + 72 + 35 + _hit_count(queries) * row + 12
    canvas, corners = _draw_cards(len(queries), height)
    for query, (x, y) in zip(queries, corners, strict=True):
        _draw_rank(canvas, query, x, y + 8)
        strip = strips[query.item]
        canvas.image(strip, x, y + 26, strip.shape[1] / strip.shape[0] * side, side)
        name = canvas.wrap(clip_names[query.item], INNER, 1, 10.5)[0]
        canvas.text(x, y + 26 + side + 12, name, 10.5, MUTED)
        middle = y + 26 + side + 46
        more = len(query.answers) - 1
        draw_row(query.truth, x, middle, f"+ {more} more" if more else "")
        canvas.bar(x, middle + 28, INNER, 1, LINE)
        for k, hit in enumerate(query.hits):
            draw_row(hit, x, middle + 60 + k * row)
    canvas.save(path)


@ignore_missing_glyphs()
def draw_attention(path: Path, attention: WordFrameAttention) -> None:
    """Draws a heat map of words by frames, with bars for the share of each word and frame.

    Of a text with more than 30 words, those with the largest shares are shown, in text order.
    """
    weights_WxF = attention.weights_WxF
    num_words, columns = weights_WxF.shape
    shown = np.sort(np.argsort(-weights_WxF.sum(1), kind="stable")[:MAX_WORDS])
    thumbnails = min(columns, MAX_THUMBNAILS)  # each the middle frame of a group of columns
    width, height, right = 760, len(shown) * ROW, 140
    cell = min(110, width / columns)
    side = min(96, cell * columns / thumbnails - 3)
    top = 74 + side + 26
    canvas = Canvas(LABELS + width + right, top + height + 92)
    caption_width = LABELS + width + right - 48
    canvas.paragraph(24, 38, attention.caption, caption_width, 2, size=15, weight="bold")
    for k in range(thumbnails):
        index = int((k + 0.5) * columns / thumbnails)
        middle = LABELS + (k + 0.5) * cell * columns / thumbnails
        frame = _resize(attention.frames_FxSxSx3[index], 2 * FRAME_SIDE)
        canvas.image(frame, middle - side / 2, 70, side, side)
        seconds = f"{attention.times[index]:.3g} s"
        canvas.text(middle, top - 15, seconds, 11, MUTED, ha="center")
    shown_WxF, words = weights_WxF[shown], [attention.words[index] for index in shown]
    _draw_heat(canvas, shown_WxF, top, cell)
    _draw_word_shares(canvas, words, shown_WxF.sum(1), LABELS + cell * columns, top)
    _draw_frame_shares(canvas, weights_WxF.sum(0), top + height, cell)
    notes = [printable(attention.clip)[:60], f"darkest cell {shown_WxF.max():.1%}"]
    if len(shown) < num_words:
        notes.append(f"the {len(shown)} of {num_words} words with the largest shares")
    canvas.text(LABELS, top + height + 70, " · ".join(notes), 11, MUTED)
    canvas.save(path)


def _draw_heat(canvas: Canvas, weights_WxF: np.ndarray, top: Pixels, cell: Pixels) -> None:
    """Draws the cells, with the percentage in wide cells of at least a fifth of the largest."""
    rows, columns = weights_WxF.shape
    height, largest = rows * ROW, max(weights_WxF.max(), 1e-12)
    heat = {"cmap": HEAT, "vmin": 0, "vmax": largest, "interpolation": "nearest"}
    canvas.image(weights_WxF, LABELS, top, cell * columns, height, **heat)
    for k in range(1, rows):
        canvas.bar(LABELS, top + k * ROW - 0.75, cell * columns, 1.5, PAPER)
    for k in range(1, columns if columns <= 32 else 0):
        canvas.bar(LABELS + k * cell - 0.75, top, 1.5, height, PAPER)
    for row, column in np.argwhere(weights_WxF >= largest / 5) if cell >= 40 else ():
        weight = weights_WxF[row, column]
        color = PAPER if weight > largest / 2 else INK
        x, y = LABELS + (column + 0.5) * cell, top + (row + 0.5) * ROW
        canvas.text(x, y, f"{100 * weight:.1f}", 10.5, color, ha="center")


def _draw_word_shares(
    canvas: Canvas, words: list[str], share_W: np.ndarray, right: Pixels, top: Pixels
) -> None:
    """Draws the words on the left of the heat map and their shares as bars on its right."""
    for k, (word, share) in enumerate(zip(words, share_W, strict=True)):
        middle, length = top + (k + 0.5) * ROW, 70 * share / share_W.max()
        line = canvas.wrap(word, LABELS - 36, 1, 13.5)[0]
        canvas.text(LABELS - 10, middle, line, 13.5, ha="right")
        canvas.bar(right + 10, middle - 5, length, 10, BLUE)
        canvas.text(right + 16 + length, middle, f"{share:.0%}", 11, MUTED)


def _draw_frame_shares(canvas: Canvas, share_F: np.ndarray, bottom: Pixels, cell: Pixels) -> None:
    """Draws the frames' shares as bars below the heat map."""
    canvas.text(LABELS - 10, bottom + 24, "all words", 11, MUTED, ha="right")
    for column, share in enumerate(share_F):
        x, length = LABELS + (column + 0.1) * cell, 26 * share / share_F.max()
        canvas.bar(x, bottom + 8, 0.8 * cell, length, BLUE)
        if cell >= 40:
            middle = LABELS + (column + 0.5) * cell
            canvas.text(middle, bottom + 18 + length, f"{share:.0%}", 11, MUTED, ha="center")


def draw_curves(path: Path, lines: Iterable[Mapping[str, Any]]) -> bool:
    """Draws loss, accuracy and R@1 of metrics.jsonl by step, or returns False if it has none."""
    lines = list(lines)
    panels = [(title, _read_series(lines, ending)) for title, ending in PANELS]
    panels = [(title, series) for title, series in panels if series]
    if not panels:
        return False
    with matplotlib.rc_context({"font.family": "DejaVu Sans", "text.color": INK, "font.size": 9}):
        layout = ConstrainedLayoutEngine(wspace=0.06, w_pad=0.1, h_pad=0.1)
        figure = Figure((4 * len(panels), 3.1), facecolor=PAPER, layout=layout)
        all_axes = np.ravel(figure.subplots(1, len(panels)))
        for axes, (title, series) in zip(all_axes, panels, strict=True):
            _draw_panel(axes, title, series)
        figure.savefig(path, dpi=DOTS_PER_INCH)
    return True


Series = dict[str, tuple[list[int], list[int | float]]]  # {key: (steps, values)}


def _read_series(lines: Iterable[Mapping[str, Any]], ending: str) -> Series:
    """Returns the finite scalars whose key has the ending, in order of appearance."""
    series: Series = {}
    for line in lines:
        for key, value in line.items():
            is_finite = isinstance(value, int | float) and np.isfinite(value)
            if key.endswith(ending) and is_finite and "step" in line:
                steps, values = series.setdefault(key, ([], []))
                steps.append(line["step"])
                values.append(value)
    return series


def smooth(values_N: np.ndarray, span: int) -> Float[np.ndarray, " N"]:
    """Returns the centred moving average over `span` values, over fewer at the ends."""
    window = np.ones(span)
    count_N = np.convolve(np.ones(len(values_N)), window, "same")
    return np.convolve(values_N, window, "same") / count_N


def _draw_panel(axes: Axes, title: str, series: Series) -> None:
    """Draws a line for each series, labelled with its last value."""
    colors = [BLUE, ORANGE, GREEN, MUTED, AMBER]
    highest = max(series, key=lambda key: series[key][1][-1])
    for k, (key, (steps, values)) in enumerate(series.items()):
        color = colors[k % len(colors)]
        if len(values) > 60:
            axes.plot(steps, values, color=color, alpha=0.22, linewidth=0.8)
            values = smooth(np.asarray(values), len(values) // 30 | 1)
        label = key.rsplit("/", 1)[0].replace("/", ", ").replace("_", " ")
        marker = "o" if len(values) <= 20 else None
        axes.plot(steps, values, color=color, linewidth=1.8, marker=marker, ms=4, label=label)
        align = "center" if len(series) == 1 else "bottom" if key == highest else "top"
        axes.annotate(
            f"{values[-1]:.3g}", (steps[-1], values[-1]), (5, 0), textcoords="offset points",
            va=align, color=color, fontweight="bold", annotation_clip=False,
        )  # fmt: skip
    axes.set_title(title, loc="left", fontweight="bold", fontsize=11, color=INK)
    axes.set_xlabel("step", color=MUTED)
    axes.margins(x=0.09)
    axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
    axes.grid(axis="y", color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#b8bfca")
    axes.tick_params(colors=MUTED, length=0)
    axes.legend(frameon=False, fontsize=8.5, labelcolor=INK)
