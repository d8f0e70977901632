"""report/: a folder that shows what a model retrieves, readable from disk without a server.

`write_report` writes index.html and the pictures it shows; `format_table` is the same metric table
for a terminal. Captions and clip names are untrusted: everything printed is escaped.
"""

import dataclasses
import unicodedata
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from xclip_jax import figures

METRICS = ("R@1", "R@5", "R@10", "MdR", "MnR")
DIRECTIONS = (("text_to_video", "text to video"), ("video_to_text", "video to text"))


@dataclasses.dataclass
class Attention:
    """How AOSM spreads its attention over one pair's words and frames (W words, F frames)."""

    words: list[str]  # W tokens that count as words
    weights_WxF: np.ndarray  # share of the attention each word-frame cell gets; sums to 1
    times: list[float]  # seconds of the F frames
    caption: str
    frames_FxSxSx3: np.ndarray  # uint8
    clip: str  # its name


@dataclasses.dataclass
class Hit:
    """A video (or a text) that a query found."""

    item: int
    score: float
    right: bool


@dataclasses.dataclass
class Query:
    """A text (or a video) and what was ranked first for it."""

    item: int
    answers: list[int]  # right items, best score first
    score: float  # of the best right item
    rank: float  # of the best right item, as the metrics count it
    candidates: int
    hits: list[Hit]  # the best first
    reason: str = ""  # why it is shown


def format_table(results):
    """The metrics of `results` (see results.json) as an aligned plain-text table."""
    lines = [
        f"{results['split']} split, step {results['step']}: "
        f"{count(results['num_texts'], 'text')}, {count(results['num_videos'], 'video')}"
    ]
    if results.get("note"):
        lines.append(f"note: {results['note']}")
    lines.append(" " * 13 + "".join(f"{name:>8}" for name in METRICS))
    for key, name in DIRECTIONS:
        lines.append(f"{name:13}" + "".join(f"{cell:>8}" for cell in cells(results[key])))
    return "\n".join(lines)


def cells(metrics):
    return ["-" if metrics.get(name) is None else f"{metrics[name]:.1f}" for name in METRICS]


def count(number, noun):
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def expected_ranks(scores_QxC, right_Q):
    """Rank of candidate right_Q[q] for query q: 1 + better ones + half of those that tie."""
    right_Qx1 = np.take_along_axis(scores_QxC, np.asarray(right_Q)[:, None], axis=1)
    equal_Q = (scores_QxC == right_Qx1).sum(1) - 1
    return 1 + (scores_QxC > right_Qx1).sum(1) + equal_Q / 2


def pick(rank_Q, video_Q, number=6, misses=2, seed=0):
    """The queries to show, [(query, reason)]: most drawn at random, then some of the worst misses.

    A miss is a right answer not ranked first. `video_Q` is each query's video: none comes twice.
    The random draw comes first and does not look at the ranks, so it is a fair sample.
    """

    def first_of_each(queries, seen):
        return [q for q in queries if video_Q[q] not in seen and not seen.add(video_Q[q])]

    missed = [q for q in np.argsort(-np.asarray(rank_Q), kind="stable") if rank_Q[q] > 1]
    order = np.random.default_rng(seed).permutation(len(rank_Q))
    drawn = first_of_each(order, set())[: number - min(misses, len(missed))]
    worst = first_of_each(missed, {video_Q[q] for q in drawn})[:misses]
    drawn = first_of_each(order, {video_Q[q] for q in worst})[: number - len(worst)]
    return [(int(q), "drawn at random") for q in drawn] + [
        (int(q), "one of the worst misses") for q in worst
    ]


def text_queries(sim_TxV, text_video, top=3, **options):
    """Texts to show and the `top` videos ranked first for each; `options` as of `pick`."""
    rank_T = expected_ranks(sim_TxV, text_video)
    queries = []
    for text, reason in pick(rank_T, text_video, **options):
        best = np.argsort(-sim_TxV[text], kind="stable")[:top]
        truth = int(text_video[text])
        hits = [Hit(int(v), float(sim_TxV[text, v]), bool(v == truth)) for v in best]
        score, rank = float(sim_TxV[text, truth]), float(rank_T[text])
        queries.append(Query(text, [truth], score, rank, sim_TxV.shape[1], hits, reason))
    return queries


def video_queries(sim_TxV, text_video, top=3, **options):
    """Videos to show and the `top` captions ranked first; `options` as of `pick`.

    As in the metric, a video competes with its best-scoring caption only: one caption per video.
    """
    order = np.argsort(text_video, kind="stable")
    described_C, starts = np.unique(text_video[order], return_index=True)  # C videos with captions
    scores_CxV = np.maximum.reduceat(sim_TxV[order], starts, axis=0)
    scores_CxC = scores_CxV[:, described_C].T  # rows: the video asked for; columns: candidates
    rank_C = expected_ranks(scores_CxC, np.arange(len(described_C)))
    queries = []
    for c, reason in pick(rank_C, described_C, **options):
        video = int(described_C[c])

        def captions_of(candidate, video=video):  # best first
            texts = np.flatnonzero(text_video == described_C[candidate])
            return texts[np.argsort(-sim_TxV[texts, video], kind="stable")].tolist()

        best = np.argsort(-scores_CxC[c], kind="stable")[:top]
        hits = [Hit(captions_of(b)[0], float(scores_CxC[c, b]), bool(b == c)) for b in best]
        score, rank = float(scores_CxC[c, c]), float(rank_C[c])
        queries.append(Query(video, captions_of(c), score, rank, len(described_C), hits, reason))
    return queries


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
      sim_TxV: logits, rows texts, columns videos.
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
    sim_TxV = np.asarray(sim_TxV, np.float32)
    sim_TxV = np.where(np.isnan(sim_TxV), -np.inf, sim_TxV)  # of a model that diverged: ranked last
    text_video = np.asarray(text_video)

    by_text, by_video = text_queries(sim_TxV, text_video), video_queries(sim_TxV, text_video)
    videos = {query.answers[0] for query in by_text} | {query.item for query in by_video}
    videos |= {hit.item for query in by_text for hit in query.hits}
    strips = {video: figures.make_strip(load_frames(video)) for video in sorted(videos)}
    for video, strip in strips.items():
        Image.fromarray(strip).save(directory / strip_path(video), optimize=True)

    figures.draw_text_to_video(
        directory / "text_to_video.png", by_text, captions, clip_names, strips
    )
    figures.draw_video_to_text(
        directory / "video_to_text.png", by_video, captions, clip_names, strips
    )
    attentions = [one for one in attentions if np.size(one.weights_WxF)]
    for k, attention in enumerate(attentions, 1):
        figures.draw_attention(directory / f"attention_{k}.png", attention)
    has_curves = figures.draw_curves(directory / "curves.png", curves)

    widths = {video: strip.shape[1] for video, strip in strips.items()}
    several = len(captions) > len(np.unique(text_video))
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


def strip_path(video):
    return f"strips/clip_{video:05}.png"


def safe(text):
    """Escaped for HTML, without control characters."""
    kept = ("" if unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t" else c for c in text)
    return escape("".join(kept).strip())


def caption_html(text, tag="p", kind="caption"):
    inner = safe(text) or "<i>(empty caption)</i>"
    return f'<{tag} class="{kind}" dir="auto" tabindex="0">{inner}</{tag}>'


def strip_html(video, name, widths):
    share = 100 * widths[video] / figures.strip_width()
    source, name = strip_path(video), safe(name)
    return f'<img class="strip" src="{source}" alt="frames of {name}" style="width:{share:.2f}%">'


def row_html(label, content, score, note="", kind=""):
    """A line of a card: its label, what was found, the score and a note under it."""
    return (
        f'<div class="row {kind}"><b class="label">{label}</b><div class="found">{content}</div>'
        f'<div class="score"><b>{score:.2f}</b>{note}</div></div>'
    )


def card_html(query, head, rows):
    kind = "good" if query.rank == 1 else "bad"
    mark = "✓ " if query.rank == 1 else ""
    return (
        f'<article><div class="line"><span class="rank {kind}">{mark}rank {query.rank:g} of '
        f'{query.candidates:,}</span><span class="why">{query.reason}</span></div>'
        f"{head}{''.join(rows)}</article>"
    )


def hit_label(position, hit):
    return (f"{position} ✓", "right") if hit.right else (f"{position}", "wrong")


def text_section(queries, captions, clip_names, widths):
    def row(label, video, score, kind):
        name = clip_names[video]
        note = f'<span class="name" title="{safe(name)}">{safe(name)}</span>'
        return row_html(label, strip_html(video, name, widths), score, note, kind)

    cards = []
    for query in queries:
        rows = [row("true", query.answers[0], query.score, "truth")]
        for position, hit in enumerate(query.hits, 1):
            label, kind = hit_label(position, hit)
            rows.append(row(label, hit.item, hit.score, kind))
        cards.append(card_html(query, caption_html(captions[query.item], "h3"), rows))
    return section(
        "Text to video",
        "A caption, the clip it describes, and the three clips the model ranks first; "
        'green is the right one. As one picture: <a href="text_to_video.png">text_to_video.png</a>',
        f'<div class="cards">{"".join(cards)}</div>',
    )


def video_section(queries, captions, clip_names, widths, several):
    cards = []
    for query in queries:
        name = clip_names[query.item]
        head = strip_html(query.item, name, widths) + f'<p class="name wide">{safe(name)}</p>'
        more = len(query.answers) - 1
        note = f'<span class="name">+ {more} more</span>' if more else ""
        truth = caption_html(captions[query.answers[0]])
        rows = [row_html("true", truth, query.score, note, "truth")]
        for position, hit in enumerate(query.hits, 1):
            label, kind = hit_label(position, hit)
            rows.append(row_html(label, caption_html(captions[hit.item]), hit.score, "", kind))
        cards.append(card_html(query, head, rows))
    return section(
        "Video to text",
        "A clip, a caption that describes it, and the three captions the model ranks first"
        + (" (of every clip, its best-scoring caption)" if several else "")
        + '. As one picture: <a href="video_to_text.png">video_to_text.png</a>',
        f'<div class="cards">{"".join(cards)}</div>',
    )


def attention_section(attentions):
    pictures = [
        f'<figure><div class="scroll"><img src="attention_{k}.png" alt="attention map of '
        f'{safe(one.caption[:300])}"></div></figure>'
        for k, one in enumerate(attentions, 1)
    ]
    return section(
        "What it looks at",
        "The share of AOSM's attention that each pair of a word and a frame gets, in percent of "
        "the whole; the bars add up the rows and the columns.",
        "".join(pictures),
    )


def section(title, sentence, content):
    return f"<section><h2>{title}</h2><p class=lead>{sentence}</p>{content}</section>"


def metrics_html(results):
    """The metric table, with what a random order would get among as many videos."""
    videos = results["num_videos"]
    middle = (videos + 1) / 2
    chance = {f"R@{k}": 100 * min(1, k / videos) for k in (1, 5, 10)} | {
        "MdR": middle,
        "MnR": middle,
    }
    rows = [(name, results[key], "") for key, name in DIRECTIONS] + [("chance", chance, "chance")]
    body = ""
    for name, metrics, kind in rows:
        body += f'<tr class="{kind}"><th>{name}</th>'
        for metric, cell in zip(METRICS, cells(metrics), strict=True):
            filled = f"--filled:{metrics.get(metric) or 0:.1f}%"
            body += f'<td style="{filled}">{cell}</td>' if metric[1] == "@" else f"<td>{cell}</td>"
        body += "</tr>"
    head = "".join(f"<th>{metric}</th>" for metric in METRICS)
    return (
        f'<div class="scroll table"><table><tr><th></th>{head}</tr>{body}</table></div>'
        "<p class=lead>R@K: percent of queries whose right answer is among the first K. MdR, MnR: "
        f"median and mean rank of the right answer, 1 is perfect. Chance: a random order of "
        f"{count(videos, 'video')}.</p>"
    )


def page(results, sections):
    note = f'<p class="note">{safe(results["note"])}</p>' if results.get("note") else ""
    texts, videos = count(results["num_texts"], "text"), count(results["num_videos"], "video")
    facts = f"{safe(results['split'])} split · step {results['step']} · {texts} · {videos}"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        'content="width=device-width, initial-scale=1"><meta name="color-scheme" '
        f'content="light dark"><title>Video-text retrieval report</title><style>{STYLE}</style>'
        f"</head><body><header><h1>Video-text retrieval</h1><p class=facts>{facts}</p>{note}"
        f"</header>{metrics_html(results)}{''.join(sections)}<footer>Numbers: "
        '<a href="../results.json">results.json</a>, <a href="../metrics.jsonl">metrics.jsonl</a>'
        "</footer></body></html>\n"
    )


CURVES = section(
    "Training",
    "Loss, accuracy and R@1 over the steps; where a line is faint, the strong one is its moving "
    "average.",
    '<figure class="curves"><div class="scroll"><img src="curves.png" alt="training curves"></div>'
    "</figure>",
)

STYLE = """
:root { --paper: #f6f7f9; --card: #fff; --ink: #1c2330; --muted: #626b7a; --line: #e3e6eb;
  --good: #15803d; --soft: #e9f6ee; --bad: #b45309; --link: #3452c7 }
@media (prefers-color-scheme: dark) { :root { --paper: #11141a; --card: #1a1f28; --ink: #e8ebf1;
  --muted: #9aa4b5; --line: #2d3441; --good: #4ade80; --soft: #16301f; --bad: #fbbf24;
  --link: #9db2ff }
  .curves img { filter: invert(.9) hue-rotate(180deg) } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 76rem; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif }
h1 { margin: 0; font-size: 2rem; letter-spacing: -.02em }
h2 { margin: 3rem 0 0; font-size: 1.4rem; letter-spacing: -.01em }
a { color: var(--link) }
.facts, .lead { margin: .2rem 0 1rem; color: var(--muted) }
.lead { max-width: 46rem; font-size: .95rem }
.note { padding: .7rem 1rem; border-left: 4px solid var(--bad); border-radius: 6px;
  background: var(--card); font-weight: 600 }
.scroll { overflow-x: auto }
.table, article, figure { background: var(--card); border: 1px solid var(--line);
  border-radius: 12px }
.table { margin: 1.5rem 0 .8rem; max-width: 46rem }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .6rem .9rem; text-align: right; white-space: nowrap }
th { color: var(--muted); font-weight: 600; font-size: .85rem }
th:first-child { text-align: left }
tr + tr { border-top: 1px solid var(--line) }
td { font-size: 1.15rem; font-weight: 600;
  background: linear-gradient(90deg, var(--link) var(--filled), var(--line) 0)
    right .9rem bottom 5px / 4.2rem 3px no-repeat }
td:not([style]) { background: none }
.chance td { color: var(--muted); font-weight: 400; font-size: .95rem }
.cards { display: grid; gap: 1.1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 30rem), 1fr)) }
article { padding: 1rem 1.1rem; min-width: 0 }
.line { display: flex; justify-content: space-between; gap: 1rem; margin-bottom: .35rem;
  font-size: .82rem }
.rank { font-weight: 700 } .why, .label, .name { color: var(--muted) }
.good, .right .label { color: var(--good) } .bad { color: var(--bad) }
.caption { margin: 0; overflow: hidden; overflow-wrap: anywhere; display: -webkit-box;
  -webkit-box-orient: vertical; -webkit-line-clamp: 3; font-size: .95rem; line-height: 1.4 }
.caption:focus { -webkit-line-clamp: none; outline: none }
h3.caption { margin: 0 0 .7rem; font-size: 1.05rem; min-height: 1.4em }
.row { display: grid; grid-template-columns: 2rem minmax(0, 1fr) 5.3rem; gap: .5rem;
  align-items: center; padding: .3rem 0 }
.truth { border-bottom: 1px solid var(--line); padding-bottom: .6rem; margin-bottom: .3rem }
.label { font-size: .85rem; text-align: center }
.found { min-width: 0; padding: 3px; border: 2px solid transparent; border-radius: 6px }
.right .found { border-color: var(--good); background: var(--soft) }
.score { font-variant-numeric: tabular-nums; font-size: .95rem; line-height: 1.25; min-width: 0 }
.name { display: block; font-size: .72rem; overflow: hidden; text-overflow: ellipsis;
  white-space: nowrap }
.wide { margin: .2rem 0 .5rem }
.strip { display: block; border-radius: 3px }
figure { margin: 0 0 1.1rem; padding: .6rem; background: #fff }
figure img { display: block; margin: auto; width: 100%; min-width: 42rem; max-width: 62rem }
@media (prefers-color-scheme: dark) { .curves { background: #191919 } }
footer { margin-top: 3rem; color: var(--muted) }
@media (max-width: 32rem) {
  body { padding: 1.5rem .75rem 3rem } article { padding: .8rem }
  .row { grid-template-columns: 1.9rem minmax(0, 1fr) 4.3rem; gap: .35rem }
  th, td { padding: .6rem .3rem } th { font-size: .78rem } td { font-size: .95rem;
    background-size: 2.2rem 3px; background-position: right .3rem bottom 5px }
  .chance td { font-size: .85rem } }
"""
