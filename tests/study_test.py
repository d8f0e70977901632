"""Studies: what is planned, what a table says, and that no switch of a study is dead."""

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
from xclip_jax.study import Study, Variant, chart, formats, page
from xclip_jax.study.plan import Run, plan, slug
from xclip_jax.study.runs import work_off
from xclip_jax.study.spec import load_studies
from xclip_jax.study.statistics import compare, describe, values_of
from xclip_jax.study.table import Row, Table, as_json, from_json, make_table
from xclip_jax.train import set_up

ROOT = Path(__file__).parents[1]
STUDIES = str(ROOT / "configs" / "studies" / "*.py")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A config that every study can be made of."""
    path = make_dataset(tmp_path_factory.mktemp("data"), ("train", "val", "test"))
    return make_config(path, batch_size=8, epochs=2)


@pytest.fixture(scope="module")
def studies(base):
    few_videos = f"{ROOT}/configs/studies/fig5.py:6"  # its own are shares of thousands
    return load_studies([STUDIES], base) | load_studies([few_videos], base)


# Study files


def test_every_experiment_that_is_promised_is_there(studies):
    assert set(studies) == {
        *("table1", "table6", "table7", "table8", "table9", "table14", "fig5"),
        *("padding", "frame_features", "matrices", "frames", "batch_size", "normalization"),
    }
    assert len(studies["table6"].variants) == 15
    sets = {v.overrides["model.granularities"] for v in studies["table6"].variants.values()}
    assert len(sets) == 15


def test_every_variant_is_a_valid_config_and_each_row_is_another_run_or_option(base, studies):
    for name, study in studies.items():
        planned = plan({name: study}, "c.py", base, {}, 1, Path("out"))
        told = [(runs[0].workdir, study.variants[v].option) for (_, v), runs in planned.items()]
        assert len(set(told)) == len(study.variants), name
        for (run,) in planned.values():
            validate(run.config)


def program(config):
    """All that a config makes of training: the step as JAX traces it, its data, its length."""
    setup = set_up(config)
    parts = setup.model, setup.architecture, setup.optimizer
    state = train.state_shapes(*parts, setup.mesh)
    batch = next(setup.batches(0))
    read = [batch["ids"].tobytes(), batch["video"].tobytes()]
    batch.pop("truncated")
    step = train.compile_step(setup.model, setup.optimizer, config, setup.mesh, state)
    traced = re.sub(r"0x[0-9a-f]+", "", str(step.trace(state, batch).jaxpr))
    return traced, read, len(setup.pairs), setup.total_steps


def test_no_switch_is_dead(base, studies):
    """Each field that a study sets changes the program, or is a test-time option with a result."""
    seen, plain = set(), program(base)
    for name, study in studies.items():
        planned = plan({name: study}, "c.py", base, {}, 1, Path("out"))
        for (_, variant), (run,) in planned.items():
            own = study.variants[variant].overrides
            kept = {*run.fields, *(f"eval.{name}" for name in run.evaluation)}
            fields = {field: value for field, value in own.items() if field in kept}
            for field, value in fields.items():
                if field.startswith("eval."):
                    assert study.variants[variant].option  # tried by study_run_test.py
                elif (field, value) not in seen:
                    seen.add((field, value))
                    changed = run.config if len(fields) == 1 else with_fields(base, {field: value})
                    assert program(changed) != plain, f"{name}: {field} = {value}"
    assert len({field for field, _ in seen}) >= 12


def with_fields(config, fields):
    study = Study("", ("",), {"x": Variant(fields)}, "x")
    return plan({"s": study}, "c.py", config, {}, 1, Path("out"))["s", "x"][0].config


def test_a_field_that_nothing_reads_is_found_dead(base):
    """What `test_no_switch_is_dead` rests on: a change without effect gives the same program."""
    assert program(with_fields(base, {"report.attention_pairs": 7})) == program(base)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = 1", "get_study"),
        ("def get_study(config): return 3", "must return a Study with a dict of variants"),
        ("def get_study(config): return config.nothing", "nothing"),
        ("import nothing_there", "nothing_there"),
        ("def get_study(", "SyntaxError"),
        (
            "from xclip_jax.study import *\n"
            "def get_study(c): return Study('t', ('a', 'b'), {'v': Variant()})",
            "do not fill the columns",
        ),
        (
            "from xclip_jax.study import *\n"
            "def get_study(c): return Study('t', ('a',), {'v': Variant()}, 'w')",
            "reference = 'w'",
        ),
        (
            "from xclip_jax.study import *\n"
            "def get_study(c): return Study('t', ('a',), {'v': {'model.tau': 0.1}})",
            "variant 'v': must be a text and a Variant",
        ),
        (
            "from xclip_jax.study import *\n"
            "def get_study(c): return Study('t', ('a',), {4: Variant()})",
            "variant 4: must be a text",
        ),
        (
            "from xclip_jax.study import *\n"
            "def get_study(c): return Study('t', 'a', {'v': Variant()})",
            "columns = 'a': must be a tuple",
        ),
        (
            "from xclip_jax.study import *\n"
            "def get_study(c):\n"
            "  v = Variant(cells=('one', 'many'))\n"
            "  return Study('t', ('a', 'b'), {'v': v}, lines=True)",
            "the second must be a number",
        ),
        (
            "from xclip_jax.study import *\n"
            "def get_study(c):\n"
            "  v = Variant({'eval.dual_softmax': True, 'eval.qb_norm': 5})\n"
            "  return Study('t', ('a',), {'v': v})",
            "one test-time option at most",
        ),
        ("def get_study(config):\n  return 1 / 0", "line 2: ZeroDivisionError"),
    ],
)
def test_a_bad_study_file_is_named_with_the_reason(tmp_path, base, text, said):
    path = tmp_path / "bad.py"
    path.write_text(text)
    with pytest.raises(InputError, match=re.escape(f"--study={path}")) as caught:
        load_studies([str(path)], base)
    assert said in str(caught.value)


def test_a_pattern_that_fits_nothing_is_an_error(base):
    with pytest.raises(InputError, match="no such file"):
        load_studies(["nowhere/*.py"], base)


def test_words_after_the_colon_reach_the_study(base):
    study = load_studies([f"{ROOT}/configs/studies/frames.py:1,3"], base)["frames"]
    assert list(study.variants) == ["1", "3"]
    with pytest.raises(InputError, match=r"table8.*positional argument"):
        load_studies([f"{ROOT}/configs/studies/table8.py:1,3"], base)


def test_the_example_in_the_docs_is_a_study_of_about_15_lines(base, tmp_path):
    text = (ROOT / "docs" / "studies.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(example.splitlines()) <= 18
    (tmp_path / "width.py").write_text(example)
    found = load_studies([str(tmp_path / "width.py")], base)
    planned = plan(found, "c.py", base, {}, 1, Path("out"))
    assert [runs[0].config.model.embed_dim for runs in planned.values()] == [8, 16, 32]


def test_the_docs_list_every_study(studies):
    text = (ROOT / "docs" / "studies.md").read_text()
    assert {name for name in studies if f"| `{name}` |" in text} == set(studies)


# Plan


def make_study(**variants):
    return Study("A study", ("variant",), {k: Variant(v) for k, v in variants.items()})


def test_variants_that_train_the_same_share_their_runs(base):
    one = make_study(a={"model.tau": 0.1}, b={"model.tau": 0.01}, c={"model.head": "xclip"})
    other = make_study(d={"model.tau": 0.1}, e={"model.padding": "masked"})
    planned = plan({"one": one, "other": other}, "c.py", base, {"model.tau": 0.01}, 2, Path("o"))
    folders = {name: [str(run.workdir) for run in runs] for (_, name), runs in planned.items()}
    assert (
        folders["a"] == folders["d"] == ["o/runs/model.tau=0.1/seed0", "o/runs/model.tau=0.1/seed1"]
    )
    # The default written out, and what the preset says anyway, is the base itself.
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


def test_test_time_options_are_asked_of_the_shared_run(base):
    options = Variant({"eval.dual_softmax": True}), Variant({"eval.qb_norm": 5}), Variant()
    study = Study("Options", ("",), dict(zip("dqp", options, strict=True)))
    planned = plan({"s": study}, "c.py", base, {}, 1, Path("o"))
    assert len({id(run) for (run,) in planned.values()}) == 1
    (run,) = planned["s", "p"]
    assert run.evaluation == {"dual_softmax": True, "qb_norm": 5}
    assert {"--config.eval.dual_softmax=True", "--config.eval.qb_norm=5"} < set(run.arguments)
    assert [option.option for option in options] == ["dual softmax", "QB-Norm", ""]
    other = Study("Others", ("",), {"q": Variant({"eval.qb_norm": 9})})
    with pytest.raises(InputError, match=r"eval.qb_norm = 9, but 5 in another"):
        plan({"s": study, "t": other}, "c.py", base, {}, 1, Path("o"))


def test_results_count_only_with_the_options_that_are_wanted_and_undamaged(base, tmp_path):
    run = Run("", "c.py", tmp_path, base, {})
    assert run.results() is None
    (tmp_path / "results.json").write_text('{"eval": {"qb_norm": 5}}')
    np.savez(tmp_path / "ranks.npz", text_to_video=np.zeros((2, 3)))
    assert list(run.results()) == ["text_to_video"]
    assert list(dataclasses.replace(run, evaluation={"qb_norm": 5}).results()) == ["text_to_video"]
    assert dataclasses.replace(run, evaluation={"qb_norm": 9}).results() is None
    whole = (tmp_path / "ranks.npz").read_bytes()
    for damaged in (b"", whole[: len(whole) // 2]):
        (tmp_path / "ranks.npz").write_bytes(damaged)
        assert run.results() is None
    (tmp_path / "ranks.npz").write_bytes(whole)
    for damaged in ("", '{"eval": {"qb', "[]", "{}"):
        (tmp_path / "results.json").write_text(damaged)
        assert run.results() is None


def test_the_table_says_what_the_results_are_noted_for(base, tmp_path):
    study = dataclasses.replace(make_study(plain={}), reference="plain")
    ((run,),) = plan({"s": study}, "c.py", base, {}, 1, tmp_path).values()
    assert make_table(study, {"plain": [run]}).facts == base.name
    run.workdir.mkdir(parents=True)
    results = {"eval": {}, "split": "train", "num_texts": 24, "num_videos": 12}
    ranks = {way: np.zeros((2, size), int) for way, size in zip(WAYS, (24, 12), strict=True)}
    np.savez(run.workdir / "ranks.npz", text_video=np.repeat(np.arange(12), 2), **ranks)
    for note, told in (({}, False), ({"note": "the clips it was trained on"}, True)):
        (run.workdir / "results.json").write_text(json.dumps(results | note))
        facts = make_table(study, {"plain": [run]}).facts
        expected = f"{base.name}, train split, 24 texts, 12 videos"
        assert facts == expected + (" (the clips it was trained on)" if told else "")


def test_a_variant_that_is_not_valid_keeps_its_run_which_will_say_why(base):
    study = make_study(head={"model.head": "nonsense"}, tau={"model.tau": -1.0}, plain={})
    planned = plan({"s": study}, "c.py", base, {}, 1, Path("o"))
    assert [str(run.workdir.parent.name) for (run,) in planned.values()] == [
        *("model.head=nonsense", "model.tau=-1.0", "base")
    ]


def test_fields_that_leave_training_alone_still_have_runs_of_their_own(base):
    """Another data set is another training, and the memory of one variant is not another's."""
    study = make_study(data={"data.path": "x"}, micro={"train.micro_batch": 4}, plain={})
    planned = plan({"s": study}, "c.py", base, {}, 1, Path("o"))
    runs = [run for (run,) in planned.values()]
    assert len({run.workdir for run in runs}) == 3
    assert runs[2].arguments[2:] == ["--config.seed=0"]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"model.nothing": 1}, "model.nothing"),
        ({"nothing.tau": 1}, "nothing.tau"),
        ({"model.tau": "cold"}, "Could not override"),
        ({"model": {"tau": 0.1}}, "a group of fields: write model.NAME"),
        ({"seed": 5}, "seeds are set by --seeds"),
    ],
)
def test_a_variant_with_an_unknown_field_or_type_is_refused_by_name(base, overrides, said):
    with pytest.raises(InputError, match="variant 'v'") as caught:
        plan({"s": make_study(v=overrides)}, "c.py", base, {}, 1, Path("o"))
    assert said in str(caught.value)


def test_a_folder_is_named_by_its_overrides_and_no_two_alike():
    assert slug({}) == "base"
    assert slug({"model.tau": 0.1, "data.max_videos": 3}) == "data.max_videos=3,model.tau=0.1"
    assert slug({"model.granularities": ("frame_word", "video_word")}) == (
        "model.granularities=frame_word+video_word"
    )
    names = [slug({"init.clip": path}) for path in ("m/a", "m_a", "m a", "x" * 300, "x" * 301)]
    assert len(set(names)) == 5
    assert all(re.fullmatch(r"[\w.+=,~-]{1,200}", name) for name in names)


# Numbers


def test_values_are_those_of_each_query():
    counts_SxCxQ = [[[0, 3, 0], [0, 0, 1]], [[7, 0, 0], [0, 0, 0]]]
    assert values_of(counts_SxCxQ, "R@1").tolist() == [[100, 0, 50], [0, 100, 100]]
    assert values_of(counts_SxCxQ, "R@5").tolist() == [[100, 100, 100], [0, 100, 100]]
    assert values_of(counts_SxCxQ, "MnR").tolist() == [[1, 4, 1.5], [8, 1, 1]]


def test_a_description_has_mean_spread_over_seeds_and_interval_over_queries():
    rng = np.random.default_rng(0)
    hits_SxQ = 100.0 * (rng.random((3, 400)) < 0.6)
    stat = describe(hits_SxQ)
    assert stat.seeds == hits_SxQ.mean(1).tolist()
    assert stat.mean == pytest.approx(np.mean(stat.seeds))
    assert stat.std == pytest.approx(np.std(stat.seeds, ddof=1))
    half = 1.96 * hits_SxQ.mean(0).std() / np.sqrt(400)
    assert (stat.high - stat.low) / 2 == pytest.approx(half, rel=0.1)
    assert describe(hits_SxQ[:1]).std is None
    certain = describe(np.full((2, 9), 100.0))
    assert (certain.low, certain.high) == (100, 100)


def test_captions_of_a_video_count_as_one_draw():
    """Hits vary by video: intervals are as wide as that makes them."""
    rng = np.random.default_rng(3)
    video_Q = np.repeat(np.arange(300), 10)
    covered = 0
    for _ in range(60):
        chance_V = rng.beta(1, 1, 300)
        missed_Q = (rng.random(3000) > chance_V[video_Q]).astype(int)
        counts = np.stack([missed_Q, 0 * missed_Q])[None]
        values_SxV = values_of(counts, "R@1", video_Q)
        assert values_SxV.mean() == pytest.approx(100 * (1 - missed_Q.mean()))
        stat = describe(values_SxV)
        covered += stat.low <= 50 <= stat.high
    assert covered >= 53  # of 60; were the captions independent, 44 would be expected
    uneven = values_of([[[0, 3, 0], [0, 0, 0]]], "R@1", np.array([0, 0, 1]))
    assert uneven.mean() == pytest.approx(200 / 3)
    alone = values_of(counts, "R@1", np.arange(3000))
    np.testing.assert_allclose(alone, values_of(counts, "R@1"))


def test_a_difference_with_one_seed_is_the_paired_t_interval():
    rng = np.random.default_rng(1)
    a, b = rng.random((2, 1, 50))
    found = compare(a, b)
    exact = scipy.stats.ttest_rel(a[0], b[0])
    assert found.mean == pytest.approx(np.mean(a - b))
    assert (found.low, found.high) == pytest.approx(tuple(exact.confidence_interval(0.95)))


def test_a_difference_the_same_for_all_queries_is_the_t_interval_over_seeds():
    shift_S = np.array([1.0, 2.0, 4.0])
    found = compare(np.tile(shift_S[:, None], 30), np.zeros((3, 30)))
    exact = scipy.stats.ttest_1samp(shift_S, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx(tuple(exact))
    same = compare(np.ones((3, 5)), np.ones((3, 5)))
    assert (same.mean, same.low, same.high) == (0, 0, 0)


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    """Queries and seeds both random: 95 % intervals of the difference, 400 times."""
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(400):
        difference_SxQ = 1 + rng.normal(0, 1, (3, 1)) + rng.normal(0, 8, (1, 100))
        found = compare(difference_SxQ + rng.normal(0, 3, (3, 100)), np.zeros((3, 100)))
        covered += found.low <= 1 <= found.high
    assert 0.92 <= covered / 400 <= 0.99


# Tables


def make_row(name, mean, paper=None, difference=True, **of_row):
    stat = describe(np.array([[mean, mean + 2.0], [mean + 2.0, mean]]))
    stats = {way: dict.fromkeys(("R@1", "R@5", "R@10", "MnR"), stat) for way in WAYS}
    apart = {way: compare(np.zeros((2, 2)), np.ones((2, 2))) for way in WAYS} if difference else {}
    return Row(name, (name,), stats, apart, {0: None, 1: None}, paper, **of_row)


WAYS = ("text_to_video", "video_to_text")
ODD = "50% of a|b_c & <i>τ</i>"


@pytest.fixture
def table():
    failed = Row("broken", ("broken",), {}, {}, {0: "failed: out of memory | now"}, None)
    partial = dataclasses.replace(make_row(ODD, 40), seeds={0: None, 1: "failed: NaN"})
    rows = [make_row("low", 30.0, 43.9), failed, partial, make_row("best", 60.0, 46.1, False)]
    return Table("Table 9: τ", ("method",), rows, "best", False, "A note.", "demo, test split")


def cells_of(lines):
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def test_markdown_has_a_row_each_the_best_in_bold_and_what_failed(table):
    text = formats.markdown(table)
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


def test_the_legend_counts_the_seeds_that_are_finished(table):
    one = dataclasses.replace(table.rows[0], seeds={0: None, 1: "not run yet"})
    assert "one seed" in formats.legend(dataclasses.replace(table, rows=[one]))


def test_latex_escapes_and_has_as_many_cells_in_every_row(table):
    text = formats.latex(table, "table9")
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
    rows = list(csv.DictReader(io.StringIO(formats.comma_separated(table))))
    assert [row["method"] for row in rows] == ["low", "broken", ODD, "best"]
    assert float(rows[0]["text_to_video R@1 mean"]) == 31
    assert rows[0]["video_to_text MnR seeds"] == "31.0 31.0"
    assert rows[0]["text_to_video difference mean"] == "-1.0"
    assert rows[1]["problem"] == "failed: out of memory | now"
    assert rows[1]["text_to_video R@1 mean"] == ""


def test_a_table_survives_json(table):
    assert from_json(as_json(table)) == table


def test_the_page_escapes_and_shows_all_studies(table):
    html = page.page({"table9": table, "other": table})
    assert html.count("<h2>Table 9: τ</h2>") == 2
    assert "<i>τ" not in html
    assert "&lt;i&gt;τ" in html
    assert 'src="table9.png"' in html
    assert "failed: out of memory" in html


@pytest.mark.parametrize("lines", [False, True])
def test_a_chart_is_drawn_with_and_without_results(table, tmp_path, lines):
    if lines:
        rows = [
            dataclasses.replace(row, labels=("one", str(k + 1))) for k, row in enumerate(table.rows)
        ]
        table = dataclasses.replace(table, columns=("series", "size"), rows=rows, lines=True)
    for name, rows in (("full", table.rows), ("empty", table.rows[1:2])):
        chart.draw(dataclasses.replace(table, rows=rows), tmp_path / f"{name}.png")
    assert (tmp_path / "full.png").stat().st_size > (tmp_path / "empty.png").stat().st_size


def test_nothing_to_run_is_nothing_done():
    work_off([], None)
