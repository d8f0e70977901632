"""Grey videos to prepare, the command that prepares them, and what it wrote.

The videos are 64 pixels wide, with a frame every half second. The brightness of frame n is
level + 4 n, which identifies a stored frame.
"""

import concurrent.futures
import json
import os
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from xclip_jax import prepare, workers
from xclip_jax.data.builder import Dataset
from xclip_jax.data.preprocess import decode_jpeg

ROOT = Path(__file__).resolve().parents[1]


def make_video(path, level=20, seconds=3.0):
    numbers = range(int(2 * seconds))
    return _write(path, [np.full((64, 64, 3), level + 4 * n, np.uint8) for n in numbers])


def make_wide_video(path):
    """Writes a black square with a white border left and right, of half its width."""
    picture = np.full((64, 128, 3), 255, np.uint8)
    picture[:, 32:96] = 0
    return _write(path, [picture] * 2)


def _write(path, pictures):
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width, _ = pictures[0].shape
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=2, options={"crf": "4", "g": "2"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 2)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def cut_off(path):
    """Truncates an AVI file, so that it has fewer frames than its header states."""
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 8 // 10])  # the header alone is 6 tenths


def annotate(path, *items):
    path.write_text(json.dumps([{"caption": "a grey picture"} | item for item in items]))
    return path


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    make_video(folder / "a.mp4", level=20)
    make_video(folder / "sub" / "b.c.mkv", level=60, seconds=4)
    make_video(folder / "d.mp4", level=120, seconds=1)
    return folder


def one_thread(jobs):
    """Returns a pool of one thread, as np.load in two fails on Python 3.11.7 (gh-106905)."""
    return concurrent.futures.ThreadPoolExecutor(1)


@pytest.fixture
def in_thread(monkeypatch):
    """Replaces the pool of processes by a thread, which starts faster."""
    monkeypatch.setattr(workers, "worker_pool", one_thread)


def command(videos, annotations, output, *more):
    return [
        *(sys.executable, "-m", "xclip_jax.prepare", "--dataset=captions", f"--videos={videos}"),
        *(f"--annotations={annotations}", f"--output={output}", "--image_size=32", *more),
    ]


def run(*arguments):
    return subprocess.run(
        command(*arguments), cwd=ROOT, capture_output=True, text=True, check=False
    )


def group_is_gone(group, seconds=20):
    for _ in range(10 * seconds):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


def main(capsys, *arguments):
    """Runs the command line in this process, returns its exit status and stderr."""
    with pytest.raises(SystemExit) as stopped:
        prepare.main([str(argument) for argument in arguments])
    message = stopped.value.code
    if isinstance(message, str):  # as the interpreter does it
        print(message, file=sys.stderr)
        message = 1
    return message, capsys.readouterr().err


def records(output, split="train"):
    """Returns the content of a split."""
    return [
        (
            record["id"].decode(),
            [caption.decode() for caption in record["captions"]],
            list(record["frames"]),
            [float(time) for time in record["times"]],
        )
        for record in Dataset(output).clips(split)
    ]


def levels(frames):
    return [round(float(decode_jpeg(jpeg).mean()) / 4) * 4 for jpeg in frames]


def failures(output):
    return [json.loads(line) for line in (output / "failures.jsonl").read_text().splitlines()]


def files(folder):
    """Returns {path below a folder: content} of all files."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}
