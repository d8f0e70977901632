"""How much preparing a video costs over the bare decoding of its frames, which nothing can avoid.

    python benchmarks/prepare.py                # on videos made here: 480 lines, 20 s, H.264
    python benchmarks/prepare.py --videos DIR   # on those of a folder

Both jobs run over all files on a pool of one process a core, in turns, so that a busy machine slows
both. The target is a ratio of at most 1.3, in wall time; where others use the machine, their load
is in the wall time and not in the processor time.
"""

import argparse
import concurrent.futures
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import av
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without an installation
from xclip_jax.data import video

TARGET = 1.3
IMAGE_SIZE = 224


def decode(path: Path) -> float:
    """Processor seconds to decode every frame, and nothing else."""
    begin = time.process_time()
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        try:
            for _ in container.decode(stream):
                pass
        except av.FFmpegError:
            pass  # prepare stops there too
    return time.process_time() - begin


def prepare(path: Path) -> float:
    """Processor seconds of a video's work in xclip_jax.prepare: the chosen frames as JPEG."""
    begin = time.process_time()
    for frame in video.read_frames(path, IMAGE_SIZE).frames:
        video.encode_jpeg(frame)
    return time.process_time() - begin


def make_videos(folder: Path, count: int, seconds: int = 20, rate: int = 25) -> list[Path]:
    """480-line H.264 of about 1 Mbit/s: smooth noise in two layers that move, and grain."""
    rng = np.random.default_rng(0)
    paths = [folder / f"{index}.mp4" for index in range(count)]
    for path in paths:
        far, near = (_texture(rng, 480, 1708, cell) for cell in (60, 12))
        grain = rng.integers(-3, 4, (8, 480, 854, 3), dtype=np.int16)
        speed = rng.uniform(1, 5)
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=rate, options={"crf": "23"})
            stream.width, stream.height, stream.pix_fmt = 854, 480, "yuv420p"
            for index in range(seconds * rate):
                shift = int(400 + 400 * np.sin(index * speed / 400))
                picture = far[:, shift // 2 :][:, :854] + near[:, shift:][:, :854]
                picture = np.clip(picture + grain[index % 8], 0, 255).astype(np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode(None))
    return paths


def _texture(rng: np.random.Generator, height: int, width: int, cell: int) -> np.ndarray:
    from PIL import Image

    small = rng.integers(0, 128, (height // cell, width // cell, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), 3), np.int16)


def measure(paths: list[Path], repetitions: int) -> tuple[dict, dict]:
    """Seconds of each repetition: {job: wall time of all files}, {(job, path): processor time}."""
    walls, cpu = {decode: [], prepare: []}, {}
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(prepare, paths))  # imports, and the files into the page cache
        for repetition in range(repetitions):
            for job in (decode, prepare) if repetition % 2 else (prepare, decode):
                begin = time.perf_counter()
                for path, seconds in zip(paths, pool.map(job, paths), strict=True):
                    cpu.setdefault((job, path), []).append(seconds)
                walls[job].append(time.perf_counter() - begin)
    return walls, cpu


def report(paths: list[Path], walls: dict, cpu: dict) -> None:
    """Prints the table; a ratio is the median over the repetitions, each with its own pair."""
    print(f"{'seconds':<40}{'decode':>10}{'prepare':>10}{'ratio':>8}")
    for path in paths:
        _row(path.name[:39], cpu[decode, path], cpu[prepare, path])
    _row("all, processor", *(_sums([cpu[job, path] for path in paths]) for job in walls))
    ratio = _row("all, wall", *walls.values())
    verdict = "met" if ratio <= TARGET else "MISSED"
    print(
        f"{os.cpu_count()} processes, {len(walls[decode])} repetitions, target {TARGET}: {verdict}"
    )


def _sums(rows: list[list[float]]) -> list[float]:
    return [sum(column) for column in zip(*rows, strict=True)]


def _row(name: str, decodes: list[float], prepares: list[float]) -> float:
    ratio = statistics.median(p / d for d, p in zip(decodes, prepares, strict=True))
    bare, full = statistics.median(decodes), statistics.median(prepares)
    print(f"{name:<40}{bare:>10.3f}{full:>10.3f}{ratio:>8.2f}")
    return ratio


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--videos", type=Path, help="a folder of videos; made here if not given")
    parser.add_argument("--repetitions", type=int, default=7)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.videos:
            paths = [p for p in args.videos.iterdir() if p.suffix.lower() in video.VIDEO_SUFFIXES]
        else:
            paths = make_videos(Path(folder), count=4)
        # The longest jobs first, or one process idles at the end.
        paths.sort(key=lambda path: -path.stat().st_size)
        report(paths, *measure(paths, args.repetitions))


if __name__ == "__main__":
    main()
