"""Tests of the benchmarks' annotation readers, on released, imitated and invalid files."""

import collections
import json
import os
import pickle
from pathlib import Path

import pytest
import standins

from xclip_jax.cli import InputError
from xclip_jax.data.annotations import (
    BLANK,
    NO_CAPTIONS,
    REPEATED,
    SEGMENT,
    TWO_SPLITS,
    UNLISTED,
    Clip,
    Listing,
)
from xclip_jax.data.benchmarks import DATASETS, LSMDC_FILES

SHARED = Path(__file__).resolve().parents[2] / "shared" / "annotations"
real = pytest.mark.skipif(not SHARED.is_dir(), reason="needs the released annotation files")


@pytest.fixture(scope="module")
def annotations(tmp_path_factory):
    """Makes a folder with the annotation files of the stand-ins, without videos."""
    folder = tmp_path_factory.mktemp("standins")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(standins, "write_video", lambda path, scene: None)
        for name, make in standins.STANDINS.items():
            make(folder / name)
    return folder


def folder_of(tmp_path, name, **files):
    """Returns a folder of links to real files, given {name for the reader: name of the file}."""
    for reader_name, real_name in files.items():
        os.symlink(SHARED / name / real_name, tmp_path / reader_name)
    return tmp_path


def captions_by_split(listing):
    counts = collections.Counter()
    for clip in listing.clips:
        counts[clip.split] += len(clip.captions)
    return dict(counts)


def findings(listing, what):
    return [finding.id for finding in listing.findings if finding.what == what]


# Real files


@real
@pytest.mark.parametrize(("variant", "train"), [("9k", 9000), ("7k", 7010)])
def test_released_msrvtt_lists_give_the_published_counts(tmp_path, variant, train):
    names = (f"MSRVTT_train.{variant}.csv", "MSRVTT_JSFUSION_test.csv")
    folder = folder_of(tmp_path, "MSRVTT", **{name: name for name in names})
    ids = [f"video{n}" for n in range(10_000)]
    sentences = [{"video_id": v, "caption": f"{v} {k}"} for v in ids for k in range(20)]
    videos = [{"video_id": v, "split": "train"} for v in ids]
    content = {"videos": videos, "sentences": sentences}
    (folder / "MSRVTT_data.json").write_text(json.dumps(content))
    listing = DATASETS["msrvtt"].read(folder, variant)
    assert listing.counts() == {"train": train, "test": 1000}
    assert captions_by_split(listing) == {"train": 20 * train, "test": 1000}
    tested = [clip.captions[0] for clip in listing.clips if clip.split == "test"]
    assert tested[0] == "a person is connecting something to system"
    repeated = collections.Counter(tested)
    assert sum(count for count in repeated.values() if count > 1) == 9
    assert not listing.findings


@real
def test_released_msrvtt_sentences_are_read(tmp_path):
    lists = {f"MSRVTT_{name}.csv": f"MSRVTT_{name}.csv" for name in ("train.9k", "JSFUSION_test")}
    italian = {"MSRVTT_data.json": "MSRVTT_data.EXCERPT_italian.json"}
    listing = DATASETS["msrvtt"].read(folder_of(tmp_path, "MSRVTT", **lists, **italian), "full")
    assert len(listing.clips) == 70
    assert sum(captions_by_split(listing).values()) == 1400
    assert len(findings(listing, NO_CAPTIONS)) == 2  # 2 of its 72 videos


@real
@pytest.mark.parametrize("source", ["pickle", "json"])
def test_released_msvd_gives_the_published_counts(tmp_path, source):
    lists = {f"{split}_list.txt": f"{split}_list.txt" for split in ("train", "val", "test")}
    captions = {
        "pickle": {"raw-captions.pkl": "raw-captions.DERIVED.pkl"},
        "json": {"captions_msvd.json": "captions_msvd.json"},
    }
    listing = DATASETS["msvd"].read(folder_of(tmp_path, "MSVD", **lists, **captions[source]))
    assert listing.counts() == {"train": 1200, "val": 100, "test": 670} == listing.expected
    assert captions_by_split(listing) == {"train": 48774, "val": 4290, "test": 27763}
    assert not listing.findings
    (squirrel,) = [clip for clip in listing.clips if clip.video == "-4wsuPCjDBc_5_15"]
    assert squirrel.captions[:2] == (
        "a squirrel is eating a peanut in it s shell",
        "a chipmunk is eating",
    )


@real
def test_released_lsmdc_format_is_read(tmp_path):
    rows = (SHARED / "LSMDC" / "SYNTHETIC_same_shape.csv").read_text().splitlines(keepends=True)
    for name, part in zip(LSMDC_FILES.values(), (rows[:8], rows[8:12], rows[12:]), strict=True):
        (tmp_path / name).write_text("".join(part))
    listing = DATASETS["lsmdc"].read(tmp_path)
    assert captions_by_split(listing) == {"train": 8, "val": 4, "test": 6}
    assert len(findings(listing, REPEATED)) == 2
    assert listing.clips[0].video == "0001_Example_Movie_00.01.00.000-00.01.03.250"


@real
def test_released_didemo_sentences_are_joined_by_video(tmp_path):
    names = [f"{s}_list.txt" for s in ("train", "val", "test")] + [
        "val_data.json",
        "test_data.json",
    ]
    folder = folder_of(tmp_path, "DiDeMo", **{name: name for name in names})
    (folder / "train_data.json").write_text("[]")  # not available
    listing = DATASETS["didemo"].read(folder)
    assert listing.counts() == {"val": 1065, "test": 1004}
    assert len(findings(listing, NO_CAPTIONS)) == 8392
    assert not findings(listing, UNLISTED)
    texts = {clip.video.rpartition(".")[0]: clip.captions for clip in listing.clips}
    sentences = 0
    for split in ("val", "test"):
        for item in json.loads((SHARED / "DiDeMo" / f"{split}_data.json").read_text()):
            (paragraph,) = texts[item["video"].rpartition(".")[0]]
            assert " ".join(item["description"].split()) in paragraph
            sentences += 1
    assert sentences == 4180 + 4021


@real
@pytest.mark.parametrize(("variant", "test"), [("val_1", 4916), ("val_2", 4884)])
def test_released_activitynet_gives_the_known_counts_and_findings(variant, test):
    listing = DATASETS["activitynet"].read(SHARED / "ActivityNet", variant)
    assert listing.counts() == {"train": 10007, "test": test}
    assert listing.expected["train"] - 10007 == 2
    assert listing.expected["test"] - test == 1
    known_bad = ["v_WjEh7acrr5o", "v_uTc2-oAxgbc", "v_LURZ8QDfowU"]
    assert findings(listing, UNLISTED) == known_bad
    assert len(findings(listing, SEGMENT)) == 4  # two reversed, two empty
    assert max(len(clip.captions[0].split()) for clip in listing.clips) == 504
    assert not any("\n" in text or "  " in text for clip in listing.clips for text in clip.captions)


# Stand-ins


@pytest.mark.parametrize("name", standins.STANDINS)
def test_standins_are_read_like_released_files(annotations, name):
    listing = DATASETS[name].read(annotations / name / "annotations")
    val = {"val": standins.VAL} if name in ("msvd", "lsmdc", "didemo") else {}
    train = standins.TRAIN + standins.VAL - 1 if name == "msrvtt" else standins.TRAIN
    assert listing.counts() == {"train": train, "test": standins.TEST, **val}
    kinds = collections.Counter(finding.what for finding in listing.findings)
    assert (
        kinds
        == {
            "msrvtt": {NO_CAPTIONS: 1},
            "msvd": {},
            "lsmdc": {REPEATED: 1},
            "didemo": {},
            "activitynet": {NO_CAPTIONS: 2, UNLISTED: 2, SEGMENT: 4},
        }[name]
    )


def test_msrvtt_variants_select_the_official_splits(annotations):
    read, folder = DATASETS["msrvtt"].read, annotations / "msrvtt" / "annotations"
    assert read(folder, "7k").counts() == {"train": 11, "test": 6}
    assert read(folder, "full").counts() == {"train": 11, "val": 4, "test": 6}
    sentences = {clip.video: clip.captions for clip in read(folder, "full").clips}
    assert len(sentences["video0"]) == 6  # each is a training pair


def test_listing_records_inconsistencies():
    listing = Listing()
    listing.add("train", "a", ["one", " one\n more  word "])
    listing.add("train", "a", ["one", "two"])
    listing.add("train", "b", ["x", "", "half \ud83d"])
    listing.add("test", "b", ["y"])
    listing.add("val", "b", ["z"])
    listing.add("val", "c", ["&nbsp;"])
    listing.add("val", "d", [""])
    listing.add("val", "d", ["a late caption"])
    assert listing.clips == [
        Clip("a", ("one", "one more word", "two")),
        Clip("b", ("y",), "test"),
        Clip("d", ("a late caption",), "val"),
    ]
    assert [(f.what, f.id) for f in listing.findings] == [
        *((REPEATED, "a"), (BLANK, "b"), (TWO_SPLITS, "b"), (TWO_SPLITS, "b"), (BLANK, "c")),
        *((BLANK, "d"), (REPEATED, "d"), (NO_CAPTIONS, "c")),
    ]


def test_quoted_csv_sentence_may_contain_quotes_and_line_ends(annotations, tmp_path):
    copy(annotations / "msrvtt", tmp_path)
    (tmp_path / "MSRVTT_JSFUSION_test.csv").write_bytes(
        'video_id,sentence\r\nvideo16,"a ""man"",\r\nand\u2028a dog"\r\nvideo17,x\r\n'.encode()
    )
    tested = [c for c in DATASETS["msrvtt"].read(tmp_path).clips if c.split == "test"]
    assert [clip.captions for clip in tested] == [('a "man", and a dog',), ("x",)]


def test_id_in_two_splits_is_kept_in_the_evaluation_split(annotations, tmp_path):
    copy(annotations / "didemo", tmp_path)
    (test_id, *_) = (tmp_path / "test_list.txt").read_text().split()
    with (tmp_path / "train_list.txt").open("a") as ids:
        ids.write(f"{test_id}\n")
    listing = DATASETS["didemo"].read(tmp_path)
    assert not listing.lost
    assert findings(listing, TWO_SPLITS) == [test_id]
    assert listing.counts()["test"] == standins.TEST


def test_repeated_annotation_counts_once(annotations, tmp_path):
    copy(annotations / "didemo", tmp_path)
    items = json.loads((tmp_path / "val_data.json").read_text())
    before = DATASETS["didemo"].read(tmp_path).clips
    (tmp_path / "val_data.json").write_text(json.dumps([*items, items[0]]))
    listing = DATASETS["didemo"].read(tmp_path)
    assert listing.clips == before
    assert findings(listing, REPEATED) == [items[0]["video"]]


def test_unlisted_captions_and_ids_without_captions_are_findings(annotations, tmp_path):
    for path in (annotations / "msvd" / "annotations").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with (tmp_path / "train_list.txt").open("a") as ids:
        ids.write("never_captioned_1_2\n\n")
    captions = pickle.loads((tmp_path / "raw-captions.pkl").read_bytes())
    captions["unknown_0_1"] = [["a", "dog"]]
    (tmp_path / "raw-captions.pkl").write_bytes(pickle.dumps(captions))
    listing = DATASETS["msvd"].read(tmp_path)
    assert findings(listing, NO_CAPTIONS) == ["never_captioned_1_2"]
    assert findings(listing, UNLISTED) == ["unknown_0_1"]


# Invalid files


class Call:
    """An object whose pickle calls os.system."""

    def __reduce__(self):
        return os.system, ("touch {path}",)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_malicious_pickle_executes_nothing(annotations, tmp_path, protocol):
    for path in (annotations / "msvd" / "annotations").glob("*.txt"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    proof = tmp_path / "ran"
    hostile = pickle.dumps({"a": [["b"], Call()]}, protocol=protocol)
    for payload in (
        hostile.replace(b"touch {path}", f"touch {proof}".encode()),
        f"cos\nsystem\n(S'touch {proof}'\ntR.".encode(),
        f"(S'touch {proof}'\nios\nsystem\n.".encode(),
        b"\x80\x02cbuiltins\neval\nX\x08\x00\x00\x00open('x')\x85R.",
    ):
        (tmp_path / "raw-captions.pkl").write_bytes(payload)
        with pytest.raises(InputError, match=r"raw-captions\.pkl: (refers to|not a complete)"):
            DATASETS["msvd"].read(tmp_path)
    assert not proof.exists()


@pytest.mark.parametrize("content", [b"", b"\x80\x04", b"no pickle", b"\x80\x02]q\x01.", b"I1\n."])
def test_other_pickles_are_errors(annotations, tmp_path, content):
    for path in (annotations / "msvd" / "annotations").glob("*.txt"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "raw-captions.pkl").write_bytes(content)
    with pytest.raises(InputError, match=r"raw-captions\.pkl: (not a complete|must be dict)"):
        DATASETS["msvd"].read(tmp_path)


JSON_FILES = [
    ("msrvtt", "MSRVTT_data.json"),
    ("didemo", "val_data.json"),
    ("activitynet", "train.json"),
    ("activitynet", "val_ids.json"),
]


@pytest.mark.parametrize(("name", "file"), JSON_FILES)
@pytest.mark.parametrize(("other", "other_file"), JSON_FILES)
def test_file_of_another_benchmark_is_an_error(
    annotations, tmp_path, name, file, other, other_file
):
    copy(annotations / name, tmp_path)
    (tmp_path / file).write_bytes((annotations / other / "annotations" / other_file).read_bytes())
    if (name, file) == (other, other_file):
        DATASETS[name].read(tmp_path)
        return
    with pytest.raises(InputError, match=r"; wrong file$") as error:
        DATASETS[name].read(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / file}")


def copy(standin, folder):
    for path in (standin / "annotations").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())


@pytest.mark.parametrize(
    ("name", "file", "content", "message"),
    [
        ("msrvtt", "MSRVTT_train.9k.csv", "a\nb\n", "line 2: has no video_id"),
        ("msrvtt", "MSRVTT_train.9k.csv", "", "no rows below a header with video_id"),
        ("msrvtt", "MSRVTT_JSFUSION_test.csv", "video_id\nvideo1\n", "has no video_id or sentence"),
        ("msrvtt", "MSRVTT_data.json", '{"videos": []}', "has no 'sentences'; wrong file"),
        ("msrvtt", "MSRVTT_data.json", '{"videos": [1], "sentences": []}', "video 1: must be dict"),
        ("msvd", "val_list.txt", "a caption\n", "line 1: must be one id, not 'a caption'"),
        ("msvd", "val_list.txt", '["v_1"]', "line 1: must be one id"),
        (
            "lsmdc",
            "LSMDC16_annos_val.csv",
            "a,b,c\n",
            "line 1: must have 6 fields separated by tabs",
        ),
        ("lsmdc", "LSMDC16_annos_val.csv", b"\xff\n", "not UTF-8 text"),
        ("didemo", "val_data.json", '[{"video": "a.mp4"}]', "item 1: has no 'description'"),
        ("activitynet", "val_ids.json", "[1]", "must be str, is int"),
        ("activitynet", "train.json", '{"v": {"duration": true}}', "'duration': must be int"),
        ("activitynet", "train.json", "[" * 100_000, "nested too deeply"),
        ("activitynet", "train.json", f"[{'9' * 5000}]", "invalid JSON: Exceeds the limit"),
        ("activitynet", "train.json", '{"v": 1, "v": 2}', "key 'v' occurs 2 times in one object"),
        ("msrvtt", "MSRVTT_train.9k.csv", "video_id\na,b\n", "line 2: more values than columns"),
        (
            "msrvtt",
            "MSRVTT_JSFUSION_test.csv",
            "video_id,sentence\nvideo1,a man, walking\n",
            "line 2: more values than columns; quote text with commas",
        ),
    ],
)
def test_invalid_content_is_a_one_line_error(annotations, tmp_path, name, file, content, message):
    copy(annotations / name, tmp_path)
    content = content if isinstance(content, bytes) else content.encode()
    (tmp_path / file).write_bytes(content)
    with pytest.raises(InputError) as error:
        DATASETS[name].read(tmp_path)
    assert str(error.value).startswith(str(tmp_path / file))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "file"), JSON_FILES)
def test_truncated_json_is_an_error_with_its_line(annotations, tmp_path, name, file):
    copy(annotations / name, tmp_path)
    whole = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r", line \d+: invalid JSON: "):
        DATASETS[name].read(tmp_path)


@pytest.mark.parametrize("name", standins.STANDINS)
def test_wrong_path_error_names_files_and_download(annotations, tmp_path, name):
    module = DATASETS[name]
    (tmp_path / "file").touch()
    for path, what in (
        (tmp_path / "x", "is not a folder"),
        (tmp_path / "file", "is a file"),
        (tmp_path, "has no "),
        (annotations / ("msvd" if name != "msvd" else "lsmdc") / "annotations", "has no "),
    ):
        with pytest.raises(InputError) as error:
            module.read(path)
        message = str(error.value)
        assert message.startswith(f"{path} {what}")
        assert module.download in message
        assert "\n" not in message
