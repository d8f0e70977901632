"""Selects the queries that a report shows, and draws its pictures as PNG."""

import collections
import dataclasses
import itertools
import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from PIL import Image

from xclip_jax.metrics import expected_ranks, retrieval_counts
from xclip_jax.report import canvas
from xclip_jax.report.canvas import BLUE, GREEN, INK, MUTED, Canvas, drawing_style

SHOWN, WORST, HITS = 6, 2, 3  # numbers of queries, worst misses among them, items per ranking
STRIP_FRAMES, FRAME_SIDE, FRAME_PITCH = 6, 112, 116  # frames of a strip, pixels of one, to the next
STRIP_WIDTH = (STRIP_FRAMES - 1) * FRAME_PITCH + FRAME_SIDE
CARD, INNER, MARGIN = 560, 524, 20  # pixels: width of a card and its content, space around cards
Videos = Int[np.ndarray, " Q"]  # video of each query
HEAT = LinearSegmentedColormap.from_list("heat", ["#f4f6fb", "#aebcf0", "#4a63d3", "#1b2a7a"])
MAX_WORDS, MAX_THUMBNAILS = 30, 12  # of a heat map
LABELS, WIDTH, ROW = 150, 760, 28  # pixels: column of words, heat map, height of a word
PANELS = {"loss": "Loss", "accuracy": "Accuracy in the batch", "R@1": "R@1, %"}


class RankedItem(NamedTuple):
    """A video (or text) that is a right answer of a query or among its first results."""

    label: str
    item: int
    text: str  # the caption, or the clip's name
    score: float
    kind: Literal["truth", "right", "wrong"]
    note: str = ""


class ShownQuery(NamedTuple):
    """A text (or video) with its right answer and the items ranked first."""

    item: int
    text: str  # the caption, or the clip's name
    rank: float  # of the best right item, as the metrics count it
    rank_label: str  # "✓ rank 1 of 1,000"
    truth: RankedItem  # the best right item, with the number of others as its note
    hits: list[RankedItem]  # best first
    reason: str  # why the query is shown


Strips = Mapping[int, Image.Image]  # of the shown videos
Queries = dict[str, list[ShownQuery]]  # by direction


def choose_queries(rank_Q: Float[np.ndarray, " Q"], video_Q: Videos) -> list[tuple[int, str]]:
    """Returns (query, reason) of a random sample and of the worst misses, no video twice.

    A miss is a query whose right answer is not ranked first. The sample does not depend on ranks.
    """
    missed = [q for q in np.argsort(-rank_Q, kind="stable").tolist() if rank_Q[q] > 1]
    order = np.random.default_rng(0).permutation(len(rank_Q)).tolist()
    sample, miss = "drawn at random", "one of the worst misses"
    first = SHOWN - min(WORST, len(missed))
    chosen: dict[int, tuple[int, str]] = {}  # by video
    # The third step counts if the worst misses are fewer, or of videos that are chosen already.
    steps = (order, sample, first), (missed, miss, SHOWN), (order, sample, SHOWN)
    for queries, reason, total in steps:
        for query in queries:
            if len(chosen) < total:
                chosen.setdefault(int(video_Q[query]), (query, reason))
    return sorted(chosen.values(), key=operator.itemgetter(1))


def rank_queries(
    sim_TxV: Float[np.ndarray, "T V"],
    text_video_T: Videos,
    captions: Sequence[str],
    clip_names: Sequence[str],
) -> Queries:
    """Returns the texts to show with the videos ranked first, and the videos with captions.

    As in the metric, only the best-scoring caption of each video is ranked.
    """
    counts, video_V = retrieval_counts(sim_TxV, text_video_T), np.arange(sim_TxV.shape[1])
    shown: Queries = {way: [] for way in counts}
    for way, scores_QxI, video_Q, video_I, texts_Q, texts_I in (  # of queries and items
        ("text_to_video", sim_TxV, text_video_T, video_V, captions, clip_names),
        ("video_to_text", sim_TxV.T, video_V, text_video_T, clip_names, captions),
    ):
        rank_Q = expected_ranks(*counts[way])
        for query, reason in choose_queries(rank_Q, video_Q):
            scores_I, is_right_I = scores_QxI[query], video_I == video_Q[query]
            order_I = np.argsort(-scores_I, kind="stable")
            _, first = np.unique(video_I[order_I], return_index=True)  # of each video
            hits = []
            for k, item in enumerate(map(int, order_I[np.sort(first)[:HITS]]), 1):
                label, kind = (f"{k} ✓", "right") if is_right_I[item] else (f"{k}", "wrong")
                hits.append(RankedItem(label, item, texts_I[item], float(scores_I[item]), kind))
            best, *others = map(int, order_I[is_right_I[order_I]])
            note = f"+ {len(others)} more" if others else ""
            score = float(scores_I[best])
            truth = RankedItem("true", best, texts_I[best], score, "truth", note)
            rank = float(rank_Q[query])
            label = f"{'✓ ' if rank == 1 else ''}rank {rank:g} of {len(video_V):,}"
            shown[way].append(ShownQuery(query, texts_Q[query], rank, label, truth, hits, reason))
    return shown


def make_strip(frames_FxSxSx3: UInt8[np.ndarray, "F S S 3"]) -> Image.Image:
    """Returns up to six evenly spaced frames in a row, RGBA with transparent gaps."""
    count = min(len(frames_FxSxSx3), STRIP_FRAMES)
    strip = Image.new("RGBA", (STRIP_WIDTH - (STRIP_FRAMES - count) * FRAME_PITCH, FRAME_SIDE))
    for k, index in enumerate(np.linspace(0, len(frames_FxSxSx3) - 1, count).round().astype(int)):
        frame = Image.fromarray(np.ascontiguousarray(frames_FxSxSx3[index]))
        frame = frame.resize((FRAME_SIDE, FRAME_SIDE), Image.Resampling.BICUBIC)
        strip.paste(frame, (k * FRAME_PITCH, 0))
    return strip


@drawing_style()
def draw_queries(path: Path, queries: list[ShownQuery], strips: Strips, *, are_texts: bool) -> None:
    """Draws a card for each text (or video), with its right answer and the items ranked first."""
    columns = min(2, len(queries))
    first, pitch = (123, 76) if are_texts else (170, 46)  # middle of the right answer, next row
    height = first + pitch * (0.5 + len(queries[0].hits)) + 22
    rows = -(-len(queries) // columns)
    sheet = Canvas(columns * (CARD + MARGIN) + MARGIN, rows * (height + MARGIN) + MARGIN)
    for k, query in enumerate(queries):
        row, column = divmod(k, columns)
        left, top = MARGIN + column * (CARD + MARGIN), MARGIN + row * (height + MARGIN)
        x, y, right = left + 18, top + first, left + 18 + INNER
        sheet.box(left, top, CARD, height, 10)
        color = GREEN if query.rank == 1 else canvas.AMBER
        sheet.text(x, top + 22, query.rank_label, 12, color, weight="bold")
        sheet.text(right, top + 22, query.reason, 11.5, MUTED, ha="right")
        if are_texts:
            sheet.paragraph(x, top + 58, query.text, INNER, 2, size=15, weight="bold")
        else:
            strip = strips[query.item]
            sheet.image(strip, x, top + 40, strip.width * INNER / STRIP_WIDTH, 85)
            sheet.paragraph(x, top + 137, query.text, INNER, size=10.5, color=MUTED)
        sheet.axes.hlines(y + pitch / 2 + 4, x, right, color=canvas.LINE, linewidth=0.72)
        for item in (query.truth, *query.hits):
            is_right, note = item.kind == "right", item.note
            if are_texts:
                strip, note = strips[item.item], item.text
                width = strip.width * 62 / FRAME_SIDE
                if is_right:
                    sheet.box(x + 33, y - 35, width + 8, 70, 4, facecolor=GREEN, edgecolor=GREEN)
                sheet.image(strip, x + 37, y - 31, width, 62)
            else:
                if is_right:
                    sheet.box(x, y - 21, INNER, 42, 5, facecolor="#e9f6ee", edgecolor=GREEN)
                sheet.paragraph(x + 42, y, item.text, INNER - 120, 2)
            color = GREEN if is_right else MUTED
            sheet.text(x + 16, y, item.label, 13, color, ha="center", weight="bold")
            above, score = 9 if note else 0, f"{item.score:.2f}"
            sheet.text(right - 8, y - above, score, ha="right", weight="bold")
            if note:
                sheet.paragraph(right - 8, y + 9, note, 88, size=10.5, color=MUTED, ha="right")
            y += pitch + (11 if item is query.truth else 0)
    sheet.figure.savefig(path)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WordFrameAttention:
    """The weights with which AOSM averages the word-frame similarities of one pair."""

    caption: str
    words: list[str]  # the W tokens that count as words
    clip: str  # name of the video
    times: list[float]  # seconds of its F frames
    frames_FxSxSx3: UInt8[np.ndarray, "F S S 3"]
    weights_WxF: Float[np.ndarray, "W F"]  # shares of the attention, with sum 1


@drawing_style()
def draw_attention(path: Path, attention: WordFrameAttention) -> None:
    """Draws a heat map of words by frames, with bars for the share of each word and frame.

    If a text has more than 30 words, those with the largest shares are shown, in text order.
    """
    num_words, columns = attention.weights_WxF.shape
    shown = np.sort(np.argsort(-attention.weights_WxF.sum(1), kind="stable")[:MAX_WORDS])
    weights_WxF = attention.weights_WxF[shown]
    thumbnails = min(columns, MAX_THUMBNAILS)  # each the middle frame of a group of columns
    cell = min(110, WIDTH / columns)
    group = cell * columns / thumbnails
    side = min(96, group - 3)
    top, right = 100 + side, LABELS + cell * columns
    bottom = top + ROW * len(shown)
    sheet = Canvas(LABELS + WIDTH + 140, bottom + 92)
    sheet.paragraph(24, 38, attention.caption, LABELS + WIDTH + 92, 2, size=15, weight="bold")
    for k in range(thumbnails):
        index, x = int((k + 0.5) * columns / thumbnails), LABELS + (k + 0.5) * group
        sheet.image(attention.frames_FxSxSx3[index], x - side / 2, 70, side, side)
        sheet.text(x, top - 15, f"{attention.times[index]:.3g} s", 11, MUTED, ha="center")
    largest = max(weights_WxF.max(), 1e-12)
    edges = LABELS + cell * np.arange(columns + 1), top + ROW * np.arange(len(shown) + 1)
    style = {"cmap": HEAT, "vmin": 0, "edgecolors": "white", "linewidth": min(1.1, cell / 30)}
    sheet.axes.pcolormesh(*edges, weights_WxF, **style)
    x_F, y_W = (((low[:-1] + low[1:]) / 2).tolist() for low in edges)
    if cell >= 40:
        for row, column in np.argwhere(weights_WxF >= largest / 5):
            weight = weights_WxF[row, column]
            color = "white" if weight > largest / 2 else INK
            sheet.text(x_F[column], y_W[row], f"{100 * weight:.1f}", 10.5, color, ha="center")
    for index, y in zip(shown, y_W, strict=True):
        word = attention.words[index]
        sheet.paragraph(LABELS - 10, y, word, LABELS - 36, size=13.5, ha="right")
    sheet.text(LABELS - 10, bottom + 24, "all words", 11, MUTED, ha="right")
    share_W, share_F = weights_WxF.sum(1), attention.weights_WxF.sum(0)
    bars_W = sheet.axes.barh(y_W, 70 * share_W / share_W.max(), 10, left=right + 10, color=BLUE)
    bars_F = sheet.axes.bar(x_F, 26 * share_F / share_F.max(), 0.8 * cell, bottom + 8, color=BLUE)
    for bars, shares in ((bars_W, share_W), (bars_F, share_F)):
        if bars is bars_W or cell >= 40:
            labels = [f"{share:.0%}" for share in shares]
            sheet.axes.bar_label(bars, labels, padding=4, color=MUTED, fontsize=8)
    notes = [attention.clip[:60], f"darkest cell {largest:.1%}"]
    if len(shown) < num_words:
        notes.append(f"the {len(shown)} of {num_words} words with the largest shares")
    sheet.paragraph(LABELS, bottom + 70, " · ".join(notes), WIDTH, size=11, color=MUTED)
    sheet.figure.savefig(path)


@drawing_style()
def draw_curves(path: Path, lines: Iterable[Mapping[str, Any]]) -> bool:
    """Draws loss, accuracy and R@1 of metrics.jsonl by step, or returns False if it has none."""
    panels = {name: collections.defaultdict(list) for name in PANELS}
    for line in lines:
        for key, value in line.items():
            name = key.rpartition("/")[2]
            if name in panels and math.isfinite(value):
                panels[name][key].append((line["step"], value))
    panels = {name: series for name, series in panels.items() if series}
    if not panels:
        return False
    figure = Figure((4 * len(panels), 3.1), layout="constrained")
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (name, series) in zip(all_axes, panels.items(), strict=True):
        highest = max(points[-1][1] for points in series.values())
        for color, (key, points) in zip(
            itertools.cycle(canvas.COLORS), series.items(), strict=False
        ):
            steps, values = np.array(points).T
            if len(values) > 60:
                axes.plot(steps, values, color=color, alpha=0.22, linewidth=0.8)
                values = smooth(values, len(values) // 30 | 1)
            label = key.rpartition("/")[0].replace("/", ", ").replace("_", " ")
            marker = "o" if len(values) <= 20 else None
            axes.plot(steps, values, color=color, linewidth=1.8, marker=marker, ms=4, label=label)
            above = "center" if len(series) == 1 else "bottom"
            axes.annotate(
                f"{values[-1]:.3g}", (steps[-1], values[-1]), (5, 0), textcoords="offset points",
                va=above if points[-1][1] == highest else "top", color=color, weight="bold",
            )  # fmt: skip
        axes.set_title(PANELS[name], loc="left", fontweight="bold", fontsize=11)
        axes.set_xlabel("step")
        axes.margins(x=0.09)
        axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
        axes.grid(axis="y")
        axes.legend(fontsize=8.5)
    figure.savefig(path)
    return True


def bin_ranks(rank_Q: Float[np.ndarray, " Q"], num_items: int) -> dict[str, float]:
    """Returns the percent of the queries by rank: 1, 2, 3–4, 5–8 and so on up to `num_items`.

    A rank between two whole ones, as ties have, counts in the bin of the next one.
    """
    ends_N = 2 ** np.arange(math.ceil(math.log2(num_items)) + 1)
    bounds = [(int(end) // 2 + 1, min(int(end), num_items)) for end in ends_N]
    labels = [f"{low}–{high}" if low < high else f"{high}" for low, high in bounds]
    counts_N = np.bincount(np.searchsorted(ends_N, np.ceil(rank_Q)), minlength=len(ends_N))
    return dict(zip(labels, (100 * counts_N / len(rank_Q)).tolist(), strict=True))


@drawing_style()
def draw_ranks(path: Path, rank_Q: Mapping[str, Float[np.ndarray, " Q"]], num_items: int) -> None:
    """Draws a histogram of the ranks of right answers among `num_items`, by direction."""
    figure = Figure((9, 2.6), layout="constrained")
    axes, width = figure.subplots(), 0.8 / len(rank_Q)
    for k, (color, (name, ranks)) in enumerate(zip(canvas.COLORS, rank_Q.items(), strict=False)):
        shares = bin_ranks(ranks, num_items)
        x_N = np.arange(len(shares)) + (k - (len(rank_Q) - 1) / 2) * width
        bars = axes.bar(x_N, list(shares.values()), 0.92 * width, color=color, label=name)
        texts = [f"{share:.1f}" if share else "" for share in shares.values()]
        axes.bar_label(bars, texts, padding=2, color=color, fontsize=7.5)
        axes.set_xticks(range(len(shares)), list(shares))
    axes.set_xlabel("rank of the right answer")
    axes.set_ylabel("queries, %")
    axes.grid(axis="y")
    axes.legend(fontsize=8.5)
    figure.savefig(path)


def smooth(values_N: np.ndarray, span: int) -> Float[np.ndarray, " N"]:
    """Returns the centred moving average over `span` values (fewer at the ends)."""
    window = np.ones(span)
    count_N = np.convolve(np.ones(len(values_N)), window, "same")
    return np.convolve(values_N, window, "same") / count_N
