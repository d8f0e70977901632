"""Tests of the page over all runs: which folders are found, states, differences, hostile names."""

import json
import re
import shutil

import pytest

from xclip_jax import runs, workdir
from xclip_jax.__main__ import main as dispatch
from xclip_jax.cli import InputError

WAYS = ("text_to_video", "video_to_text")


def write_run(folder, *, recall=None, steps=3, provenance=None, **settings):
    """Writes a work directory, finished if `recall` is given."""
    folder.mkdir(parents=True)
    fields = workdir.default_settings() | settings | {"data.fingerprint": "0"}
    if provenance:
        fields["provenance"] = provenance
    (folder / "config.json").write_text(json.dumps(fields))
    lines = [{"step": k, "seconds": 2.0 * k, "train/loss": 4 / k} for k in range(1, steps + 1)]
    lines.append({"step": steps, "seconds": 2.0 * steps, "val/text_to_video/R@1": 9.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if recall is not None:
        metrics = {"R@1": recall, "R@5": recall, "R@10": recall, "MdR": 2.0, "MnR": 3.0}
        results = {"step": steps, "split": "test", "dataset": "demo"} | dict.fromkeys(WAYS, metrics)
        (folder / "results.json").write_text(json.dumps(results))
        (folder / "report").mkdir()
        (folder / "report/index.html").write_text("")
    return folder


def read_page(path):
    """Returns (the page, its rows as lists of texts, the embedded curves)."""
    page = path.read_text("utf-8")
    body = page.partition("<tbody>")[2].partition("</tbody>")[0]
    cells = [re.findall(r"<t[dh].*?</t[dh]>", row, re.DOTALL) for row in body.split("</tr>")[:-1]]
    texts = [[" ".join(re.sub(r"<[^>]+>", " ", c).split()) for c in row] for row in cells]
    curves = page.partition('id="curves">')[2].partition("</script>")[0]
    return page, texts, json.loads(curves)


def test_nested_runs_are_found_and_their_parts_are_not(tmp_path):
    write_run(tmp_path / "b")
    nested = write_run(tmp_path / "studies/demo/runs/base/seed0")
    (nested / "checkpoints/3/checkpoints").mkdir(parents=True)
    (nested / "model").mkdir()
    (nested / "model/metrics.jsonl").write_text("")
    (tmp_path / "studies/loop").symlink_to(tmp_path)
    (tmp_path / "elsewhere").symlink_to(write_run(tmp_path.with_name(f"{tmp_path.name}_other")))
    found = [str(path.relative_to(tmp_path)) for path in runs.find_workdirs(tmp_path)]
    assert found == ["b", "elsewhere", "studies/demo/runs/base/seed0"]
    assert list(runs.find_workdirs(tmp_path / "b")) == [tmp_path / "b"]


def test_page_has_numbers_links_and_curves(tmp_path):
    record = {"date": "2026-11-26T10:11:12+00:00", "commit": "a" * 40 + "-dirty"}
    record |= {"parameters": 12345, "total_steps": 1500}
    write_run(tmp_path / "a b", recall=50.25, provenance=record)
    write_run(tmp_path / "c", recall=None)
    found = runs.write_runs_page(tmp_path, tmp_path / "pages" / "all.html")
    assert [run.state for run in found] == ["finished", "unfinished"]
    page, (first, second), curves = read_page(tmp_path / "pages" / "all.html")
    recalls = ["50.2", "50.2", "50.2", "2.0", "3.0"]
    facts = ["3 / 1,500", "12,345", "", "6 s", "2026-11-26 10:11", "aaaaaaaa-dirty", ""]
    assert first == ["a b", "demo", "test", *recalls, *recalls, *facts]
    assert second == ["c unfinished", *[""] * 12, "3", "", "", "6 s", "", "", ""]
    assert 'href="../a%20b/report/index.html"' in page
    assert curves[0] == {
        "name": "a b",
        "curves": {
            "loss": [[1, 4], [2, 2], [3, 1.3333]],
            "validation R@1, text to video": [[3, 9]],
        },
    }
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", page)


def test_settings_are_those_in_which_runs_differ(tmp_path):
    write_run(tmp_path / "a", recall=1, **{"model.tau": 0.1, "seed": 1, "train.epochs": 7})
    write_run(tmp_path / "b", recall=1, **{"seed": 2, "train.epochs": 7, "name": "b"})
    write_run(tmp_path / "c", recall=1, **{"train.epochs": 7})
    shown = [run.changed for run in runs.write_runs_page(tmp_path, tmp_path / "x.html")]
    assert shown == [
        {"seed": "1", "model.tau": "0.1"}, {"seed": "2", "model.tau": "0.01"},
        {"seed": "0", "model.tau": "0.01"},
    ]  # fmt: skip
    (alone,) = runs.write_runs_page(tmp_path / "a", tmp_path / "x.html")
    assert alone.changed == {"seed": "1", "model.tau": "0.1", "train.epochs": "7"}


CORRUPTIONS = {
    "results.json": ["", "{", "[]", "{}", '{"step": 1}', "null", '"x"'],
    "config.json": ["{", "[1]", "3", '{"provenance": 3}', '{"provenance": {"parameters": "x"}}'],
    "metrics.jsonl": ["[1]\n", "3\n", '{"train/loss": 1}\n', '{"step": "x", "train/loss": {}}\n'],
}


@pytest.mark.parametrize(
    ("file", "content"), [(file, text) for file, texts in CORRUPTIONS.items() for text in texts]
)
def test_corrupted_file_is_named_and_the_others_are_shown(tmp_path, file, content):
    write_run(tmp_path / "a", recall=10)
    write_run(tmp_path / "b", recall=20)
    (tmp_path / "a" / file).write_text(content)
    first, second = runs.write_runs_page(tmp_path, tmp_path / "x.html")
    assert first.state.startswith(f"{file} is corrupted: ")
    assert str(tmp_path) not in first.state
    assert second.state == "finished"
    assert "20.0" in (tmp_path / "x.html").read_text()


def test_bytes_that_are_no_text_are_corrupted(tmp_path):
    for name in CORRUPTIONS:
        write_run(tmp_path / f"run {name}", recall=10)
        (tmp_path / f"run {name}" / name).write_bytes(b"\xff\xfe\x00")
    found = runs.write_runs_page(tmp_path, tmp_path / "x.html")
    assert len(found) == len(CORRUPTIONS)
    for run in found:
        assert run.state.startswith(f"{run.name.removeprefix('run ')} is corrupted: ")


def test_failed_run_shows_its_reason(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/failed.txt").write_text("config.train.batch_size = 7: must\nbe <b>even</b>\n")
    (run,) = runs.write_runs_page(tmp_path, tmp_path / "x.html")
    assert run.state.startswith("failed: config.train.batch_size = 7")
    assert "&lt;b&gt;even" in (tmp_path / "x.html").read_text()
    assert runs.format_runs([run]).splitlines()[-1].endswith("must be <b>even</b>")
    write_run(tmp_path / "b", recall=1)
    shutil.copy(tmp_path / "a/failed.txt", tmp_path / "b")  # of an earlier attempt
    assert [one.state[:8] for one in runs.write_runs_page(tmp_path, tmp_path / "x.html")] == [
        "failed: ", "finished",
    ]  # fmt: skip


def test_names_cannot_inject_html(tmp_path):
    name = "<script>alert(1)<script>\"'&#?%é\x01"
    write_run(tmp_path / name, recall=10, **{"data.path": "</script><script>x"})
    write_run(tmp_path / "b\udcff", recall=10)
    found = runs.write_runs_page(tmp_path, tmp_path / "x.html")
    runs.format_runs(found).encode()  # printable
    page, _, curves = read_page(tmp_path / "x.html")
    assert page.count("<script") == 2  # the data and the code
    assert page.count("</script") == 2
    assert curves[-1]["name"] == name or curves[0]["name"] == name


def test_long_curves_are_thinned_by_means(tmp_path):
    write_run(tmp_path / "a", steps=5000)
    lines = [{"step": k, "train/loss": float("nan") if k == 7 else k % 2} for k in range(5000)]
    (tmp_path / "a/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    points = runs.read_curves(tmp_path / "a")["loss"]
    assert len(points) == 200
    assert points[100] == [pytest.approx(2512, abs=13), pytest.approx(0.5, abs=0.05)]


def test_printed_table_is_aligned(tmp_path):
    write_run(tmp_path / "a", recall=50)
    write_run(tmp_path / ("long" * 20))
    table = runs.format_runs(runs.write_runs_page(tmp_path, tmp_path / "x.html"))
    head, first, second = table.splitlines()[1:]
    assert first.split() == ["a", "50.0", "50.0", "3", "finished"]
    assert second.startswith("…ong")
    assert head.index("state") == first.index("finished") == second.index("unfinished")


@pytest.mark.parametrize(
    ("folder", "message"), [("empty", "no work directory"), ("missing", "no such folder")]
)
def test_folder_without_runs_is_one_clear_error(tmp_path, folder, message, capsys):
    (tmp_path / "empty/model").mkdir(parents=True)
    (tmp_path / "empty/model/config.json").write_text("{}")  # of Hugging Face
    with pytest.raises(InputError, match=message):
        runs.write_runs_page(tmp_path / folder, tmp_path / "x.html")
    with pytest.raises(SystemExit) as stop:
        runs.main([str(tmp_path / folder)])
    assert stop.value.code.startswith("error: ")
    assert not (tmp_path / "x.html").exists()


def test_command_writes_the_page_into_the_folder_and_prints_the_table(tmp_path, capsys):
    write_run(tmp_path / "a", recall=50)
    dispatch(["runs", str(tmp_path)])
    assert (tmp_path / "index.html").is_file()
    assert "finished" in capsys.readouterr().out
    dispatch(["runs", str(tmp_path), f"--output={tmp_path / 'other.html'}"])
    assert (tmp_path / "other.html").is_file()


def test_every_config_field_can_be_shown():
    run = runs.RunSummary(name="a", report="", settings=workdir.default_settings())
    other = dict.fromkeys(workdir.default_settings(), "changed")
    two = [run, runs.RunSummary(name="b", report="", settings=other)]
    runs.show_differences(two)
    assert len(two[0].changed) == len(other) - len(workdir.LABELS)
    assert not set(workdir.LABELS) & set(two[0].changed)
