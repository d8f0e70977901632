"""Tests of studies: files, planned runs, the effect of every switch."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
from tiny import make_config, make_dataset

from xclip_jax import train
from xclip_jax.cli import InputError
from xclip_jax.config import validate
from xclip_jax.study import Study, Variant, load_studies
from xclip_jax.study.report import make_table
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
    few_videos = f"{ROOT}/configs/studies/fig5.py:6"  # its default sizes need thousands of videos
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
        *("encoder_lr", "interactions", "recipes", "best"),
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
    """Checks the first value of each field, all of them if slow. Not test-time options."""
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
    # The tests check annotations at run time: a wrong type is a TypeCheckError before the message.
    wrong_type = message.startswith(("line 2: ValueError: variant", "variant 4", "columns"))
    assert ("TypeCheckError" if wrong_type else message) in str(error.value)


def test_pattern_without_a_match_is_an_error(base):
    with pytest.raises(InputError, match="no such file"):
        load_studies(["nowhere/*.py"], base)


def test_text_after_the_colon_is_passed_to_get_study(base):
    study = load_studies([f"{ROOT}/configs/studies/frames.py:1,3"], base)["frames"]
    assert list(study.variants) == ["1", "3"]
    with pytest.raises(InputError, match=r"table8.*takes nothing after the colon"):
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
    tested = {"eval.dual_softmax": True, "eval.qb_norm": 5, "eval.hubness_bias": 7}
    options = *(Variant({field: value}) for field, value in tested.items()), Variant()
    study = Study("Options", ("",), dict(zip("dqhp", options, strict=True)))
    planned = plan({"s": study}, base)
    assert len({id(run) for (run,) in planned.values()}) == 1
    (run,) = planned["s", "p"]
    assert run.evaluation == tested
    assert {f"--config.{field}={value}" for field, value in tested.items()} < set(run.arguments)
    assert [option.option for option in options] == ["dual softmax", "QB-Norm", "hubness bias", ""]
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
    sizes = {"text_to_video": 24, "video_to_text": 12}
    ranks = {way: np.zeros((2, size), int) for way, size in sizes.items()}
    np.savez(run.workdir / "ranks.npz", text_video=np.repeat(np.arange(12), 2), **ranks)
    for note, has_note in (({}, False), ({"note": "the clips it was trained on"}, True)):
        (run.workdir / "results.json").write_text(json.dumps(results | note))
        facts = make_table(study, {"plain": [run]}).facts
        expected = f"{base.name}, train split, 24 texts, 12 videos"
        assert facts == expected + (" (the clips it was trained on)" if has_note else "")
    (run.workdir / "results.json").write_text(json.dumps(results | {"missing_videos": 3}))
    facts = make_table(study, {"plain": [run]}).facts
    assert facts.endswith("12 videos (3 missing: not comparable with results on all)")


def test_invalid_variant_has_a_separate_run(base):
    study = make_study(head={"model.head": "nonsense"}, tau={"model.tau": -1.0}, plain={})
    planned = plan({"s": study}, base)
    assert [str(run.workdir.parent.name) for (run,) in planned.values()] == [
        *("model.head=nonsense", "model.tau=-1.0", "base")
    ]


def test_variants_with_other_data_or_micro_batch_do_not_share_runs(base):
    """Data changes the results and the micro-batch the memory, so each has runs of its own."""
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


def test_execute_runs_accepts_no_runs():
    execute_runs([], lambda run: None)
