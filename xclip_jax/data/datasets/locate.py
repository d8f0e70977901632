"""Which video file an annotation means, whatever its extension and sub-folder."""

import os
from pathlib import Path

from xclip_jax.cli import InputError
from xclip_jax.data.video import VIDEO_SUFFIXES


class Videos:
    """The files below a folder, by the names an annotation may use; links are followed.

    A video file answers to its path below the folder and to its name, each also without its suffix,
    and without further suffixes of videos (`a.mov.mp4`, `a..mp4`: also `a`). A file with another
    suffix answers to its whole name or path alone.

    Attributes:
        files: paths of the video files, sorted.

    Raises:
        InputError: the folder is missing or holds no video.
    """

    def __init__(self, folder):
        folder = Path(folder)
        if not folder.is_dir():
            raise InputError(f"no such folder of videos: {folder}")
        self.files, self._by_path, self._by_name = [], {}, {}
        for path in sorted(_walk(folder)):
            below = path.relative_to(folder)
            stems = _stems(path.name)
            self._by_path[below.as_posix()] = path
            below_stems = {below.with_name(stem).as_posix() for stem in stems}
            for name in {path.name, below.as_posix(), *stems, *below_stems}:
                self._by_name.setdefault(name, []).append(path)
            if stems:
                self.files.append(path)
        if not self.files:
            raise InputError(f"no video files in {folder}")

    def locate(self, video, is_path=False):
        """The one file that an annotation means; None if there is none.

        Args:
            video: an id, whose suffix, if it is a video's, may be another on disk.
            is_path: whether it may be a path below the folder, which then means that file alone.

        Raises:
            InputError: several files answer to the name; the message names them.
        """
        if is_path and video in self._by_path:
            return self._by_path[video]
        paths = self._by_name.get(video, [])
        if not is_path or not paths:
            stem = _without_suffix(video)
            paths = sorted({*paths, *(self._by_name.get(stem, []) if stem else ())})
        if len(paths) > 1:
            raise InputError(f"video {video!r} is ambiguous: {' and '.join(map(str, paths[:3]))}")
        return paths[0] if paths else None


def _walk(folder):
    """All files below a folder; each folder once, though links may lead to it again."""
    seen = set()
    for here, folders, files in os.walk(folder, followlinks=True):
        status = os.stat(here)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        yield from (path for path in (Path(here, name) for name in files) if path.is_file())


def _stems(name):
    """The name without its suffix, and without further ones of videos."""
    stems = []
    while name := _without_suffix(name):
        stems.append(name)
    return stems


def _without_suffix(name):
    """The name without a video's suffix, or the bare dot of some DiDeMo ids; else ""."""
    stem, dot, suffix = name.rpartition(".")
    return stem if dot and (not suffix or f".{suffix.lower()}" in VIDEO_SUFFIXES) else ""
