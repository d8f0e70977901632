"""Measures the time of preparing a video relative to the bare decoding of its frames.

    python benchmarks/prepare.py                # on generated videos: 480 lines, 20 s, H.264
    python benchmarks/prepare.py --videos DIR   # on the videos of a folder

Both jobs run over all files on a pool of one process per core, alternately, so that other load on
the machine slows both. Target: a ratio of at most 1.3 in wall time. Other load counts in the wall
time but not in the processor time.
"""

import argparse
import concurrent.futures
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
from PIL import Image

from xclip_jax.data import preprocess as preprocessing
from xclip_jax.data import video
from xclip_jax.data.extraction import VIDEO_SUFFIXES

TARGET = 1.3
IMAGE_SIZE = 224
Job = Callable[[Path], float]
CpuTimes = dict[tuple[Job, Path], list[float]]


def decode(path: Path) -> float:
    """Decodes every frame and returns the processor seconds."""
    begin = time.process_time()
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        try:
            for _ in container.decode(stream):
                pass
        except av.FFmpegError:
            pass  # prepare stops at the same frame
    return time.process_time() - begin


def prepare(path: Path) -> float:
    """Samples a video's frames and encodes them as JPEG, as xclip_jax.prepare does."""
    begin = time.process_time()
    for frame in video.read_frames(path, preprocessing.FrameFormat(IMAGE_SIZE)).frames:
        preprocessing.encode_jpeg(frame)
    return time.process_time() - begin


def make_videos(folder: Path, count: int, *, seconds: int = 20, rate: int = 25) -> list[Path]:
    """Writes 480-line H.264 videos of about 1 Mbit/s: two moving layers of smooth noise, grain."""
    rng = np.random.default_rng(0)
    paths = [folder / f"{index}.mp4" for index in range(count)]
    for path in paths:
        background, foreground = (_smooth_noise(rng, 480, 1708, cell) for cell in (60, 12))
        grain = rng.integers(-3, 4, (8, 480, 854, 3), dtype=np.int16)
        speed = rng.uniform(1, 5)
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=rate, options={"crf": "23"})
            stream.width, stream.height, stream.pix_fmt = 854, 480, "yuv420p"
            for index in range(seconds * rate):
                shift = int(400 + 400 * np.sin(index * speed / 400))
                image = background[:, shift // 2 :][:, :854] + foreground[:, shift:][:, :854]
                image = np.clip(image + grain[index % 8], 0, 255).astype(np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            container.mux(stream.encode(None))
    return paths


def _smooth_noise(rng: np.random.Generator, height: int, width: int, cell: int) -> np.ndarray:
    small = rng.integers(0, 128, (height // cell, width // cell, 3), dtype=np.uint8)
    resized = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(resized, np.int16)


def measure(paths: list[Path], repeats: int) -> tuple[dict[Job, list[float]], CpuTimes]:
    """Returns ({job: wall times over all files}, {(job, path): processor times})."""
    walls, cpu = {decode: [], prepare: []}, {}
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(prepare, paths))  # imports modules and fills the page cache
        for repeat in range(repeats):
            for job in (decode, prepare) if repeat % 2 else (prepare, decode):
                begin = time.perf_counter()
                for path, seconds in zip(paths, pool.map(job, paths), strict=True):
                    cpu.setdefault((job, path), []).append(seconds)
                walls[job].append(time.perf_counter() - begin)
    return walls, cpu


def print_table(paths: list[Path], walls: dict[Job, list[float]], cpu: CpuTimes) -> None:
    """Prints medians over the repeats. A ratio is the median of the ratio within each repeat."""
    print(f"{'seconds':<40}{'decode':>10}{'prepare':>10}{'ratio':>8}")
    for path in paths:
        _print_row(path.name[:39], cpu[decode, path], cpu[prepare, path])
    sums = [
        [sum(column) for column in zip(*(cpu[j, p] for p in paths), strict=True)] for j in walls
    ]
    _print_row("all, processor", *sums)
    ratio = _print_row("all, wall", *walls.values())
    result = "met" if ratio <= TARGET else "MISSED"
    print(f"{os.cpu_count()} processes, {len(walls[decode])} repeats, target {TARGET}: {result}")


def _print_row(name: str, decode_times: list[float], prepare_times: list[float]) -> float:
    ratio = statistics.median(p / d for d, p in zip(decode_times, prepare_times, strict=True))
    medians = statistics.median(decode_times), statistics.median(prepare_times)
    print(f"{name:<40}{medians[0]:>10.3f}{medians[1]:>10.3f}{ratio:>8.2f}")
    return ratio


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--videos", type=Path, help="a folder of videos (default: generated ones)")
    parser.add_argument("--count", type=int, default=4, help="number of generated videos")
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.videos:
            paths = [p for p in args.videos.iterdir() if p.suffix.lower() in VIDEO_SUFFIXES]
        else:
            paths = make_videos(Path(folder), args.count)
        # The longest jobs start first, so that no process idles at the end.
        paths.sort(key=lambda path: -path.stat().st_size)
        print_table(paths, *measure(paths, args.repeats))


if __name__ == "__main__":
    main()
