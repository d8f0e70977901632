"""Tests of the report: rankings, numbers, untrusted captions, extreme sizes."""

import html.parser
import warnings

import numpy as np
import pytest
from PIL import Image

from xclip_jax import report
from xclip_jax.report import canvas, figures

NASTY = [
    "<script>alert('x')</script> & \"quotes\"",
    "broken mathematics: $\\frac{1}{0$",
    "",
    "a dog 🐕‍🦺 and 猫がソファの上で寝ている 👩🏽‍🚀",
    "line\nbreak\ttab\x00 \u202ertl مرحبا \ud800",
    "word " * 500,
    "猫" * 400,
]

SOURCE = {
    "name": "<script>run</script>" * 9,
    "provenance": {"training": {}, "evaluation": {"command": "<script>rm *", "seconds": 2.0}},
}


def frames_of(video, frames=3, side=32):
    return np.random.default_rng(video).integers(0, 256, (frames, side, side, 3), np.uint8)


def results_of(texts, videos, **extra):
    recalls = {"R@1": 45.234, "R@5": 71.0, "R@10": 100.0, "MdR": 2.0, "MnR": 14.75}
    directions = {"text_to_video": recalls, "video_to_text": dict(recalls, MdR=2.5)}
    sizes = {"step": 1200, "split": "test", "num_texts": texts, "num_videos": videos}
    sizes |= {"protocol": "many captions", "expected_videos": videos + 3, "dataset": "captions"}
    sizes |= {"selected_on": "last step", "max_seconds": None, "name": "my run"}
    return {**sizes, **directions, **extra}


def attention_of(caption, words=4, frames=3):
    weights_WxF = np.random.default_rng(0).dirichlet(np.ones(words * frames))
    return figures.WordFrameAttention(
        words=(caption.split() + ["$x$"] * words)[:words],
        weights_WxF=weights_WxF.reshape(words, frames),
        times=[float(k) for k in range(frames)],
        caption=caption,
        frames_FxSxSx3=frames_of(0, frames),
        clip="clip0.mp4",
    )


def make_report(directory, captions, text_video, videos, frames=3, names=None, **options):
    sim_TxV = np.random.default_rng(1).normal(size=(len(captions), videos)).astype(np.float32)
    return report.write_report(
        directory,
        options.pop("results", results_of(len(captions), videos)),
        sim_TxV,
        captions=captions,
        text_video_T=np.asarray(text_video),
        clip_names=names or [f"clip{v}.mp4" for v in range(videos)],
        load_frames=lambda video: frames_of(video, frames),
        **options,
    )


class Page(html.parser.HTMLParser):
    """The text, the tags and the linked files of a page."""

    def __init__(self, path):
        super().__init__()
        self.text, self.tags, self.sources, self.links = "", [], [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name == "src"]
        self.links += [value for name, value in attrs if name == "href"]

    def handle_data(self, data):
        self.text += data


def test_text_queries_rank_videos_and_mark_the_right_one():
    sim_TxV = np.array([[1, 9, 5, 7], [8, 2, 3, 4], [6, 5, 4, 3], [1, 2, 3, 4]], np.float32)
    by_text, _ = figures.rank_queries(sim_TxV, np.array([3, 1, 0, 2]), "abcd", "wxyz").values()
    shown = {query.item: query for query in by_text}
    assert [(hit.item, hit.score, hit.kind) for hit in shown[0].hits] == [
        (1, 9, "wrong"), (3, 7, "right"), (2, 5, "wrong"),
    ]  # fmt: skip
    assert (shown[0].text, [hit.text for hit in shown[0].hits]) == ("a", ["x", "z", "y"])
    assert [hit.kind for hit in shown[1].hits] == ["wrong"] * 3
    assert {item: query.rank for item, query in shown.items()} == {0: 2, 1: 4, 2: 1, 3: 2}
    assert (shown[1].truth.item, shown[1].truth.score, shown[1].truth.note) == (1, 2, "")
    assert shown[1].rank_label == "rank 4 of 4"


def test_video_queries_rank_one_caption_per_video():
    # Texts 0 and 1 describe video 2, text 2 video 0, text 3 video 1.
    text_video = np.array([2, 2, 0, 1])
    sim_TxV = np.array([[5, 1, 8], [6, 1, 9], [4, 1, 1], [7, 1, 2]], np.float32)
    _, by_video = figures.rank_queries(sim_TxV, text_video, "abcd", "xyz").values()
    shown = {query.item: query for query in by_video}
    assert set(shown) == {0, 1, 2}
    assert [(h.item, h.score, h.kind) for h in shown[0].hits] == [
        (3, 7, "wrong"), (1, 6, "wrong"), (2, 4, "right"),
    ]  # fmt: skip
    assert (shown[0].text, [hit.text for hit in shown[0].hits]) == ("x", ["d", "b", "c"])
    assert (shown[2].truth.item, shown[2].truth.score, shown[2].truth.note) == (1, 9, "+ 1 more")
    assert (shown[2].hits[0].item, shown[2].hits[0].kind, shown[2].rank) == (1, "right", 1)
    assert {video: query.rank for video, query in shown.items()} == {0: 3, 1: 2, 2: 1}
    assert [shown[0].rank_label, shown[2].rank_label] == ["rank 3 of 3", "✓ rank 1 of 3"]


def test_sample_ignores_ranks_and_worst_misses_are_added():
    rank_Q = np.ones(100)
    sample = [q for q, _ in figures.choose_queries(rank_Q, np.arange(100))]
    assert len(set(sample)) == 6
    bad, worst, worse = [q for q in range(100) if q not in sample][:3]
    rank_Q[[bad, worst, worse]] = [5, 90, 40]
    picked = figures.choose_queries(rank_Q, np.arange(100))
    assert [q for q, _ in picked[:4]] == sample[:4]
    assert picked[4:] == [(worst, "one of the worst misses"), (worse, "one of the worst misses")]
    assert figures.choose_queries(rank_Q, np.arange(100)) == picked


@pytest.mark.parametrize("missed", [0, 1, 2, 3])
def test_no_video_is_shown_twice_and_a_few_are_all_shown(missed):
    rank_Q = np.where(np.arange(8) < missed, 2.0, 1.0)
    picked = [q for q, _ in figures.choose_queries(rank_Q, np.arange(8) // 2)]
    assert sorted(q // 2 for q in picked) == [0, 1, 2, 3]


def test_table_is_aligned_with_rounded_numbers():
    table = report.format_table(results_of(1000, 250, note="on the training clips"))
    assert table.splitlines() == [
        "test split, step 1200 (the last), many captions, 1,000 texts, 250 videos, 3 missing",
        "note: on the training clips",
        "                  R@1     R@5    R@10     MdR     MnR",
        "text to video    45.2    71.0   100.0     2.0    14.8",
        "video to text    45.2    71.0   100.0     2.5    14.8",
    ]


def test_table_has_rows_for_options_and_the_paper():
    recalls = {"R@1": 50.0, "R@5": 60.0, "R@10": 70.0, "MdR": 1.0, "MnR": 9.0}
    paper = {"R@1": 46.1, "R@5": 73.0, "R@10": None, "MnR": 13.2}
    results = results_of(9, 9, dataset="msrvtt 9k", selected_on="test") | {
        "normalized": {"dual softmax": {"text_to_video": recalls}},
        "paper": {"ViT-B/32": {"text_to_video": paper, "video_to_text": paper}},
    }
    assert report.format_table(results).splitlines() == [
        "msrvtt 9k, test split, step 1200 (selected on test), many captions, 9 texts, 9 videos, "
        "3 missing",
        "                        R@1     R@5    R@10     MdR     MnR",
        "text to video          45.2    71.0   100.0     2.0    14.8",
        "  with dual softmax    50.0    60.0    70.0     1.0     9.0",
        "  paper, ViT-B/32      46.1    73.0       -       -    13.2",
        "video to text          45.2    71.0   100.0     2.5    14.8",
        "  paper, ViT-B/32      46.1    73.0       -       -    13.2",
    ]


def test_report_replaces_an_older_one_and_no_other_files(tmp_path):
    (tmp_path / "attention_7.png").write_text("old")
    (tmp_path / "mine.txt").write_text("kept")
    curves = [{"step": k, "train/loss": 3 / (k + 1), "val/text_to_video/R@1": k} for k in range(9)]
    curves += [{"step": 9}, {"step": 10, "train/loss": float("nan")}, {"step": 11, "x": "text"}]
    index = make_report(
        tmp_path, ["a red ball"] * 8, range(8), 8, curves=curves, attentions=[attention_of("ball")]
    )
    page = Page(index)
    pictures = ["text_to_video.png", "video_to_text.png", "attention_1.png", "curves.png"]
    pictures.append("ranks.png")
    for name in [*pictures, *page.sources]:
        with Image.open(tmp_path / name) as image:
            image.load()
            low, high = zip(*image.convert("RGB").getextrema(), strict=True)
        assert image.width > 200
        assert max(high) - min(low) > 100  # not blank
    numbers = {f"../{name}" for name in ("results.json", "metrics.jsonl", "config.json")}
    assert numbers | set(pictures[:2]) == set(page.links)
    assert set(pictures[2:]) < set(page.sources)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        [*pictures, "index.html", "mine.txt", "strips"]
    )


def test_frames_are_visible_in_the_figure(tmp_path):
    red = np.zeros((1, 32, 32, 3), np.uint8)
    red[..., 0] = 255
    results = results_of(1, 1)
    report.write_report(
        tmp_path,
        results,
        np.ones((1, 1)),
        captions=["x"],
        text_video_T=np.zeros(1, int),
        clip_names=["clip"],
        load_frames=lambda _: red,
    )
    for name in ("text_to_video.png", "video_to_text.png"):
        pixels = np.asarray(Image.open(tmp_path / name).convert("RGB"))
        assert ((pixels == (255, 0, 0)).all(-1)).mean() > 0.01, name


def test_captions_and_names_cannot_inject_html(tmp_path):
    count = len(NASTY)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # missing glyphs must not warn
        index = make_report(
            tmp_path,
            NASTY,
            range(count),
            count,
            names=['"><script>name</script>'] * count,
            attentions=[attention_of(NASTY[0]), attention_of("")],
            results=results_of(count, count, note="on the <script> training clips", **SOURCE),
            settings={"name": "<script>", "model.tau": 0.5, "<script>": ""},
            defaults={"name": "xclip", "model.tau": 0.5, "<script>": "x"},
        )
    page = Page(index)
    assert "script" not in page.tags
    assert "<script" not in index.read_text(encoding="utf-8")
    assert "on the <script> training clips" in page.text
    assert "<script>rm *" in page.text
    assert NASTY[0] in page.text
    assert NASTY[1] in page.text
    assert "\x00" not in page.text


def test_settings_that_differ_come_before_the_folded_rest(tmp_path):
    settings = {"model.tau": 0.1, "model.max_words": 32, "model.granularities": ["a", "b"]}
    defaults = settings | {"model.tau": 0.01, "model.granularities": ["a"]}
    page = make_report(tmp_path, ["x"], [0], 1, settings=settings, defaults=defaults).read_text()
    shown, _, folded = page.partition("<details>")
    assert '<td>0.1</td><td class="quiet">0.01</td>' in shown
    assert '<td>a, b</td><td class="quiet">a</td>' in shown
    assert "model.max_words" not in shown
    assert "1 field at its default" in folded
    assert "model.max_words" in folded
    assert "Settings" not in make_report(tmp_path, ["x"], [0], 1).read_text()


def test_report_has_the_title_of_the_run_and_each_granularity(tmp_path):
    both = results_of(1, 1)
    recalls = {"text_to_video": {"R@1": 12.34}, "video_to_text": {"R@1": 56.78}}
    index = make_report(
        tmp_path, ["x"], [0], 1, results=both | {"granularities": {"frame_word": recalls}}
    )
    text = " ".join(Page(index).text.split())
    assert text.startswith("my run: video-text retrieval report")
    assert "score, and with all, as above. text to videovideo to text" in text
    assert "frame-word 12.3 56.8 all 45.2 45.2" in text
    assert "granularity alone" not in Page(make_report(tmp_path, ["x"], [0], 1)).text


def test_ranks_are_binned_by_doubling_and_ties_round_up():
    ranks = np.array([1, 1, 1.5, 2, 2.5, 4, 5, 8, 9, 10])
    bins = figures.bin_ranks(ranks, 10)
    assert bins == {"1": 20, "2": 20, "3–4": 20, "5–8": 20, "9–10": 20}
    assert list(figures.bin_ranks(np.ones(3), 1).items()) == [("1", 100)]
    assert list(figures.bin_ranks(np.ones(3), 9)) == ["1", "2", "3–4", "5–8", "9"]


@pytest.mark.parametrize(
    ("text_video", "videos", "frames"), [([0], 1, 1), ([0, 0, 1], 2, 2), ([1, 1, 0], 2, 64)]
)
def test_report_of_one_video_or_of_many_frames(tmp_path, text_video, videos, frames):
    captions = [f"caption {k}" for k in range(len(text_video))]
    index = make_report(tmp_path, captions, text_video, videos, frames, curves=[{"step": 1}])
    assert not (tmp_path / "curves.png").exists()
    assert "Training" not in Page(index).text


def test_attention_map_size_is_bounded(tmp_path):
    figures.draw_attention(tmp_path / "many.png", attention_of("a b c", words=70, frames=40))
    figures.draw_attention(tmp_path / "one.png", attention_of("a", words=1, frames=1))
    sizes = [Image.open(tmp_path / name).size for name in ("many.png", "one.png")]
    assert sizes[0][0] == sizes[1][0]
    assert sizes[0][1] < 2500


def draw_lines(caption):
    """Returns the lines of a paragraph 200 pixels wide, and their widths in pixels."""
    with canvas.drawing_style():
        sheet = canvas.Canvas(400, 100)
        sheet.paragraph(0, 50, caption, 200, 2)
        to_pixels = sheet.axes.transData.inverted()
        extents = [to_pixels.transform(t.get_window_extent()) for t in sheet.axes.texts]
        return [t.get_text() for t in sheet.axes.texts], [e[1, 0] - e[0, 0] for e in extents]


def test_long_captions_are_wrapped_and_cut():
    for caption in NASTY:
        lines, widths = draw_lines(caption)
        assert 1 <= len(lines) <= 2
        assert max(widths) <= 200
    assert draw_lines(NASTY[5])[0][-1].endswith("…")
    assert draw_lines("short one")[0] == ["short one"]


def test_strip_shows_six_evenly_spaced_frames():
    frames = np.arange(64, dtype=np.uint8)[:, None, None, None] * np.ones((1, 8, 8, 3), np.uint8)
    strip = np.asarray(figures.make_strip(frames))
    centres = figures.FRAME_SIDE // 2 + np.arange(6) * figures.FRAME_PITCH
    assert strip[50, centres, 0].tolist() == [0, 13, 25, 38, 50, 63]
    assert figures.make_strip(frames[:2]).width == figures.FRAME_PITCH + figures.FRAME_SIDE


def test_smoothing_keeps_a_constant_and_does_not_lag():
    np.testing.assert_allclose(figures.smooth(np.full(50, 2.0), 5), 2)
    np.testing.assert_allclose(figures.smooth(np.arange(50), 5)[2:-2], np.arange(2, 48))
