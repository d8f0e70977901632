"""The pictures of a report: what was retrieved, what was attended to, how training went (PNG)."""

import dataclasses

import matplotlib
import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

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
    boxes_for_missing_glyphs,
    printable,
)
from xclip_jax.report.strips import FRAME_SIDE, resize, strip_width

HEAT = LinearSegmentedColormap.from_list("heat", ["#f4f6fb", "#aebcf0", "#4a63d3", "#1b2a7a"])


@dataclasses.dataclass
class Attention:
    """How AOSM spreads its attention over one pair's words and frames (W words, F frames)."""

    words: list[str]  # W tokens that count as words
    weights_WxF: np.ndarray  # share of the attention each word-frame cell gets; sums to 1
    times: list[float]  # seconds of the F frames
    caption: str
    frames_FxSxSx3: np.ndarray  # uint8
    clip: str  # its name


CARD, MARGIN = 560, 20  # width of one query's card, space around the cards


def cards(queries, height, draw):
    """Two columns of cards; `draw(canvas, query, x, y)` fills one, from its inner corner."""
    columns = min(2, max(1, len(queries)))
    rows = max(1, -(-len(queries) // columns))
    pitch = height + MARGIN
    canvas = Canvas(columns * (CARD + MARGIN) + MARGIN, rows * pitch + MARGIN)
    for k, query in enumerate(queries):
        x, y = MARGIN + k % columns * (CARD + MARGIN), MARGIN + k // columns * pitch
        canvas.box(x, y, CARD, height, radius=10)
        draw(canvas, query, x + 18, y + 14)
    return canvas


def rank_line(canvas, query, x, y):
    """Rank of the right answer, and why this query is shown."""
    right = query.rank == 1
    label = f"{'✓ ' if right else ''}rank {query.rank:g} of {query.candidates:,}"
    canvas.text(x, y, label, size=12, color=GREEN if right else AMBER, weight="bold")
    canvas.text(x + CARD - 36, y, query.reason, size=11.5, color=MUTED, align="right")


@boxes_for_missing_glyphs()
def draw_text_to_video(path, queries, captions, clip_names, strips):
    """Of every query: the caption, the clip it describes, and the three clips ranked first."""
    side = 62
    full = strip_width() / FRAME_SIDE * side

    def row(canvas, x, y, video, label, score, right, color):
        strip = strips[video]
        width = strip.shape[1] / strip.shape[0] * side
        canvas.text(
            x + 14, y + side / 2, label, size=13, color=color, align="center", weight="bold"
        )
        if right:
            canvas.box(x + 33, y - 4, width + 8, side + 8, GREEN, GREEN, radius=4)
        canvas.image(strip, x + 37, y, width, side, interpolation="lanczos")
        beside = x + 37 + full + 12
        canvas.text(beside, y + side / 2 - 9, f"{score:.2f}", 13, INK, weight="bold")
        name = canvas.wrap(clip_names[video], CARD - 36 - full - 49, 1, 10.5)[0]
        canvas.text(beside, y + side / 2 + 9, name, 10.5, MUTED)

    def card(canvas, query, x, y):
        rank_line(canvas, query, x, y + 8)
        canvas.paragraph(x, y + 44, captions[query.item], CARD - 36, 2, size=15, weight="bold")
        y += 78
        row(canvas, x, y, query.answers[0], "true", query.score, False, MUTED)
        canvas.bar(x, y + side + 9, CARD - 36, 1, LINE)
        for k, hit in enumerate(query.hits):
            top = y + side + 22 + k * (side + 14)
            color = GREEN if hit.right else MUTED
            label = f"{k + 1} ✓" if hit.right else str(k + 1)
            row(canvas, x, top, hit.item, label, hit.score, hit.right, color)

    hits = max((len(query.hits) for query in queries), default=0)
    cards(queries, 14 + 78 + side + 22 + hits * (side + 14) + 4, card).save(path)


@boxes_for_missing_glyphs()
def draw_video_to_text(path, queries, captions, clip_names, strips):
    """Of every clip: its frames, the captions that describe it, and the three ranked first."""
    width, row = CARD - 36, 46
    side = width * FRAME_SIDE / strip_width()

    def line(canvas, x, y, label, color, caption, score, note=""):
        canvas.text(x + 19, y, label, 13, color, "center", "bold")
        canvas.paragraph(x + 42, y, caption, width - 112, 2, size=13)
        canvas.text(x + width - 8, y - 8 * bool(note), f"{score:.2f}", 13, INK, "right", "bold")
        canvas.text(x + width - 8, y + 9, note, 10.5, MUTED, "right")

    def card(canvas, query, x, y):
        rank_line(canvas, query, x, y + 8)
        strip = strips[query.item]
        y += 26
        canvas.image(strip, x, y, strip.shape[1] / strip.shape[0] * side, side)
        name = canvas.wrap(clip_names[query.item], width, 1, 10.5)[0]
        canvas.text(x, y + side + 12, name, 10.5, MUTED)
        y += side + 46
        more = len(query.answers) - 1
        note = f"+ {more} more" if more else ""
        line(canvas, x, y, "true", MUTED, captions[query.answers[0]], query.score, note)
        canvas.bar(x, y + 28, width, 1, LINE)
        for k, hit in enumerate(query.hits):
            middle = y + 60 + k * row
            color = GREEN if hit.right else MUTED
            if hit.right:
                canvas.box(x, middle - 21, width, 42, "#e9f6ee", GREEN, radius=5)
            label = f"{k + 1} ✓" if hit.right else str(k + 1)
            line(canvas, x, middle, label, color, captions[hit.item], hit.score)

    hits = max((len(query.hits) for query in queries), default=0)
    cards(queries, 14 + side + 72 + 35 + hits * row + 12, card).save(path)


@boxes_for_missing_glyphs()
def draw_attention(path, attention, most_words=30, most_thumbnails=12):
    """Words down, frames across, darker where AOSM looks; bars hold each word's and frame's share.

    Of a text with more than `most_words` words, those that hold most are shown, in their order.
    """
    weights_WxF = np.asarray(attention.weights_WxF, float)
    frames = np.asarray(attention.frames_FxSxSx3)
    shown = np.sort(np.argsort(-weights_WxF.sum(1), kind="stable")[:most_words])
    rows, columns = len(shown), weights_WxF.shape[1]
    groups = min(columns, most_thumbnails)  # of columns; each has its middle frame as thumbnail
    left, right, row = 150, 140, 28
    width, height = 760, rows * row
    cell = min(110, width / columns)
    side = min(96, cell * columns / groups - 3)
    notes = [printable(attention.clip)[:60], f"darkest cell {weights_WxF.max():.1%}"]
    if rows < len(attention.words):
        notes.append(f"the {rows} of {len(attention.words)} words that hold most")
    top = 74 + side + 26
    canvas = Canvas(left + width + right, top + height + 92)
    canvas.paragraph(24, 38, attention.caption, left + width + right - 48, 2, 15, weight="bold")

    for k in range(groups):
        index = int((k + 0.5) * columns / groups)
        middle = left + (k + 0.5) * cell * columns / groups
        canvas.image(resize(frames[index], 2 * FRAME_SIDE), middle - side / 2, 70, side, side)
        seconds = f"{attention.times[index]:.3g} s"
        canvas.text(middle, top - 15, seconds, 11, MUTED, "center")

    strongest = max(weights_WxF.max(), 1e-12)
    heat = {"cmap": HEAT, "vmin": 0, "vmax": strongest, "interpolation": "nearest"}
    canvas.image(weights_WxF[shown], left, top, cell * columns, height, **heat)
    for k in range(1, rows):
        canvas.bar(left, top + k * row - 0.75, cell * columns, 1.5, PAPER)
    for k in range(1, columns if columns <= 32 else 0):
        canvas.bar(left + k * cell - 0.75, top, 1.5, height, PAPER)

    word_shares, frame_shares = weights_WxF.sum(1), weights_WxF.sum(0)
    for k, index in enumerate(shown):
        middle = top + (k + 0.5) * row
        word = canvas.wrap(attention.words[index], left - 36, 1, 13.5)[0]
        canvas.text(left - 10, middle, word, 13.5, INK, "right")
        share = word_shares[index]
        canvas.bar(left + cell * columns + 10, middle - 5, 70 * share / word_shares.max(), 10, BLUE)
        x = left + cell * columns + 16 + 70 * share / word_shares.max()
        canvas.text(x, middle, f"{share:.0%}", 11, MUTED)
        for column in range(columns if cell >= 40 else 0):
            weight = weights_WxF[index, column]
            if weight >= strongest / 5:
                color = PAPER if weight > strongest / 2 else INK
                x = left + (column + 0.5) * cell
                canvas.text(x, middle, f"{100 * weight:.1f}", 10.5, color, "center")
    canvas.text(left - 10, top + height + 24, "all words", 11, MUTED, "right")
    for column, share in enumerate(frame_shares):
        x, tall = left + (column + 0.1) * cell, 26 * share / frame_shares.max()
        canvas.bar(x, top + height + 8, 0.8 * cell, tall, BLUE)
        if cell >= 40:
            middle = left + (column + 0.5) * cell
            canvas.text(middle, top + height + 18 + tall, f"{share:.0%}", 11, MUTED, "center")
    canvas.text(left, top + height + 70, " · ".join(notes), 11, MUTED)
    canvas.save(path)


def series(curves, ending):
    """{key: (steps, values)} of the finite scalars whose key ends so, in order of appearance."""
    found = {}
    for line in curves:
        for key, value in line.items():
            number = isinstance(value, int | float) and np.isfinite(value)
            if key.endswith(ending) and number and "step" in line:
                steps, values = found.setdefault(key, ([], []))
                steps.append(line["step"])
                values.append(value)
    return found


def smooth(values, span):
    """Centred moving average over `span` values, fewer at the ends."""
    window = np.ones(span)
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


PANELS = (("Loss", "/loss"), ("Accuracy in the batch", "/accuracy"), ("R@1, %", "/R@1"))


def draw_curves(path, curves):
    """Loss, accuracy and R@1 over the steps; returns False, drawing nothing, if none is there."""
    panels = [(title, series(curves, ending)) for title, ending in PANELS]
    panels = [(title, found) for title, found in panels if found]
    if not panels:
        return False
    with matplotlib.rc_context({"font.family": "DejaVu Sans", "text.color": INK, "font.size": 9}):
        figure = Figure((4 * len(panels), 3.1), facecolor=PAPER, layout="constrained")
        figure.get_layout_engine().set(wspace=0.06, w_pad=0.1, h_pad=0.1)
        for axes, (title, found) in zip(
            np.ravel(figure.subplots(1, len(panels))), panels, strict=True
        ):
            draw_panel(axes, title, found)
        figure.savefig(path, dpi=DOTS_PER_INCH)
    return True


def draw_panel(axes, title, found):
    """One quantity over the steps, a line for each series found."""
    colors = [BLUE, ORANGE, GREEN, MUTED, AMBER]
    highest = max(found, key=lambda key: found[key][1][-1])
    for k, (key, (steps, values)) in enumerate(found.items()):
        color = colors[k % len(colors)]
        if len(values) > 60:
            axes.plot(steps, values, color=color, alpha=0.22, linewidth=0.8)
            values = smooth(values, len(values) // 30 | 1)
        label = key.rsplit("/", 1)[0].replace("/", ", ").replace("_", " ")
        marker = "o" if len(values) <= 20 else None
        axes.plot(steps, values, color=color, linewidth=1.8, marker=marker, ms=4, label=label)
        beside = "center" if len(found) == 1 else "bottom" if key == highest else "top"
        axes.annotate(
            f"{values[-1]:.3g}", (steps[-1], values[-1]), (5, 0), textcoords="offset points",
            va=beside, color=color, fontweight="bold", annotation_clip=False,
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
