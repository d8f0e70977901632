"""Tests of preparing from and to a bucket of a stand-in for S3."""

import json
import subprocess
import tempfile
import threading

import preparing
import pytest
import standins
from preparing import ROOT, cut_off, files, in_thread, main, make_video
from s3 import s3

from xclip_jax import buckets, prepare, workers
from xclip_jax.buckets import BucketPath
from xclip_jax.cli import InputError
from xclip_jax.data import builder, extraction
from xclip_jax.data.builder import Dataset, dataset_folder

__all__ = ["in_thread", "s3"]  # the fixtures


def download(bucket, prefix, folder):
    for name, content in bucket.objects(prefix).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


ITEMS = [
    {"video": "a", "captions": ["one", "two"]},
    {"video": "a", "caption": "the end", "start": 1.5},
    {"video": "b.c", "caption": "a part", "start": 0.5, "end": 2.5, "split": "test"},
    {"video": "cut", "caption": "ein größer Hund 犬", "split": "val"},
    {"video": "d.mp4", "caption": "short"},
    {"video": "missing", "caption": "nothing"},
    {"video": "text", "caption": "no video"},
]
OPTIONS = ["--dataset=captions", "--image_size=32", "--max_failures=0.5"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Makes videos (one cut off, one of text, one that no clip uses) and their captions."""
    folder = tmp_path_factory.mktemp("made")
    make_video(folder / "videos" / "a.mp4", level=20)
    make_video(folder / "videos" / "sub ü" / "b.c.mkv", level=60, seconds=4)
    make_video(folder / "videos" / "d.mp4", level=120, seconds=1)
    make_video(folder / "videos" / "sub ü" / "unused.mp4", seconds=1)
    cut_off(make_video(folder / "videos" / "cut.avi", seconds=20))
    (folder / "videos" / "text.mkv").write_text("Not found\n" * 100)
    (folder / "captions.json").write_text(json.dumps(ITEMS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers, "worker_pool", preparing.one_thread)
        prepare.main([*OPTIONS, *locations(folder, f"{folder}/out")])
    return folder


def locations(source, output):
    return [
        f"--videos={source}/videos",
        f"--annotations={source}/captions.json",
        f"--output={output}",
    ]


@pytest.fixture
def source(s3, made):
    s3.upload(made / "videos", "videos")
    s3.write("captions.json", (made / "captions.json").read_bytes())
    return s3


def test_bucket_gets_the_same_bytes_as_the_disk(source, made, in_thread, tmp_path, capsys):
    source.requests.clear()
    prepare.main([*OPTIONS, *locations(source.uri, f"{source.uri}/out")])
    assert capsys.readouterr().out.splitlines()[-1] == f"prepared {source.uri}/out"
    counted = list(source.requests)
    assert source.objects("out") == files(made / "out")
    assert not source.keys("out/work/")
    found = json.loads((made / "out" / "findings.jsonl").read_text().splitlines()[-1])
    assert found == {"what": "file that no clip uses", "id": "sub ü/unused.mp4", "detail": ""}

    # Each video is fetched once, also for two clips, and only if a clip uses it.
    videos = [request for request in counted if request[1].startswith(f"/{source.name}/videos/")]
    names = ["a.mp4", "cut.avi", "d.mp4", "sub ü/b.c.mkv", "text.mkv"]
    for method in ("HEAD", "GET"):
        fetched = [path.split("/videos/")[1] for m, path, _ in videos if m == method]
        assert sorted(fetched) == names
    assert counted.count(("GET", f"/{source.name}", None)) == 4  # listings, however many videos
    assert len(Dataset(download(source, "out", tmp_path)).clips("train")) == 3

    prepare.main([*OPTIONS, *locations(source.uri, f"{source.uri}/out/")])
    assert capsys.readouterr().out == f"{source.uri}/out is already prepared; nothing to do\n"
    with pytest.raises(InputError, match="prepared with other image_size; choose"):
        prepare.prepare(f"{source.uri}/captions.json", f"{source.uri}/videos", f"{source.uri}/out")


@pytest.mark.parametrize("remote", ["videos", "output"])
def test_disk_and_bucket_may_be_mixed(remote, source, made, in_thread, tmp_path):
    where = dict.fromkeys(["videos", "annotations", "output"], made) | {"output": tmp_path}
    where[remote] = source.uri
    arguments = [f"--videos={where['videos']}/videos", f"--output={where['output']}/out"]
    prepare.main([*OPTIONS, *arguments, f"--annotations={where['annotations']}/captions.json"])
    got = source.objects("out") if remote == "output" else files(tmp_path / "out")
    assert got == files(made / "out")


def test_annotations_of_a_benchmark_are_read_from_a_bucket(s3, in_thread, tmp_path, monkeypatch):
    monkeypatch.setattr(builder, "SHARD_BYTES", 1)  # a shard each
    standins.msvd(tmp_path)
    for name in ("annotations", "videos"):
        s3.upload(tmp_path / name, name)
    s3.write("annotations/large.mp4", b"not fetched")
    s3.write("annotations/below/other.json", b"not fetched")
    common = ["--dataset=msvd", "--image_size=16", "--max_failures=0.2"]
    for place in (tmp_path, s3.uri):
        arguments = [f"--annotations={place}/annotations", f"--videos={place}/videos"]
        prepare.main([*common, *arguments, f"--output={place}/out"])
    assert s3.objects("out") == files(tmp_path / "out")
    assert len(s3.keys("out/xclip_clips/1.1.0/xclip_clips-train")) == 11
    assert not any("not fetched" in path for _, path, _ in s3.requests)
    s3.delete("annotations/val_list.txt")
    with pytest.raises(InputError, match=rf"^{s3.uri}/annotations has no val_list.txt: it must"):
        prepare.prepare(f"{s3.uri}/annotations", f"{s3.uri}/videos", s3.uri, dataset="msvd")


def test_interrupted_upload_is_not_taken_for_complete(source, made, in_thread, tmp_path, capsys):
    arguments = [*OPTIONS, *locations(source.uri, f"{source.uri}/out")]
    source.hook = lambda method, path: (
        403 if (method, path[-13:]) == ("PUT", "features.json") else None
    )
    status, error = main(capsys, *arguments)
    assert status == 1
    last = error.splitlines()[-1]
    assert last.startswith(f"error: {source.uri}/out/xclip_clips/1.1.0/features.json cannot be ")
    assert "AWS_ACCESS_KEY_ID" in last
    source.hook = None
    with pytest.raises(InputError, match=r"^no complete data set in .*: dataset_info.json is miss"):
        Dataset(download(source, "out", tmp_path))
    source.write("out/xclip_clips/1.1.0/xclip_clips-train.array_record-00001-of-00002", b"old")

    source.requests.clear()
    prepare.main(arguments)
    assert source.objects("out") == files(made / "out")
    fetched = [p for m, p, _ in source.requests if m == "GET" and "/videos/" in p]
    assert fetched == [f"/{source.name}/videos/text.mkv"]  # failed before, the others are kept
    written = [p for m, p, _ in source.requests if m == "PUT" and "/1.1.0/" in p]
    assert written[-1].endswith("/1.1.0/dataset_info.json")
    names = {path.rpartition("/")[2] for path in written if not path.endswith("/")}
    assert names == {path.name for path in dataset_folder(made / "out").iterdir()}


def test_killed_run_leaves_no_video_and_resumes(source, made, tmp_path, monkeypatch, capsys):
    """Kills the command while it fetches a video."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    arguments = [*OPTIONS, *locations(source.uri, f"{source.uri}/out")]
    reached, release = threading.Event(), threading.Event()

    def hold(method, path):
        if method == "GET" and path.endswith("/d.mp4"):
            reached.set()
            release.wait(30)

    source.hook = hold
    command = preparing.command("", "", "")[:3]
    options = {"cwd": ROOT, "stderr": subprocess.DEVNULL, "start_new_session": True}
    process = subprocess.Popen([*command, *arguments], **options)
    assert reached.wait(30)
    while not source.keys("out/work/"):
        assert process.poll() is None
    process.kill()
    process.wait()
    assert preparing.group_is_gone(process.pid)
    release.set()
    source.hook = None
    assert list(tmp_path.glob(f"{buckets.SCRATCH}*/file.mp4"))
    kept = [key for key in source.keys("out/work/") if key.endswith(".npz")]
    assert kept
    source.requests.clear()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(workers, "worker_pool", preparing.one_thread)
    buckets.remove_stale_folders.cache_clear()
    prepare.main(arguments)
    assert source.objects("out") == files(made / "out")
    assert not list(tmp_path.iterdir())
    again = {path for method, path, _ in source.requests if method == "PUT" and "/work/" in path}
    assert not again & {f"/{source.name}/{key}" for key in kept}


def test_refused_video_ends_the_command_with_one_line(source):
    source.hook = lambda method, path: 403 if path.endswith("/d.mp4") else None
    command = preparing.command("", "", "")[:3]
    arguments = [*OPTIONS, *locations(source.uri, f"{source.uri}/out")]
    done = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line and "reading videos" not in line]
    assert len(lines) == 1
    assert lines[0].startswith(f"error: {source.uri}/videos/d.mp4 cannot be accessed: ")


def test_folder_is_listed_by_one_request(s3, tmp_path):
    names = [f"folder{n}/film.{n}/scene ü.mp4" for n in range(20)] + ["a.mp4", "notes.txt"]
    for name in names:
        s3.write(f"videos/{name}", name.encode())
    s3.write("videos_2/b.mp4", b"of another folder")
    s3.requests.clear()
    folder = extraction.VideoFolder(BucketPath(f"{s3.uri}/videos"))
    assert s3.requests == [("GET", f"/{s3.name}", None)]
    assert {file.uri.removeprefix(f"{s3.uri}/videos/") for file in folder.files} == {*names[:-1]}
    found = folder.locate("folder3/film.3/scene ü")
    assert (str(found), found.size) == (f"{s3.uri}/videos/{names[3]}", len(names[3].encode()))
    with pytest.raises(InputError, match=f"is ambiguous: {s3.uri}/videos/folder0/film.0/scene ü"):
        folder.locate("scene ü")


def test_file_is_copied_in_ranges_with_its_suffix(s3, monkeypatch):
    monkeypatch.setattr(buckets, "CHUNK_BYTES", 400)
    content = bytes(range(200)) * 5
    s3.write("a.b.MKV", content)
    s3.requests.clear()
    with buckets.local_file(BucketPath(f"{s3.uri}/a.b.MKV")) as copy:
        assert (copy.suffix, copy.read_bytes()) == (".MKV", content)
    assert not copy.parent.exists()
    ranges = [part for method, _, part in s3.requests if method == "GET"]
    assert ranges == ["bytes=0-399", "bytes=400-799", "bytes=800-999"]


def test_folder_of_a_running_process_is_not_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / f"{buckets.SCRATCH}old").mkdir()
    buckets.remove_stale_folders.cache_clear()
    with buckets.scratch_folder() as folder:
        buckets.remove_stale_folders.cache_clear()
        buckets.remove_stale_folders()
        assert list(tmp_path.iterdir()) == [folder]
    assert not list(tmp_path.iterdir())


def test_crash_fails_only_its_clip_of_a_video(s3, monkeypatch):
    """Simulates a decoder that crashes on the second of three clips of one video."""
    clips = [extraction.Clip("a", ("x",), "train", float(n)) for n in range(3)]
    video = buckets.BucketFile(f"{s3.uri}/a.mp4", 1, 1)
    jobs = [
        extraction.make_job(clip, video, extraction.FrameFormat(32), None, BucketPath(s3.uri))
        for clip in clips
    ]

    def run_jobs(function, items, done):
        for index, item in enumerate(items):
            crashes = jobs[1] in item if isinstance(item, list) else item is jobs[1]
            done(index, None if crashes else extraction.Outcome("read"))

    monkeypatch.setattr(extraction, "run_jobs", run_jobs)
    outcomes = extraction.extract_all(jobs, BucketPath(s3.uri), None)
    assert [o.failure for o in outcomes] == ["read", extraction.CRASHED, "read"]


def test_invalid_locations_are_one_line_errors(source, made, capsys, monkeypatch):
    out = f"{source.uri}/out"
    good = {"videos": f"{source.uri}/videos", "annotations": f"{source.uri}/captions.json"}
    allowed = "pass a folder, s3://BUCKET/FOLDER or gs://BUCKET/FOLDER"
    for change, message in [
        ({"videos": f"{source.uri}/x"}, f"no such folder of videos: {source.uri}/x"),
        ({"videos": f"{source.uri}/out"}, f"no such folder of videos: {source.uri}/out"),
        ({"annotations": f"{source.uri}/x.json"}, f"{source.uri}/x.json: no such object or folder"),
        ({"annotations": source.uri}, f"{source.uri} is a folder; --annotations must be the capt"),
        ({"videos": "s3://missing-bucket/x"}, "s3://missing-bucket/x cannot be accessed: "),
        ({"videos": "az://a/b"}, f"--videos=az://a/b: must be a path of this machine: {allowed}"),
        ({"videos": "s3://"}, f"--videos=s3://: must be a path of this machine: {allowed}"),
    ]:
        options = [f"--{name}={value}" for name, value in (good | change).items()]
        status, error = main(capsys, *OPTIONS, *options, f"--output={out}")
        assert (status, error.count("\n")) == (1, 1)
        assert error.startswith(f"error: {message}")
    assert not source.keys("out/")
    source.hook = lambda method, path: 403 if "PUT" in method else None
    options = [*OPTIONS, *locations(source.uri, out)]
    status, error = main(capsys, *options)
    assert (status, error.count("\n")) == (1, 1)
    assert error.startswith(f"error: {out}/request.json cannot be accessed: ")
    assert error.endswith("and AWS_ENDPOINT_URL for a service other than Amazon's\n")
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    monkeypatch.setenv("AWS_ENDPOINT", "http://127.0.0.1:9")
    status, error = main(capsys, *options)
    assert (status, error.count("\n")) == (1, 1)
    assert error.startswith(f"error: {source.uri}/captions.json cannot be accessed: ")


@pytest.mark.parametrize(
    ("uri", "command"),
    [
        ("s3://b/mine", "aws s3 sync s3://b/mine FOLDER"),
        ("gs://b/mine", "gcloud storage cp -r gs://b/mine FOLDER"),
    ],
)
def test_training_from_a_uri_is_an_error_that_says_how_to_copy(uri, command):
    with pytest.raises(InputError) as error:
        Dataset(uri)
    start = f"config.data.path={uri}: must be a path of this machine: copy it ({command}), or mount"
    assert str(error.value).startswith(start)


@pytest.mark.parametrize("place", ["disk", "bucket"])
def test_chunks_hold_all_items_once(place, s3, tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "CHUNK", 3)
    shared = tmp_path / "shared" if place == "disk" else BucketPath(f"{s3.uri}/shared")
    assert workers.write_chunks([f"item {n}" for n in range(7)], shared) == 3
    chunks = [list(workers._read_chunk(number, shared)) for number in range(3)]
    expected = [(number // 3, (number, f"item {number}")) for number in range(7)]
    assert [len(chunk) for chunk in chunks] == [3, 3, 1]
    assert [pair for chunk in chunks for pair in chunk] == expected
    assert workers._call(expected[4], len) == (1, (4, 6))
    workers._write_results((1, [(4, 6), (3, 5)]), shared)
    assert json.loads(buckets.read_file(shared / "results-000001.json")) == [[4, 6], [3, 5]]
    assert workers.write_chunks([], shared) == 0
