"""Tests of the results of studies: statistics, tables, charts."""

import csv
import dataclasses
import io
import json
import re

import numpy as np
import pytest
import scipy.stats

from xclip_jax.study import report
from xclip_jax.study.report import (
    Row,
    Table,
    estimate_difference,
    estimate_metric,
    metric_values,
    table_from_json,
)

# Numbers


def test_metric_values_of_single_queries():
    counts_SxCxQ = np.array([[[0, 3, 0], [0, 0, 1]], [[7, 0, 0], [0, 0, 0]]])
    assert metric_values(counts_SxCxQ, "R@1").tolist() == [[100, 0, 50], [0, 100, 100]]
    assert metric_values(counts_SxCxQ, "R@5").tolist() == [[100, 100, 100], [0, 100, 100]]
    assert metric_values(counts_SxCxQ, "MnR").tolist() == [[1, 4, 1.5], [8, 1, 1]]


def test_estimate_has_std_over_seeds_and_interval_over_queries():
    rng = np.random.default_rng(0)
    hits_SxQ = 100.0 * (rng.random((3, 400)) < 0.6)
    stat = estimate_metric(hits_SxQ)
    assert stat.seeds == hits_SxQ.mean(1).tolist()
    assert stat.mean == pytest.approx(np.mean(stat.seeds))
    assert stat.std == pytest.approx(np.std(stat.seeds, ddof=1))
    half = 1.96 * hits_SxQ.mean(0).std() / np.sqrt(400)
    assert (stat.high - stat.low) / 2 == pytest.approx(half, rel=0.1)
    assert estimate_metric(hits_SxQ[:1]).std is None
    certain = estimate_metric(np.full((2, 9), 100.0))
    assert (certain.low, certain.high) == (100, 100)


def test_interval_treats_the_captions_of_a_video_as_one_draw():
    """Varies hits by video, and counts how often intervals cover the truth."""
    rng = np.random.default_rng(3)
    video_Q = np.repeat(np.arange(300), 10)
    covered = 0
    for _ in range(60):
        chance_V = rng.beta(1, 1, 300)
        missed_Q = (rng.random(3000) > chance_V[video_Q]).astype(int)
        counts = np.stack([missed_Q, 0 * missed_Q])[None]
        values_SxV = metric_values(counts, "R@1", video_Q)
        assert values_SxV.mean() == pytest.approx(100 * (1 - missed_Q.mean()))
        stat = estimate_metric(values_SxV)
        covered += stat.low <= 50 <= stat.high
    assert covered >= 53  # of 60, where intervals for independent captions would cover 44
    uneven = metric_values(np.array([[[0, 3, 0], [0, 0, 0]]]), "R@1", np.array([0, 0, 1]))
    assert uneven.mean() == pytest.approx(200 / 3)
    alone = metric_values(counts, "R@1", np.arange(3000))
    np.testing.assert_allclose(alone, metric_values(counts, "R@1"))


def test_difference_with_one_seed_has_the_paired_t_interval():
    rng = np.random.default_rng(1)
    a, b = rng.random((2, 1, 50))
    result = estimate_difference(a, b)
    exact = scipy.stats.ttest_rel(a[0], b[0])
    assert result.mean == pytest.approx(np.mean(a - b))
    assert (result.low, result.high) == pytest.approx(tuple(exact.confidence_interval(0.95)))


def test_difference_equal_for_all_queries_has_the_t_interval_over_seeds():
    shift_S = np.array([1.0, 2.0, 4.0])
    result = estimate_difference(np.tile(shift_S[:, None], 30), np.zeros((3, 30)))
    exact = scipy.stats.ttest_1samp(shift_S, 0).confidence_interval(0.95)
    assert (result.low, result.high) == pytest.approx(tuple(exact))
    same = estimate_difference(np.ones((3, 5)), np.ones((3, 5)))
    assert (same.mean, same.low, same.high) == (0, 0, 0)


def test_intervals_of_differences_cover_the_truth_in_95_percent():
    """Draws both queries and seeds at random, 400 times."""
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(400):
        difference_SxQ = 1 + rng.normal(0, 1, (3, 1)) + rng.normal(0, 8, (1, 100))
        result = estimate_difference(
            difference_SxQ + rng.normal(0, 3, (3, 100)), np.zeros((3, 100))
        )
        covered += result.low <= 1 <= result.high
    assert 0.92 <= covered / 400 <= 0.99


# Tables


def make_row(name, mean, paper=None, difference=True):
    stat = estimate_metric(np.array([[mean, mean + 2.0], [mean + 2.0, mean]]))
    stats = {way: dict.fromkeys(("R@1", "R@5", "R@10", "MnR"), stat) for way in WAYS}
    below = estimate_difference(np.zeros((2, 2)), np.ones((2, 2)))
    return Row(
        name=name,
        labels=(name,),
        stats=stats,
        differences=dict.fromkeys(WAYS, below) if difference else {},
        seeds={"0": None, "1": None},
        paper=paper,
    )


WAYS = ("text_to_video", "video_to_text")
SPECIAL = "50% of a|b_c & <i>τ</i>"


@pytest.fixture
def table():
    reason = {"0": "failed: out of memory | now"}
    failed = dataclasses.replace(make_row("broken", 0), stats={}, differences={}, seeds=reason)
    partial = dataclasses.replace(make_row(SPECIAL, 40), seeds={"0": None, "1": "failed: NaN"})
    rows = [make_row("low", 30.0, 43.9), failed, partial, make_row("best", 60.0, 46.1, False)]
    return Table(
        title="Table 9: τ",
        columns=("method",),
        rows=rows,
        reference="best",
        lines=False,
        note="A note.",
        facts="demo, test split",
    )


def cells_of(lines):
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def test_markdown_is_aligned_with_best_means_in_bold_and_failures(table):
    text = report.format_tables("study.md", {"table9": table})
    lines = [line for line in text.splitlines() if line.startswith("|")]
    first, second = lines[:6], lines[6:]
    for part in (first, second):
        assert len({len(line) for line in part if "broken" not in line}) == 1  # aligned
        assert len({len(row) for row in cells_of(part)}) == 1
    cells, intervals = cells_of(first), cells_of(second)
    assert cells[2][:3] == ["low", "31.0 ± 0.0", "31.0 ± 0.0"]
    assert cells[3][:3] == ["broken", r"failed: out of memory \| now", ""]
    assert cells[5][1] == "**61.0** ± 0.0"
    assert cells[2][4] == "**31.0** ± 0.0"  # of mean ranks the lowest
    assert [row[-1] for row in cells] == ["paper", "-" * 5, "43.9", "", "", "46.1"]
    assert intervals[2][:3] == ["low", "31.0 to 31.0", "−1.0 (−1.0 to −1.0)"]
    assert intervals[3][1:] == ["", "", "", ""]
    assert intervals[5][2] == ""
    assert r"50% of a\|b_c & \<i\>τ\</i\>" in text
    assert r"b_c & \<i\>τ\</i\>: seed 1 failed: NaN" in text
    assert "A note." in text
    assert "minus “best”" in text
    assert "not ours" in text
    assert "over 2 seeds" in text


def test_legend_counts_finished_seeds(table):
    one = dataclasses.replace(table.rows[0], seeds={"0": None, "1": "not run yet"})
    assert "one seed" in report.format_tables(
        "study.md", {"x": dataclasses.replace(table, rows=[one])}
    )


def test_latex_is_escaped_with_equally_many_cells_in_every_row(table):
    text = report.format_tables("tables.tex", {"table9": table})
    assert r"50\% of a|b\_c \& $<$i$>$$\tau$$<$/i$>$" in text
    assert r"\textbf{61.0} $\pm$ 0.0" in text
    assert r"\multicolumn{9}{l}{failed: out of memory | now}" in text
    assert r"\label{tab:table9}" in text
    parts = [part[: part.index(r"\bottomrule")] for part in text.split(r"\midrule")[1:]]
    counts = [[len(re.split(r"(?<!\\)&", r)) for r in part.splitlines()[1:]] for part in parts]
    assert counts == [[10, 2, 10, 10], [5, 5, 5, 5]]
    assert text.count("{") == text.count("}")
    assert set(re.findall(r"[^\x00-\x7f]", text)) <= {"“", "”"}


def test_csv_has_every_number_unrounded(table):
    rows = list(csv.DictReader(io.StringIO(report.format_csv(table))))
    assert [row["method"] for row in rows] == ["low", "broken", SPECIAL, "best"]
    assert float(rows[0]["text_to_video R@1 mean"]) == 31
    assert rows[0]["video_to_text MnR seeds"] == "31.0 31.0"
    assert rows[0]["text_to_video difference mean"] == "-1.0"
    assert rows[1]["problem"] == "failed: out of memory | now"
    assert rows[1]["text_to_video R@1 mean"] == ""


def test_json_round_trip_preserves_a_table(table):
    text = json.dumps(dataclasses.asdict(table))
    restored = table_from_json(text)
    assert json.dumps(dataclasses.asdict(restored)) == text
    assert report.format_tables("studies.html", {"x": restored}) == report.format_tables(
        "studies.html", {"x": table}
    )
    assert report.format_csv(restored) == report.format_csv(table)
    with pytest.raises(TypeError, match="not the table of a study"):
        table_from_json('{"title": "another file"}')


def test_html_is_escaped_and_shows_all_studies(table):
    tables = {"table9": table, "other": table, '"><b>x': dataclasses.replace(table, title=SPECIAL)}
    html = report.format_tables("studies.html", tables)
    assert '"><b>x' not in html
    assert html.count("<h2>Table 9: τ</h2>") == 2
    assert "<i>" not in html
    assert "&lt;i&gt;τ" in html
    assert 'src="table9.png"' in html
    assert "failed: out of memory" in html


@pytest.mark.parametrize("lines", [False, True])
def test_chart_is_drawn_with_and_without_results(table, lines):
    if lines:
        rows = [
            dataclasses.replace(row, labels=("one", str(k + 1))) for k, row in enumerate(table.rows)
        ]
        table = dataclasses.replace(table, columns=("series", "size"), rows=rows, lines=True)
    full, empty = (
        report.draw_chart(dataclasses.replace(table, rows=rows))
        for rows in (table.rows, table.rows[1:2])
    )
    assert full.startswith(b"\x89PNG")
    assert len(full) > len(empty)
