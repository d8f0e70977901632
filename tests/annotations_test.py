"""The benchmarks' annotation readers: released files, real ones where they are, and wrong ones."""

import collections
import json
import os
from pathlib import Path

import pytest
import standins

from xclip_jax.data.datasets import DATASETS
from xclip_jax.data.datasets.listing import (
    LOST,
    REPEATED,
    SEGMENT,
    UNLISTED,
)

SHARED = Path(__file__).resolve().parents[2] / "shared" / "annotations"
real = pytest.mark.skipif(not SHARED.is_dir(), reason="no released annotation files at hand")


@pytest.fixture(scope="module")
def annotations(tmp_path_factory):
    """Folders of annotation files, the stand-ins' without their videos."""
    folder = tmp_path_factory.mktemp("standins")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(standins, "write_video", lambda path, scene: None)
        for name, make in standins.STANDINS.items():
            make(folder / name)
    return folder


def folder_of(tmp_path, name, **files):
    """A folder with links to real files: the reader's name of each -> the real file's."""
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
def test_real_msrvtt(tmp_path, variant, train):
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
    said = collections.Counter(tested)
    assert sum(count for count in said.values() if count > 1) == 9
    assert not listing.findings


@real
def test_real_msrvtt_sentences(tmp_path):
    lists = {f"MSRVTT_{name}.csv": f"MSRVTT_{name}.csv" for name in ("train.9k", "JSFUSION_test")}
    italian = {"MSRVTT_data.json": "MSRVTT_data.EXCERPT_italian.json"}
    listing = DATASETS["msrvtt"].read(folder_of(tmp_path, "MSRVTT", **lists, **italian), "full")
    assert len(listing.clips) == 70
    assert sum(captions_by_split(listing).values()) == 1400
    assert len(findings(listing, LOST)) == 2  # of its 72 videos two have no sentence


@real
@pytest.mark.parametrize("source", ["pickle", "json"])
def test_real_msvd(tmp_path, source):
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
def test_real_lsmdc(tmp_path):
    rows = (SHARED / "LSMDC" / "SYNTHETIC_same_shape.csv").read_text().splitlines(keepends=True)
    for name, part in zip(
        DATASETS["lsmdc"].FILES.values(), (rows[:8], rows[8:12], rows[12:]), strict=True
    ):
        (tmp_path / name).write_text("".join(part))
    listing = DATASETS["lsmdc"].read(tmp_path)
    assert captions_by_split(listing) == {"train": 8, "val": 4, "test": 6}
    assert len(findings(listing, REPEATED)) == 2
    assert listing.clips[0].video == "0001_Example_Movie_00.01.00.000-00.01.03.250"


@real
def test_real_didemo(tmp_path):
    names = [f"{s}_list.txt" for s in ("train", "val", "test")] + [
        "val_data.json",
        "test_data.json",
    ]
    folder = folder_of(tmp_path, "DiDeMo", **{name: name for name in names})
    (folder / "train_data.json").write_text("[]")  # cannot be had
    listing = DATASETS["didemo"].read(folder)
    assert listing.counts() == {"val": 1065, "test": 1004}
    assert len(findings(listing, LOST)) == 8392
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
def test_real_activitynet(variant, test):
    listing = DATASETS["activitynet"].read(SHARED / "ActivityNet", variant)
    assert listing.counts() == {"train": 10007, "test": test}
    assert listing.expected["train"] - 10007 == 2
    assert listing.expected["test"] - test == 1
    known_bad = ["v_WjEh7acrr5o", "v_uTc2-oAxgbc", "v_LURZ8QDfowU"]
    assert findings(listing, UNLISTED) == known_bad
    assert len(findings(listing, SEGMENT)) == 4  # two reversed, two empty; rounding is no finding
    assert max(len(clip.captions[0].split()) for clip in listing.clips) == 504
    assert not any("\n" in text or "  " in text for clip in listing.clips for text in clip.captions)
