"""Finds the video file that an annotation refers to, whatever its suffix and sub-folder."""

import os
from collections.abc import Iterator
from pathlib import Path

from xclip_jax.cli import InputError

VIDEO_SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".qt", ".mkv", ".webm", ".avi", ".divx", ".mpg", ".mpeg", ".m2v"),
    *(".vob", ".ts", ".mts", ".m2ts", ".wmv", ".asf", ".flv", ".f4v", ".3gp", ".3g2", ".ogv"),
    *(".3gpp", ".rm", ".rmvb", ".mxf"),
    *(".ogg", ".gif"),
)


class VideoFolder:
    """The files in a folder and its sub-folders, indexed by the names annotations may use.

    A video file is found by its path below the folder and by its name, each also without its
    suffix and without further suffixes of videos (`a.mov.mp4`, `a..mp4`: also `a`). A file with
    another suffix is found by its full name or path only. Symbolic links are followed.

    Attributes:
        files: paths of the video files, sorted.

    Raises:
        InputError: the folder does not exist or contains no video.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        folder = Path(folder)
        if not folder.is_dir():
            raise InputError(f"no such folder of videos: {folder}")
        self.files: list[Path] = []
        self._by_path: dict[str, Path] = {}
        self._by_name: dict[str, list[Path]] = {}
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

    def locate(self, video: str, *, is_path: bool = False) -> Path | None:
        """Returns the file that an annotation refers to, or None.

        Args:
            video: an id or file name; the suffix may differ on disk.
            is_path: True if `video` may be a path in the folder, which then matches that file only.

        Raises:
            InputError: several files match; the message names them.
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


def _walk(folder: Path) -> Iterator[Path]:
    """Yields all files below a folder, each folder once even if links form a cycle."""
    seen = set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        status = os.stat(parent)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        yield from (path for path in (Path(parent, name) for name in files) if path.is_file())


def _stems(name: str) -> list[str]:
    """Returns the name without its suffix, and also without further video suffixes."""
    stems = []
    while name := _without_suffix(name):
        stems.append(name)
    return stems


def _without_suffix(name: str) -> str:
    """Returns the name without its video suffix or final dot (DiDeMo), "" if it has neither."""
    stem, dot, suffix = name.rpartition(".")
    return stem if dot and (not suffix or f".{suffix.lower()}" in VIDEO_SUFFIXES) else ""
