"""Draws the pictures of a report as PNG: rankings, word-frame attention, training curves."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

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
    CHART_STYLE,
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
PANELS = {"Loss": "/loss", "Accuracy in the batch": "/accuracy", "R@1, %": "/R@1"}
Series = dict[str, list[tuple[int, int | float]]]  # {key: [(step, value), ...]}


@dataclasses.dataclass(frozen=True, kw_only=True)
class WordFrameAttention:
    """The weights with which AOSM averages the word-frame similarities of one pair."""

    caption: str
    words: list[str]  # the W tokens that count as words
    clip: str  # name of the video
    times: list[float]  # seconds of its F frames
    frames_FxSxSx3: UInt8[np.ndarray, "F S S 3"]
    weights_WxF: Float[np.ndarray, "W F"]  # shares of the attention, with sum 1


class Gallery(NamedTuple):
    """The texts and videos that queries refer to by index, with strips of the shown videos."""

    captions: Sequence[str]
    clip_names: Sequence[str]
    strips: Mapping[int, UInt8[np.ndarray, "_ _ 4"]]


def strip_width(frames: int = STRIP_FRAMES) -> int:
    """Returns the width in pixels of a strip of `frames` frames."""
    return frames * (FRAME_SIDE + FRAME_GAP) - FRAME_GAP


def make_strip(frames_FxSxSx3: UInt8[np.ndarray, "F S S 3"]) -> UInt8[np.ndarray, "_ _ 4"]:
    """Returns up to six evenly spaced frames in a row, RGBA with transparent gaps."""
    count = len(frames_FxSxSx3)
    shown = np.unique(np.linspace(0, count - 1, min(count, STRIP_FRAMES)).round().astype(int))
    strip = Image.new("RGBA", (strip_width(len(shown)), FRAME_SIDE))
    for k, index in enumerate(shown):
        frame = _resize(frames_FxSxSx3[index], FRAME_SIDE)
        strip.paste(frame, (k * (FRAME_SIDE + FRAME_GAP), 0))
    return np.asarray(strip)


def _resize(frame_SxSx3: UInt8[np.ndarray, "S S 3"], side: int) -> Image.Image:
    image = Image.fromarray(np.ascontiguousarray(frame_SxSx3))
    return image.resize((side, side), Image.Resampling.BICUBIC)


@ignore_missing_glyphs()
def _draw_cards(
    path: Path,
    queries: Sequence[ShownQuery],
    heights: tuple[Pixels, Pixels],
    draw_content: Callable[[Canvas, ShownQuery, Pixels, Pixels], None],
) -> None:
    """Draws cards in two columns.

    `heights`: height of a card without hits, and height that each hit adds.
    """
    columns = min(2, max(1, len(queries)))
    height = heights[0] + heights[1] * max((len(query.hits) for query in queries), default=0)
    pitch, rows = height + MARGIN, max(1, -(-len(queries) // columns))
    canvas = Canvas(columns * (CARD + MARGIN) + MARGIN, rows * pitch + MARGIN)
    for k, query in enumerate(queries):
        x, y = MARGIN + k % columns * (CARD + MARGIN), MARGIN + k // columns * pitch
        canvas.box(x, y, CARD, height, 10)
        color = GREEN if query.rank == 1 else AMBER
        canvas.text(x + 18, y + 22, query.rank_label, 12, color, weight="bold")
        canvas.text(x + 18 + INNER, y + 22, query.reason, 11.5, MUTED, ha="right")
        draw_content(canvas, query, x + 18, y + 14)
    canvas.save(path)


def draw_text_to_video(path: Path, queries: Sequence[ShownQuery], gallery: Gallery) -> None:
    """Draws each query's caption, the clip it describes, and the clips ranked first."""
    side = 62
    full_width = strip_width() / FRAME_SIDE * side

    def draw_row(canvas: Canvas, answer: RankedItem, x: Pixels, y: Pixels) -> None:
        strip = gallery.strips[answer.item]
        width = strip.shape[1] / strip.shape[0] * side
        color = GREEN if answer.kind == "right" else MUTED
        canvas.text(x + 14, y + side / 2, answer.label, 13, color, ha="center", weight="bold")
        if answer.kind == "right":
            canvas.box(x + 33, y - 4, width + 8, side + 8, 4, facecolor=GREEN, edgecolor=GREEN)
        canvas.image(strip, x + 37, y, width, side, interpolation="lanczos")
        beside = x + 37 + full_width + 12
        canvas.text(beside, y + side / 2 - 9, f"{answer.score:.2f}", weight="bold")
        name = canvas.wrap(gallery.clip_names[answer.item], INNER - full_width - 49, 1, 10.5)[0]
        canvas.text(beside, y + side / 2 + 9, name, 10.5, MUTED)

    def draw_card(canvas: Canvas, query: ShownQuery, x: Pixels, y: Pixels) -> None:
        caption = gallery.captions[query.item]
        canvas.paragraph(x, y + 44, caption, INNER, 2, size=15, weight="bold")
        draw_row(canvas, query.truth, x, y + 78)
        canvas.bar(x, y + 78 + side + 9, INNER, 1, LINE)
        for k, hit in enumerate(query.hits):
            draw_row(canvas, hit, x, y + 78 + side + 22 + k * (side + 14))

    _draw_cards(path, queries, (14 + 78 + side + 22 + 4, side + 14), draw_card)


def draw_video_to_text(path: Path, queries: Sequence[ShownQuery], gallery: Gallery) -> None:
    """Draws each clip's frames, a caption that describes it, and the captions ranked first."""
    side, row = INNER * FRAME_SIDE / strip_width(), 46

    def draw_row(canvas: Canvas, answer: RankedItem, x: Pixels, y: Pixels, note: str = "") -> None:
        color = GREEN if answer.kind == "right" else MUTED
        if answer.kind == "right":
            canvas.box(x, y - 21, INNER, 42, 5, facecolor="#e9f6ee", edgecolor=GREEN)
        canvas.text(x + 19, y, answer.label, 13, color, ha="center", weight="bold")
        canvas.paragraph(x + 42, y, gallery.captions[answer.item], INNER - 112, 2)
        right, above = x + INNER - 8, 8 if note else 0
        canvas.text(right, y - above, f"{answer.score:.2f}", ha="right", weight="bold")
        canvas.text(right, y + 9, note, 10.5, MUTED, ha="right")

    def draw_card(canvas: Canvas, query: ShownQuery, x: Pixels, y: Pixels) -> None:
        strip, more = gallery.strips[query.item], len(query.answers) - 1
        canvas.image(strip, x, y + 26, strip.shape[1] / strip.shape[0] * side, side)
        name = canvas.wrap(gallery.clip_names[query.item], INNER, 1, 10.5)[0]
        canvas.text(x, y + 26 + side + 12, name, 10.5, MUTED)
        middle = y + 26 + side + 46
        draw_row(canvas, query.truth, x, middle, f"+ {more} more" if more else "")
        canvas.bar(x, middle + 28, INNER, 1, LINE)
        for k, hit in enumerate(query.hits):
            draw_row(canvas, hit, x, middle + 60 + k * row)

    _draw_cards(path, queries, (14 + side + 72 + 35 + 12, row), draw_card)


@ignore_missing_glyphs()
def draw_attention(path: Path, attention: WordFrameAttention) -> None:
    """Draws a heat map of words by frames, with bars for the share of each word and frame.

    If a text has more than 30 words, those with the largest shares are shown, in text order.
    """
    num_words, columns = attention.weights_WxF.shape
    shown = np.sort(np.argsort(-attention.weights_WxF.sum(1), kind="stable")[:MAX_WORDS])
    shown_WxF = attention.weights_WxF[shown]
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
        frame = np.asarray(_resize(attention.frames_FxSxSx3[index], 2 * FRAME_SIDE))
        canvas.image(frame, middle - side / 2, 70, side, side)
        seconds = f"{attention.times[index]:.3g} s"
        canvas.text(middle, top - 15, seconds, 11, MUTED, ha="center")
    _draw_heat(canvas, shown_WxF, top, cell)
    words, share_F = [attention.words[index] for index in shown], attention.weights_WxF.sum(0)
    _draw_shares(canvas, words, shown_WxF.sum(1), share_F, top=top, cell=cell)
    notes = [printable(attention.clip)[:60], f"darkest cell {shown_WxF.max():.1%}"]
    if len(shown) < num_words:
        notes.append(f"the {len(shown)} of {num_words} words with the largest shares")
    canvas.text(LABELS, top + height + 70, " · ".join(notes), 11, MUTED)
    canvas.save(path)


def _draw_heat(canvas: Canvas, weights_WxF: np.ndarray, top: Pixels, cell: Pixels) -> None:
    """Draws the cells, with percentages in the larger ones if they are wide enough."""
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


def _draw_shares(
    canvas: Canvas,
    words: list[str],
    share_W: np.ndarray,
    share_F: np.ndarray,
    *,
    top: Pixels,
    cell: Pixels,
) -> None:
    """Draws the words left of the heat map, and the shares as bars right of it and below."""
    right, bottom = LABELS + cell * len(share_F), top + ROW * len(words)
    for k, (word, share) in enumerate(zip(words, share_W, strict=True)):
        middle, length = top + (k + 0.5) * ROW, 70 * share / share_W.max()
        label = canvas.wrap(word, LABELS - 36, 1, 13.5)[0]
        canvas.text(LABELS - 10, middle, label, 13.5, ha="right")
        canvas.bar(right + 10, middle - 5, length, 10, BLUE)
        canvas.text(right + 16 + length, middle, f"{share:.0%}", 11, MUTED)
    canvas.text(LABELS - 10, bottom + 24, "all words", 11, MUTED, ha="right")
    for k, share in enumerate(share_F):
        length, middle = 26 * share / share_F.max(), LABELS + (k + 0.5) * cell
        canvas.bar(middle - 0.4 * cell, bottom + 8, 0.8 * cell, length, BLUE)
        if cell >= 40:
            canvas.text(middle, bottom + 18 + length, f"{share:.0%}", 11, MUTED, ha="center")


def draw_curves(path: Path, lines: Iterable[Mapping[str, Any]]) -> bool:
    """Draws loss, accuracy and R@1 of metrics.jsonl by step, or returns False if it has none."""
    lines = list(lines)
    panels = {title: _read_series(lines, ending) for title, ending in PANELS.items()}
    panels = {title: series for title, series in panels.items() if series}
    if not panels:
        return False
    with matplotlib.rc_context(CHART_STYLE):
        layout = ConstrainedLayoutEngine(wspace=0.06, w_pad=0.1, h_pad=0.1)
        figure = Figure((4 * len(panels), 3.1), facecolor=PAPER, layout=layout)
        for k, (title, series) in enumerate(panels.items(), 1):
            _draw_panel(figure.add_subplot(1, len(panels), k), title, series)
        figure.savefig(path)
    return True


def _read_series(lines: Iterable[Mapping[str, Any]], ending: str) -> Series:
    """Returns the finite scalars whose key has the ending, in order of appearance."""
    series: Series = {}
    for line in lines:
        for key, value in line.items():
            is_finite = isinstance(value, int | float) and np.isfinite(value)
            if key.endswith(ending) and is_finite and "step" in line:
                series.setdefault(key, []).append((line["step"], value))
    return series


def smooth(values_N: np.ndarray, span: int) -> Float[np.ndarray, " N"]:
    """Returns the centred moving average over `span` values (fewer at the ends)."""
    window = np.ones(span)
    count_N = np.convolve(np.ones(len(values_N)), window, "same")
    return np.convolve(values_N, window, "same") / count_N


def _draw_panel(axes: Axes, title: str, series: Series) -> None:
    """Draws a line for each series, labelled with its last value."""
    colors = [BLUE, ORANGE, GREEN, MUTED, AMBER]
    highest = max(series, key=lambda key: series[key][-1][1])
    for k, (key, points) in enumerate(series.items()):
        (steps, values), color = np.array(points).T, colors[k % len(colors)]
        if len(values) > 60:
            axes.plot(steps, values, color=color, alpha=0.22, linewidth=0.8)
            values = smooth(values, len(values) // 30 | 1)
        label = key.rsplit("/", 1)[0].replace("/", ", ").replace("_", " ")
        marker = "o" if len(values) <= 20 else None
        axes.plot(steps, values, color=color, linewidth=1.8, marker=marker, ms=4, label=label)
        align = "center" if len(series) == 1 else "bottom" if key == highest else "top"
        axes.annotate(
            f"{values[-1]:.3g}", (steps[-1], values[-1]), (5, 0), textcoords="offset points",
            va=align, color=color, fontweight="bold", annotation_clip=False,
        )  # fmt: skip
    axes.set_title(title, loc="left", fontweight="bold", fontsize=11)
    axes.set_xlabel("step")
    axes.margins(x=0.09)
    axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
    axes.grid(axis="y")
    axes.legend(fontsize=8.5)
