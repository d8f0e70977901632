"""Tests of studies: files, planned runs, the effect of every switch, statistics, tables."""

import csv
import dataclasses
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from tiny import make_config, make_dataset

from xclip_jax import train
from xclip_jax.cli import InputError
from xclip_jax.config import validate
from xclip_jax.study import Study, Variant, load_studies, report
from xclip_jax.study.report import (
    Row,
    Table,
    estimate_difference,
    estimate_metric,
    make_table,
    metric_values,
    table_from_json,
)
from xclip_jax.study.runs import Run, execute_runs, folder_name, plan_runs

ROOT = Path(__file__).parents[1]
STUDIES = str(ROOT / "configs" / "studies" / "*.py")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Returns a config that every study can start from."""
    path = make_dataset(tmp_path_factory.mktemp("data"), ("train", "val", "test"))
    return make_config(path, batch_size=8, epochs=2)


@pytest.fixture(scope="module")
def studies(base):
    few_videos = f"{ROOT}/configs/studies/fig5.py:6"  # the default numbers are shares of thousands
    return load_studies([STUDIES], base) | load_studies([few_videos], base)


def plan(studies, base, overrides=None, num_seeds=1, output=Path("o/runs")):
    fields = overrides or {}
    run = Run(name="base", config_file="c.py", workdir=output, config=base, fields=fields)
    return plan_runs(studies, run, num_seeds)


# Study files


def test_configs_contain_all_studies(studies):
    assert set(studies) == {
        *("table1", "table6", "table7", "table8", "table9", "table14", "fig5"),
        *("padding", "frame_features", "matrices", "frames", "batch_size", "normalization"),
    }
    assert len(studies["table6"].variants) == 15
    sets = {v.overrides["model.granularities"] for v in studies["table6"].variants.values()}
    assert len(sets) == 15


def test_variants_are_valid_configs_with_distinct_runs_or_options(base, studies):
    for name, study in studies.items():
        planned = plan({name: study}, base)
        rows = [(runs[0].workdir, study.variants[v].option) for (_, v), runs in planned.items()]
        assert len(set(rows)) == len(study.variants), name
        for (run,) in planned.values():
            validate(run.config)


def trace_program(config):
    """Returns the traced training step of a config, its first batch, its pairs and its length."""
    setup = train.Setup(config)
    batch = next(setup.batches(0))
    data = [batch["ids"].tobytes(), batch["video"].tobytes()]
    batch.pop("truncated")
    traced = re.sub(r"0x[0-9a-f]+", "", str(setup.step.trace(setup.init.eval_shape(), batch).jaxpr))
    return traced, data, len(setup.pairs), setup.total_steps


@pytest.fixture(scope="module")
def base_program(base):
    return trace_program(base)


def effective_values(base, studies):
    """Returns {field: values} that studies set and that change the meaning of the config."""
    values = {}
    for name, study in studies.items():
        for (_, variant), (run,) in plan({name: study}, base).items():
            fields = {*run.fields, *run.evaluation}
            for field, value in study.variants[variant].overrides.items():
                if field in fields and value not in values.setdefault(field, []):
                    values[field].append(value)
    return values


def with_field(config, field, value):
    study = Study("", ("",), {"x": Variant({field: value})}, "x")
    return plan({"s": study}, config)["s", "x"][0].config


@pytest.mark.parametrize("count", [1, pytest.param(None, marks=pytest.mark.slow)])
def test_every_switch_changes_the_program(base, studies, base_program, count):
    """Checks the first value of each field, all of them if slow. Options: study_run_test.py."""
    values = effective_values(base, studies)
    assert len(values) >= 12
    for field in values:
        for value in values[field][:count]:
            if not field.startswith("eval."):
                changed = trace_program(with_field(base, field, value))
                assert changed != base_program, f"{field} = {value}"


def test_field_without_effect_gives_the_same_program(base, base_program):
    assert trace_program(with_field(base, "report.attention_pairs", 7)) == base_program


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", "get_study"),
        ("def get_study(config): return 3", "get_study must return a Study, not 3"),
        ("def get_study(config): return config.nothing", "nothing"),
        ("import nothing_there", "nothing_there"),
        ("def get_study(", "SyntaxError"),
        (
            "from xclip_jax.study import *\n"
            "def get_study(c): return Study('t', ('a', 'b'), {'v': Variant()})",
            "must be one string for each of ('a', 'b')",
        ),
        (
            "from xclip_jax.study import *\n"
            "def get_study(c): return Study('t', ('a',), {'v': Variant()}, 'w')",
            "reference = 'w'",
        ),
        (
            "from xclip_jax.study import *\n"
            "def get_study(c): return Study('t', ('a',), {'v': {'model.tau': 0.1}})",
            "line 2: ValueError: variant 'v': must be a string and a Variant",
        ),
        (
            "from xclip_jax.study import *\n"
            "def get_study(c): return Study('t', ('a',), {4: Variant()})",
            "variant 4: must be a string",
        ),
        (
            "from xclip_jax.study import *\n"
            "def get_study(c): return Study('t', 'a', {'v': Variant()})",
            "columns = 'a': must be a tuple of strings",
        ),
        (
            "from xclip_jax.study import *\n"
            "def get_study(c):\n"
            "  v = Variant(cells=('one', 'many'))\n"
            "  return Study('t', ('a', 'b'), {'v': v}, lines=True)",
            "'many' must be a number for lines=True",
        ),
        (
            "from xclip_jax.study import *\n"
            "def get_study(c):\n"
            "  v = Variant({'eval.dual_softmax': True, 'eval.qb_norm': 5})\n"
            "  return Study('t', ('a',), {'v': v})",
            "at most one test-time option",
        ),
        ("def get_study(config):\n  return 1 / 0", "line 2: ZeroDivisionError"),
    ],
)
def test_invalid_study_file_is_reported_with_the_reason(tmp_path, base, text, message):
    path = tmp_path / "bad.py"
    path.write_text(text)
    with pytest.raises(InputError, match=re.escape(f"--study={path}")) as error:
        load_studies([str(path)], base)
    # With annotations checked at run time, a wrong type does not get as far as the message.
    assert message in str(error.value) or "TypeCheckError" in str(error.value)


def test_pattern_without_a_match_is_an_error(base):
    with pytest.raises(InputError, match="no such file"):
        load_studies(["nowhere/*.py"], base)


def test_text_after_the_colon_is_passed_to_get_study(base):
    study = load_studies([f"{ROOT}/configs/studies/frames.py:1,3"], base)["frames"]
    assert list(study.variants) == ["1", "3"]
    with pytest.raises(InputError, match=r"table8.*positional argument"):
        load_studies([f"{ROOT}/configs/studies/table8.py:1,3"], base)


def test_example_in_the_docs_is_a_study_of_about_15_lines(base, tmp_path):
    text = (ROOT / "docs" / "studies.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(example.splitlines()) <= 18
    (tmp_path / "width.py").write_text(example)
    planned = plan(load_studies([str(tmp_path / "width.py")], base), base)
    assert [runs[0].config.model.embed_dim for runs in planned.values()] == [8, 16, 32]


def test_docs_list_every_study(studies):
    text = (ROOT / "docs" / "studies.md").read_text()
    assert {name for name in studies if f"| `{name}` |" in text} == set(studies)


# Plan


def make_study(**variants):
    return Study("A study", ("variant",), {k: Variant(v) for k, v in variants.items()})


def test_variants_with_the_same_training_share_runs(base):
    one = make_study(a={"model.tau": 0.1}, b={"model.tau": 0.01}, c={"model.head": "xclip"})
    other = make_study(d={"model.tau": 0.1}, e={"model.padding": "masked"})
    planned = plan({"one": one, "other": other}, base, {"model.tau": 0.01}, num_seeds=2)
    folders = {name: [str(run.workdir) for run in runs] for (_, name), runs in planned.items()}
    assert (
        folders["a"] == folders["d"] == ["o/runs/model.tau=0.1/seed0", "o/runs/model.tau=0.1/seed1"]
    )
    # An override equal to the default, or to what the preset sets, is the base itself.
    assert (
        folders["b"] == folders["c"] == folders["e"] == ["o/runs/base/seed0", "o/runs/base/seed1"]
    )
    assert planned["one", "a"][0] is planned["other", "d"][0]
    run = planned["one", "a"][1]
    assert run.config.model.tau == 0.1
    assert run.config.seed == 1
    assert run.arguments == [
        *("--config=c.py", "--workdir=o/runs/model.tau=0.1/seed1"),
        *("--config.model.tau=0.1", "--config.seed=1"),
    ]


def test_test_time_options_share_a_run(base):
    options = Variant({"eval.dual_softmax": True}), Variant({"eval.qb_norm": 5}), Variant()
    study = Study("Options", ("",), dict(zip("dqp", options, strict=True)))
    planned = plan({"s": study}, base)
    assert len({id(run) for (run,) in planned.values()}) == 1
    (run,) = planned["s", "p"]
    assert run.evaluation == {"eval.dual_softmax": True, "eval.qb_norm": 5}
    assert {"--config.eval.dual_softmax=True", "--config.eval.qb_norm=5"} < set(run.arguments)
    assert [option.option for option in options] == ["dual softmax", "QB-Norm", ""]
    other = Study("Others", ("",), {"q": Variant({"eval.qb_norm": 9})})
    with pytest.raises(InputError, match=r"qb_norm = 9, but 5 in a variant with the same"):
        plan({"s": study, "t": other}, base)


def test_results_with_other_options_or_corrupted_files_do_not_count(base, tmp_path):
    run = Run(name="", config_file="c.py", workdir=tmp_path, config=base, fields={})
    assert run.load_ranks() is None
    (tmp_path / "results.json").write_text('{"eval": {"qb_norm": 5}}')
    np.savez(tmp_path / "ranks.npz", text_to_video=np.zeros((2, 3)))
    assert list(run.load_ranks()) == ["text_to_video"]
    assert list(dataclasses.replace(run, evaluation={"eval.qb_norm": 5}).load_ranks()) == [
        "text_to_video"
    ]
    assert dataclasses.replace(run, evaluation={"eval.qb_norm": 9}).load_ranks() is None
    intact = (tmp_path / "ranks.npz").read_bytes()
    for corrupted in (b"", intact[: len(intact) // 2]):
        (tmp_path / "ranks.npz").write_bytes(corrupted)
        assert run.load_ranks() is None
    (tmp_path / "ranks.npz").write_bytes(intact)
    for corrupted in ("", '{"eval": {"qb', "[]", "{}"):
        (tmp_path / "results.json").write_text(corrupted)
        assert run.load_ranks() is None


def test_table_repeats_the_note_of_the_results(base, tmp_path):
    study = dataclasses.replace(make_study(plain={}), reference="plain")
    ((run,),) = plan({"s": study}, base, output=tmp_path).values()
    assert make_table(study, {"plain": [run]}).facts == base.name
    run.workdir.mkdir(parents=True)
    results = {"eval": {}, "split": "train", "num_texts": 24, "num_videos": 12}
    ranks = {way: np.zeros((2, size), int) for way, size in zip(WAYS, (24, 12), strict=True)}
    np.savez(run.workdir / "ranks.npz", text_video=np.repeat(np.arange(12), 2), **ranks)
    for note, has_note in (({}, False), ({"note": "the clips it was trained on"}, True)):
        (run.workdir / "results.json").write_text(json.dumps(results | note))
        facts = make_table(study, {"plain": [run]}).facts
        expected = f"{base.name}, train split, 24 texts, 12 videos"
        assert facts == expected + (" (the clips it was trained on)" if has_note else "")


def test_invalid_variant_has_a_separate_run(base):
    study = make_study(head={"model.head": "nonsense"}, tau={"model.tau": -1.0}, plain={})
    planned = plan({"s": study}, base)
    assert [str(run.workdir.parent.name) for (run,) in planned.values()] == [
        *("model.head=nonsense", "model.tau=-1.0", "base")
    ]


def test_variants_with_other_data_or_micro_batch_do_not_share_runs(base):
    """Another data set is another training, and memory is measured for each variant."""
    study = make_study(data={"data.path": "x"}, micro={"train.micro_batch": 4}, plain={})
    planned = plan({"s": study}, base)
    runs = [run for (run,) in planned.values()]
    assert len({run.workdir for run in runs}) == 3
    assert runs[2].arguments[2:] == ["--config.seed=0"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"model.nothing": 1}, "model.nothing"),
        ({"nothing.tau": 1}, "nothing.tau"),
        ({"model.tau": "cold"}, "Could not override"),
        ({"model": {"tau": 0.1}}, "a group of fields: write model.NAME"),
        ({"seed": 5}, "seeds are set by --seeds"),
    ],
)
def test_unknown_field_or_wrong_type_is_an_error_that_names_the_variant(base, overrides, message):
    with pytest.raises(InputError, match="variant 'v'") as error:
        plan({"s": make_study(v=overrides)}, base)
    assert message in str(error.value)


def test_folder_names_show_the_overrides_and_are_unique():
    assert folder_name({}) == "base"
    assert (
        folder_name({"model.tau": 0.1, "data.max_videos": 3}) == "data.max_videos=3,model.tau=0.1"
    )
    assert folder_name({"model.granularities": ("frame_word", "video_word")}) == (
        "model.granularities=frame_word+video_word"
    )
    names = [
        folder_name({"init.clip": path}) for path in ("m/a", "m_a", "m a", "x" * 300, "x" * 301)
    ]
    assert len(set(names)) == 5
    assert all(re.fullmatch(r"[\w.+=,~-]{1,200}", name) for name in names)


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
    """Hits vary by video, and intervals cover the truth as often as they should."""
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


def test_execute_runs_accepts_no_runs():
    execute_runs([], lambda run: None)
