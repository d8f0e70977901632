"""Keeps models that were converted on the way, so that each is converted once."""

import hashlib
import os
import re
from pathlib import Path

from xclip_jax.cli import InputError
from xclip_jax.convert.importing import convert
from xclip_jax.convert.reading import locate

_VERSION = 1  # of what `convert` writes: increase it when the same checkpoint gives another model
_KINDS = (".json", ".safetensors", ".bin", ".pt", ".txt", ".gz", ".model")


def cache_folder() -> Path:
    """Returns the folder of converted models: $XCLIP_JAX_CACHE or ~/.cache/xclip_jax."""
    return Path(os.environ.get("XCLIP_JAX_CACHE") or Path.home() / ".cache" / "xclip_jax")


def convert_once(
    source: str | Path, revision: str | None = None, token: str | bool | None = None
) -> Path:
    """Returns the model directory of a checkpoint file, a Hugging Face folder or a hub id.

    It is converted, with a summary on stdout, unless it was before with the same files, or is a
    model directory on the hub. Raises InputError as `convert`, or if the cache cannot be written.
    """
    location = locate(source, revision, token)
    if (location / "model.json").is_file():
        return location
    folder = cache_folder() / f"{_readable(str(source))}-{_digest(location)}"
    if not (folder / "model.json").is_file():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            convert(location, folder)
        except OSError as error:
            if not (folder / "model.json").is_file():  # else another process was faster
                problem = f"{folder} cannot be written: {error}"
                raise InputError(f"{problem}; set XCLIP_JAX_CACHE to another folder") from None
    return folder


def _readable(source: str) -> str:
    """Returns a name for a folder that starts like the end of a path or a hub id."""
    return re.sub(r"[^\w.-]+", "_", "_".join(Path(source).parts[-2:])).strip("_.")[:80] or "model"


def _digest(location: Path) -> str:
    """Returns a digest of the names, sizes and times of a checkpoint's files.

    For a file, those beside it count too, as they may describe it.
    """
    folder = location if location.is_dir() else location.parent
    files = {path for path in folder.iterdir() if path.suffix in _KINDS and path.is_file()}
    others = (".safetensors", ".bin", ".pt")
    if location.is_file():
        files = {path for path in files if path.suffix not in others} | {location}
    seen = [(path.name, (s := path.stat()).st_size, s.st_mtime_ns) for path in sorted(files)]
    content = repr((_VERSION, str(folder.resolve()), seen))
    return hashlib.blake2b(content.encode(), digest_size=6).hexdigest()
