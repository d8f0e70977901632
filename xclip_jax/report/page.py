"""index.html of a report. Captions and clip names are untrusted: everything printed is escaped."""

import unicodedata
from html import escape
from importlib.resources import files

from xclip_jax.report.strips import strip_width
from xclip_jax.report.table import METRICS, cells, count, facts, table_rows


def strip_path(video):
    """Where a video's strip lies, below the report's folder."""
    return f"strips/clip_{video:05}.png"


def safe(text):
    """Escaped for HTML, without control characters."""
    kept = ("" if unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t" else c for c in text)
    return escape("".join(kept).strip())


def caption_html(text, tag="p", kind="caption"):
    """A caption, escaped, cut to three lines until it is focused."""
    inner = safe(text) or "<i>(empty caption)</i>"
    return f'<{tag} class="{kind}" dir="auto" tabindex="0">{inner}</{tag}>'


def strip_html(video, name, widths):
    """A video's strip, as wide as its share of a full one."""
    share = 100 * widths[video] / strip_width()
    source, name = strip_path(video), safe(name)
    return f'<img class="strip" src="{source}" alt="frames of {name}" style="width:{share:.2f}%">'


def row_html(label, content, score, note="", kind=""):
    """A line of a card: its label, what was found, the score and a note under it."""
    return (
        f'<div class="row {kind}"><b class="label">{label}</b><div class="found">{content}</div>'
        f'<div class="score"><b>{score:.2f}</b>{note}</div></div>'
    )


def card_html(query, head, rows):
    """One query: its rank, its head, and a row for each answer."""
    kind = "good" if query.rank == 1 else "bad"
    mark = "✓ " if query.rank == 1 else ""
    return (
        f'<article><div class="line"><span class="rank {kind}">{mark}rank {query.rank:g} of '
        f'{query.candidates:,}</span><span class="why">{query.reason}</span></div>'
        f"{head}{''.join(rows)}</article>"
    )


def hit_label(position, hit):
    """(label, CSS class) of the answer at a position, counted from 1."""
    return (f"{position} ✓", "right") if hit.right else (f"{position}", "wrong")


def text_section(queries, captions, clip_names, widths):
    """The cards of text-to-video queries."""

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
    """The cards of video-to-text queries."""
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
    """The heat maps."""
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
    """A heading, a sentence on what is shown, and the content."""
    return f"<section><h2>{title}</h2><p class=lead>{sentence}</p>{content}</section>"


def metrics_html(results):
    """The metric table, with what a random order would get among as many videos."""
    videos = results["num_videos"]
    middle = (videos + 1) / 2
    chance = {f"R@{k}": 100 * min(1, k / videos) for k in (1, 5, 10)} | {
        "MdR": middle,
        "MnR": middle,
    }
    rows = [*table_rows(results), ("chance", chance, "chance")]
    body = ""
    for name, metrics, kind in rows:
        body += f'<tr class="{kind}"><th>{name.strip()}</th>'
        for metric, cell in zip(METRICS, cells(metrics), strict=True):
            filled = f"--filled:{metrics.get(metric) or 0:.1f}%"
            body += f'<td style="{filled}">{cell}</td>' if metric[1] == "@" else f"<td>{cell}</td>"
        body += "</tr>"
    head = "".join(f"<th>{metric}</th>" for metric in METRICS)
    note = " Rows of the paper are what X-CLIP reports, not ours." if results.get("paper") else ""
    return (
        f'<div class="scroll table"><table><tr><th></th>{head}</tr>{body}</table></div>'
        "<p class=lead>R@K: percent of queries whose right answer is among the first K. MdR, MnR: "
        f"median and mean rank of the right answer, 1 is perfect. Chance: a random order of "
        f"{count(videos, 'video')}.{note}</p>"
    )


def page(results, sections):
    """The whole index.html."""
    note = f'<p class="note">{safe(results["note"])}</p>' if results.get("note") else ""
    about = " · ".join(map(safe, facts(results)))
    style = files(__package__).joinpath("style.css").read_text(encoding="utf-8")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        'content="width=device-width, initial-scale=1"><meta name="color-scheme" '
        f'content="light dark"><title>Video-text retrieval report</title><style>{style}</style>'
        f"</head><body><header><h1>Video-text retrieval</h1><p class=facts>{about}</p>{note}"
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
