"""End-to-end tests of the five benchmarks on stand-ins: prepare, train, evaluate."""

import json
from pathlib import Path

import pytest
import standins
from preparing import one_thread

from xclip_jax import main, prepare, workers
from xclip_jax.data.builder import Dataset

ROOT = Path(__file__).resolve().parents[1]
TINY = {
    **{"init.clip": "", "model.embed_dim": 32, "model.text.vocab_size": 2000},
    **{f"model.vision.{k}": v for k, v in (("image_size", 32), ("patch_size", 16), ("width", 32))},
    **{"model.vision.layers": 1, "model.vision.heads": 2, "model.text.width": 32},
    **{"model.text.layers": 1, "model.text.heads": 2, "model.temporal.heads": 2},
    **{"model.max_words": 12, "model.max_frames": 4, "model.text.context_length": 12},
    **{"train.batch_size": 4, "train.epochs": 1, "log.tensorboard": False},
    **{"optimizer.lr": 1e-3, "optimizer.encoder_lr": 1e-3, "report.attention_pairs": 1},
}
PAPER = {"msrvtt": 46.1, "msvd": 47.1, "lsmdc": 23.3, "didemo": 45.2, "activitynet": 44.3}
SPLITS = {"train": 11, "val": standins.VAL, "test": standins.TEST}
PREPARED = {
    "msrvtt": {"train": 14, "test": standins.TEST},  # 9k: the validation videos are training videos
    "activitynet": {"train": 11, "test": standins.TEST},
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Returns a function from a benchmark to (prepared folder, output of prepare), with a cache."""
    made = {}

    def get(name, capsys):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            standins.STANDINS[name](folder)
            arguments = [f"--dataset={name}", f"--videos={folder}/videos", "--max_failures=0.16"]
            arguments += [f"--annotations={folder}/annotations", f"--output={folder}/data"]
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(workers, "worker_pool", one_thread)
                prepare.main([*arguments, "--image_size=32"])
            made[name] = folder / "data", capsys.readouterr().out
        return made[name]

    return get


def run_main(monkeypatch, config, workdir, fields):
    """Runs the command in this process."""
    overrides = (f"--config.{field}={value}" for field, value in fields.items())
    argv = [f"--config={ROOT / 'configs'}/{config}", f"--workdir={workdir}", *overrides]
    monkeypatch.setattr(main.distributed, "connect", lambda *_: None)  # JAX is already initialised
    main.main(argv)
    return json.loads((workdir / "results.json").read_text())


@pytest.mark.parametrize("name", standins.STANDINS)
def test_prepare_train_evaluate_writes_results_by_the_protocol(
    name, prepared, tmp_path, monkeypatch, capsys
):
    data, printed = prepared(name, capsys)
    dataset = Dataset(data, name)
    counts = {split: len(counts) for split, counts in dataset.captions_per_clip.items()}
    assert counts == PREPARED.get(name, SPLITS)
    assert "id without a file" in printed
    fields = TINY | {"data.path": data, "eval.dual_softmax": True, "eval.qb_norm": 5}
    fields["eval.hubness_bias"] = 100  # there are fewer
    results = run_main(monkeypatch, f"{name}.py", tmp_path, fields)
    many = name == "msvd"
    paragraph = name in ("didemo", "activitynet")
    protocol = "many captions" if many else "paragraph" if paragraph else "single caption"
    assert results["protocol"] == protocol
    assert results["num_texts"] == (18 if many else 6)  # of MSVD's test: 1 + 1 + 1 captions each
    assert results["num_videos"] == 6
    assert results["missing_videos"] == dataset.expected["test"] - 6
    assert results["expected_videos"] == dataset.expected["test"]
    assert results["selected_on"] == ("val" if "val" in counts else "last step")
    assert results["paper"]["ViT-B/32"]["text_to_video"]["R@1"] == PAPER[name]
    assert set(results["normalized"]["dual softmax"]) == {"text_to_video", "video_to_text"}
    banks = {name.partition(" (")[0]: ways for name, ways in results["normalized"].items()}
    for bank in ("QB-Norm", "hubness bias"):
        assert set(banks[bank]) == {"text_to_video"}
    table = capsys.readouterr().out
    lines = [line for line in table.splitlines() if line.startswith("  paper, ViT-B/32")]
    assert [line.split()[2] for line in lines] == [
        str(PAPER[name]),
        str(results["paper"]["ViT-B/32"]["video_to_text"]["R@1"]),
    ]
    for part in (f"{protocol}, {results['num_texts']} texts, 6 videos", "with dual softmax"):
        assert part in table


def test_irregular_ids_and_captions_are_prepared(prepared, capsys):
    def ids(name, split="test"):
        clips = Dataset(prepared(name, capsys)[0]).clips(split)
        return {clip["id"].decode(): [c.decode() for c in clip["captions"]] for clip in clips}

    didemo = ids("didemo")
    suffixes = [name.rpartition(".")[2] for name in didemo]
    assert suffixes == ["mp4", "mov", "", "avi", "mp4", "mov"]
    assert all(text.endswith("then it is over.") for (text,) in didemo.values())  # both suffixes'
    activitynet = ids("activitynet")
    assert list(activitynet) == [f"v_-val_{n}Xy" for n in range(6)]
    assert all(text.endswith(". Nothing else happens.") for (text,) in activitynet.values())
    assert [len(captions) for captions in ids("msvd").values()] == [3] * 6
    assert ids("msrvtt")["video17"] == ids("msrvtt")["video16"]
    assert "video3" not in ids("msrvtt", "train")  # without sentences; listed:
    assert "video3" in prepared("msrvtt", capsys)[0].joinpath("failures.jsonl").read_text()
    assert sorted(map(len, ids("lsmdc", "train").values())) == [1] * 10 + [2]


def test_selection_on_test_is_stated_in_results(prepared, tmp_path, monkeypatch, capsys):
    data, _ = prepared("activitynet", capsys)
    fields = TINY | {"data.path": data, "train.select": "test"}
    results = run_main(monkeypatch, "activitynet.py:vit_b16", tmp_path, fields)
    assert results["selected_on"] == "test"
    assert "selected on the test split itself" in results["note"]
    assert "test/text_to_video/R@1" in (tmp_path / "metrics.jsonl").read_text()


@pytest.mark.parametrize(
    ("config", "fields", "message"),
    [
        ("lsmdc.py", {}, r"holds msrvtt 9k, the config requires lsmdc"),
        ("msrvtt.py:7k", {}, r"holds msrvtt 9k, the config requires msrvtt 7k; .*--split=7k"),
        (
            "msrvtt.py",
            {"init.clip": "none/clip_b16"},
            r"none/clip_b16: no model there; download https://openaipublic.*ViT-B-16.pt and .*"
            r"xclip_jax.convert --input=ViT-B-16.pt --output=none/clip_b16 --vocab=bpe_simple",
        ),
        (
            "msrvtt.py",
            {"init.clip": "none/other"},
            r"no model there; run .*convert --input=CHECKPOINT --output=none/other, with a check",
        ),
        (
            "didemo.py:vit_b16",
            {"data.path": "data/none"},
            r"xclip_clips/.* does not exist.*LisaAnne.*xclip_jax.prepare --dataset=didemo",
        ),
        ("msrvtt.py", {"data.test_split": "dev", "train.epochs": 1}, r"has no split 'dev'"),
        ("msrvtt.py", {"train.select": "test", "data.test_split": "dev"}, r"has no split 'dev'"),
        ("msrvtt.py", {"data.variant": "1k"}, r"data.variant = '1k': must be one of 9k, 7k, full"),
        (
            "msvd.py:7k",
            {},
            r"--config=FILE:7k: after the colon, must be at most one word of each group: vit_b32",
        ),
        ("msvd.py:paper,official", {}, r"at most one word of each group"),
    ],
)
def test_missing_or_unsuitable_input_is_a_one_line_error(
    prepared, tmp_path, monkeypatch, capsys, config, fields, message
):
    data, _ = prepared("msrvtt", capsys)
    fields = TINY | {"data.path": data} | fields
    with pytest.raises(SystemExit, match=message) as stopped:
        run_main(monkeypatch, config, tmp_path, fields)
    assert stopped.value.code.startswith("error: ")
    assert "\n" not in stopped.value.code


@pytest.mark.slow
def test_search_benchmark_writes_its_measurements(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import results
    import search

    monkeypatch.setattr(results, "FOLDER", tmp_path)
    monkeypatch.setattr(search, "text_tower_milliseconds", lambda: 0.0)
    arguments = ["--segments=300", "--queries=3", f"--folder={tmp_path / 'index'}"]
    search.main(arguments)
    (written,) = tmp_path.glob("search_300_*.json")
    summary, *funnels = json.loads(written.read_text())["rows"]
    assert summary["segments"] == 300
    assert [row["compiled"] for row in funnels] == [0, 0, 0]
    assert funnels[-1]["top_10"] == 1  # it scores all 300
    with pytest.raises(SystemExit, match="holds another index"):
        search.main([*arguments, "--precision=float32"])
