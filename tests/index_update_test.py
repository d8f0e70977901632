"""Tests of adding videos to an index, removing them, and reading meanwhile."""

import datetime
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import tiny
from filelock import FileLock
from indexes import COUNT, content, copied, made, model, no_processes, one_clip, videos

from xclip_jax.cli import InputError
from xclip_jax.search import Index, indexing, store
from xclip_jax.search.store import Store

__all__ = ["copied", "made", "model", "no_processes", "one_clip", "videos"]  # the fixtures


def test_unchanged_files_are_not_read_again(copied, videos, monkeypatch):
    monkeypatch.setattr(indexing, "run_jobs", None)  # would fail if called
    before = content(copied)
    added = copied.add([videos])
    assert (added.files, added.segments, added.unchanged) == (0, 0, COUNT)
    assert content(copied) == before


def test_only_changed_files_are_read_again(copied, videos, tmp_path):
    folder = Path(shutil.copytree(videos, tmp_path / "videos"))
    copied.add([folder])
    assert copied.num_segments == 6 * COUNT
    before = content(copied)
    shutil.copy(videos / "clip4.mp4", folder / "clip0.mp4")
    os.utime(folder / "clip0.mp4", ns=(1, 1))
    added = copied.add([folder])
    assert (added.files, added.unchanged, added.removed) == (1, COUNT - 1, 1)
    after = content(copied)
    changed = {key for key in before if key not in after}
    assert {before[key][0] for key in changed} == {str(folder / "clip0.mp4")}
    assert len(changed) == 3
    assert len(after) == len(before)


def test_prune_removes_only_missing_files_of_the_given_folders(copied, videos, tmp_path):
    folder = Path(shutil.copytree(videos, tmp_path / "videos"))
    copied.add([folder])
    (folder / "clip1.mp4").unlink()
    assert copied.add([folder]).removed == 0
    assert copied.num_files == 2 * COUNT
    assert copied.add([folder], prune=True).removed == 1
    assert copied.num_files == 2 * COUNT - 1
    assert copied.remove([folder / "clip2.mp4"]) == 3
    assert copied.num_files == 2 * COUNT - 2


def test_unreadable_files_are_listed_and_retried_once_they_change(copied, videos, tmp_path):
    folder = tmp_path / "videos"
    folder.mkdir()
    (folder / "it's broken.mp4").write_bytes(b"nothing")
    shutil.copy(videos / "clip0.mp4", folder)
    for _ in range(2):
        added = copied.add([folder])
        assert list(added.unreadable) == [str(folder / "it's broken.mp4")]
        assert "cannot be opened" in added.unreadable[str(folder / "it's broken.mp4")]
    shutil.copy(videos / "clip1.mp4", folder / "it's broken.mp4")
    added = copied.add([folder])
    assert (added.files, added.unreadable) == (1, {})
    assert copied.add([folder]).unreadable == {}


@pytest.mark.parametrize("path", ["nowhere", "."])
def test_no_video_is_an_error(copied, path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"no such file|no video files in"):
        copied.add([path])


def test_file_name_that_is_not_utf8_is_listed(copied, videos, tmp_path):
    folder = tmp_path / "names"
    folder.mkdir()
    shutil.copy(videos / "clip0.mp4", os.fsencode(folder) + b"/\xff.mp4")
    shutil.copy(videos / "clip0.mp4", folder / "\N{DOG FACE}'s.mp4")
    added = copied.add(folder)
    assert added.files == 1
    assert list(added.unreadable.values()) == [indexing.NAME_NOT_UTF8]
    assert copied.remove(folder / "\N{DOG FACE}'s.mp4") == 3


def test_prune_keeps_files_of_an_emptied_folder(copied, videos, tmp_path):
    folder = tmp_path / "emptied"
    folder.mkdir()
    shutil.copy(videos / "clip0.mp4", folder)
    copied.add(folder)
    (folder / "clip0.mp4").unlink()
    added = copied.add(folder, prune=True)
    assert (added.removed, added.unreadable) == (0, {str(folder): indexing.HIDING})
    folder.rmdir()
    added = copied.add(folder, prune=True)
    assert (added.removed, added.unreadable) == (0, {str(folder): indexing.HIDING})
    folder.symlink_to(tmp_path / "offline")
    added = copied.add(tmp_path, prune=True)
    assert (added.removed, added.unreadable) == (0, {str(folder): indexing.HIDING})
    folder.unlink()
    assert copied.add(tmp_path, prune=True).removed == 1


def test_full_disk_is_not_recorded_as_an_unreadable_video(copied, one_clip, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("xclip_jax.search.segments.choose_frames", full)
    with pytest.raises(OSError, match="No space left"):
        copied.add(one_clip)
    monkeypatch.undo()
    monkeypatch.setattr(indexing, "run_jobs", tiny.run_jobs_here)
    assert copied.add(one_clip).files == 1


def test_reader_of_a_deleted_version_moves_to_the_latest(copied, videos, monkeypatch):
    reader, zero = Index.open(copied.location), datetime.timedelta(0)
    monkeypatch.setattr(store, "MAX_FRAGMENTS", 0)
    monkeypatch.setattr(store.datetime, "timedelta", lambda hours: zero)
    copied.remove(videos / "clip0.mp4")
    copied.add(videos / "clip1.mp4")  # compacts
    hits = reader.query("a dog", k=100, merge=False)
    assert len(hits) == 3 * (COUNT - 1)


UNGUARDED = """
import sys
from xclip_jax.search import Index
print(Index.create(sys.argv[1], sys.argv[2]).add(sys.argv[3]).segments, "segments")
"""


def test_script_without_main_guard_can_add_videos(model, videos, tmp_path):
    (tmp_path / "script.py").write_text(UNGUARDED)
    (tmp_path / "one").mkdir()
    shutil.copy(videos / "clip0.mp4", tmp_path / "one")
    arguments = [tmp_path / "index", model, tmp_path / "one"]
    command = [sys.executable, tmp_path / "script.py", *arguments]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.stdout == "1 segments\n", done.stderr


def test_file_that_crashed_the_decoder_is_retried(copied, one_clip, monkeypatch):
    run_jobs = indexing.run_jobs
    monkeypatch.setattr(indexing, "run_jobs", lambda _, jobs, done: done(0, None))
    assert "crashed" in copied.add(one_clip).unreadable[str(one_clip / "clip0.mp4")]
    monkeypatch.setattr(indexing, "run_jobs", run_jobs)
    added = copied.add(one_clip)
    assert (added.files, added.unreadable) == (1, {})


def test_missing_folders_can_be_pruned_and_removed(copied, videos, tmp_path):
    folder = Path(shutil.copytree(videos, tmp_path / "library" / "videos"))
    shutil.copy(videos / "clip0.mp4", folder.parent)
    copied.add(folder)
    shutil.rmtree(folder)
    with pytest.raises(InputError, match="no such file or folder"):
        copied.add(folder)
    assert copied.add(folder.parent, prune=True).removed == COUNT
    assert copied.remove(folder.parent) == 3
    assert copied.remove(videos) == 3 * COUNT
    assert len(copied) == 0


def test_changed_files_need_at_most_two_commits(copied, videos, tmp_path):
    folder = Path(shutil.copytree(videos, tmp_path / "videos"))
    copied.add(folder)
    before = Store(copied.location).version()
    for path in folder.iterdir():
        os.utime(path, ns=(1, 1))
    assert copied.add(folder).removed == COUNT
    assert copied.num_segments == 6 * COUNT
    assert Store(copied.location).version() <= before + 2


def test_second_writer_is_an_error(copied, videos):
    with (
        FileLock(Path(copied.location, "writer.lock")),
        pytest.raises(indexing.BusyError, match="another process is adding"),
    ):
        copied.add([videos])


def test_readers_see_complete_files_while_a_writer_adds(copied, videos, tmp_path, monkeypatch):
    """Runs two readers that query continuously and must never see part of a file."""
    monkeypatch.setattr(indexing, "MIN_COMMIT_SECONDS", 0)
    monkeypatch.setattr(indexing, "COMMIT_FRACTION", 0)
    folder = tmp_path / "more"
    folder.mkdir()
    for number in range(12):
        shutil.copy(videos / f"clip{number % COUNT}.mp4", folder / f"{number}.mp4")
    readers = [Index.open(copied.location) for _ in range(2)]
    seen, passes, failures, ended = [set(), set()], [0, 0], [], threading.Event()
    commit = Store.add

    def commit_and_wait_for_readers(store, *rows):
        commit(store, *rows)
        goals = [count + 2 for count in passes]  # one may have begun before the commit
        while not failures and any(p < g for p, g in zip(passes, goals, strict=True)):
            time.sleep(0.01)

    def read(number):
        try:
            while not ended.is_set():
                readers[number].refresh()
                hits = readers[number].query("a dog", k=200, merge=False).hits
                seen[number].add(len(hits))
                for path in {hit.path for hit in hits}:
                    assert sum(hit.path == path for hit in hits) == 3
                passes[number] += 1
        except Exception as error:
            failures.append(error)

    monkeypatch.setattr(Store, "add", commit_and_wait_for_readers)
    running = [threading.Thread(target=read, args=(number,)) for number in range(2)]
    for thread in running:
        thread.start()
    copied.add([folder])
    ended.set()
    for thread in running:
        thread.join()
    assert failures == []
    assert all(len(versions) > 2 for versions in seen)
    assert copied.num_segments == 3 * COUNT + 36


def fragments(index):
    return Store(index.location)._segments.stats()["fragment_stats"]["num_fragments"]


def test_data_files_of_many_commits_are_merged(copied, videos, tmp_path, monkeypatch):
    monkeypatch.setattr(indexing, "MIN_COMMIT_SECONDS", 0)
    monkeypatch.setattr(indexing, "COMMIT_FRACTION", 0)
    folder = tmp_path / "more"
    folder.mkdir()
    for number in range(8):
        shutil.copy(videos / "clip0.mp4", folder / f"{number}.mp4")
    copied.add([folder])
    assert 2 < fragments(copied) < store.MAX_FRAGMENTS
    before = content(copied)
    monkeypatch.setattr(store, "MAX_FRAGMENTS", 2)
    copied.add([folder])
    assert fragments(copied) == 1
    assert content(copied) == before


def test_file_with_several_names_is_indexed_once(copied, videos, tmp_path):
    folder = tmp_path / "videos"
    folder.mkdir()
    shutil.copy(videos / "clip0.mp4", folder / "b.mp4")
    os.link(folder / "b.mp4", folder / "c.mp4")
    (folder / "a.mp4").symlink_to("b.mp4")
    (tmp_path / "linked").symlink_to(folder, target_is_directory=True)
    assert copied.add([folder, tmp_path / "linked"]).files == 1
    names = {row[0] for row in content(copied).values()}
    assert str(folder / "b.mp4") in names
    again = copied.add([tmp_path / "linked"])
    assert (again.files, again.unchanged, copied.num_files) == (0, 1, COUNT + 1)
    (folder / "b.mp4").unlink()  # the file stays, with another name
    assert copied.add([folder], prune=True).removed == 1
    assert copied.num_files == COUNT + 1
    copied.remove(tmp_path / "linked" / "c.mp4")
    assert copied.num_files == COUNT


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_prune_keeps_files_of_a_folder_that_cannot_be_listed(copied, videos, tmp_path):
    folder = Path(shutil.copytree(videos, tmp_path / "videos" / "below"))
    shutil.copy(videos / "clip0.mp4", folder.parent)
    copied.add(folder.parent)
    folder.chmod(0)
    try:
        added = copied.add(folder.parent, prune=True)
    finally:
        folder.chmod(0o755)
    assert added.removed == 0
    assert str(folder) in added.unreadable
    assert copied.num_files == 2 * COUNT + 1


def test_file_that_could_not_be_opened_is_read_later(copied, one_clip, monkeypatch):
    real = open

    def open_unless_clip(file, *args, **options):
        if str(file).endswith("more/clip0.mp4"):
            raise PermissionError(13, "Permission denied")
        return real(file, *args, **options)

    monkeypatch.setattr("builtins.open", open_unless_clip)
    (reason,) = copied.add(one_clip).unreadable.values()
    assert reason == "cannot be opened: Permission denied"
    monkeypatch.undo()
    monkeypatch.setattr(indexing, "run_jobs", tiny.run_jobs_here)
    added = copied.add(one_clip)
    assert (added.files, added.unreadable) == (1, {})


def test_segments_added_by_two_processes_count_once(copied, one_clip):
    before, num_segments = copied.query("a dog", k=100), copied.num_segments
    table = copied._store._segments
    table.add(table.to_arrow().slice(2, 5))  # what a second writer of a bucket may commit
    reader = Index.open(copied.location)
    assert reader.num_segments == num_segments
    after = reader.query("a dog", k=100)
    assert [(hit.id, hit.score) for hit in after] == [(hit.id, hit.score) for hit in before]
    reader.add(one_clip)
    assert reader._store._segments.count_rows() == reader.num_segments == num_segments + 3


def test_index_without_offsets_is_still_read(copied, one_clip, tmp_path):
    table = copied._store._segments
    table.drop_columns(["offset", "digest", "frames_digest", "thumbnail_digest"])
    old = Index.open(copied.location)
    assert {hit.offset for hit in old.query("a dog", k=100)} == {0.0}
    assert old.add(one_clip).files == 1
