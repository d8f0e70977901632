"""Which video file an annotation means, whatever its extension and sub-folder."""

from pathlib import Path

from xclip_jax.data.video import VIDEO_SUFFIXES
from xclip_jax.errors import InputError


def find_videos(folder):
    """Every video file below a folder, by each name an annotation may use.

    Returns:
        {name: [Path, ...]} where a name is a path below the folder or a file name, each with and
        without its last suffix, and without further ones of videos (`a.mov.mp4`, `a..mp4`: also
        `a`). A whole path below the folder means that file alone.

    Raises:
        InputError: the folder is missing or holds no video.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"no such folder of videos: {folder}")
    files = (path for path in sorted(folder.rglob("*")) if _without_suffix(path.name))
    exact = {path.relative_to(folder): path for path in files if path.is_file()}
    if not exact:
        raise InputError(f"no video files in {folder}")
    found = {}
    for below, path in exact.items():
        stems = {below.with_name(stem).as_posix() for stem in _stems(path.name)}
        for name in {path.name, *_stems(path.name), *stems}:
            found.setdefault(name, []).append(path)
    return found | {below.as_posix(): [path] for below, path in exact.items()}


def locate(video, found):
    """The one file that an annotation's `video` means, out of `find_videos`; None if there is none.

    A name with a video's suffix may also mean a file with another one.

    Raises:
        InputError: several files answer to the name; the message names them.
    """
    paths = found.get(video) or found.get(_without_suffix(video), [])
    if len(paths) > 1:
        raise InputError(f"video {video!r} is ambiguous: {' and '.join(map(str, paths[:3]))}")
    return paths[0] if paths else None


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
