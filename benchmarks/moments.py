"""Measures moments: how well they overlap the event that a sentence describes.

    python benchmarks/moments.py --model=runs/demo
    python benchmarks/moments.py --model=runs/captions --clips=DIR --captions=DIR/captions.json

The first line renders films of two events of different lengths, and asks for each event within its
film. The model is that of configs/demo.py. Target: IoU of at least 0.5 for 70 % of the sentences.

The second line joins real clips into two films, and asks for each caption in both. Target: the best
second in the right clip for 80 % of the captions. The model is trained on these clips, see README.

The whole segment is the baseline. Further rows say how many first results are marked weak, of these
sentences and of others that describe nothing in the films.
"""

import argparse
import json
import random
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
import results
from jaxtyping import UInt8
from PIL import ImageOps

from xclip_jax.cli import progress
from xclip_jax.data import rendered
from xclip_jax.data.scenes import Scene
from xclip_jax.search import Index
from xclip_jax.search.calibration import SENTENCES, sample_sentences

SIDE, RATE = 288, 12  # of joined clips: pixels, pictures a second
RENDERED: dict[str, dict[str, Any]] = {
    "30 s": {"segment_seconds": 30},
    "10 s": {},
    "6 s": {"segment_seconds": 6},
}
JOINED: dict[str, dict[str, Any]] = {
    "30 s": {"segment_seconds": 30},
    "10 s": {},
    "6 s, overlap 3 s": {"segment_seconds": 6, "overlap_seconds": 3},
    "30 s, shots": {"segment_seconds": 30, "shots": True},
}


class Event(NamedTuple):
    """A sentence, and the part of a film that it describes, in seconds."""

    text: str
    film: str
    start: float
    end: float


def write_film(
    path: Path, frames: Iterable[UInt8[np.ndarray, "S S 3"]], side: int, rate: int
) -> None:
    """Writes square frames of `side` pixels as a film of `rate` frames a second."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=rate, options={"preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = side, side, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def render_two_events(scene: Scene, seconds: int, change: float) -> Iterator[np.ndarray]:
    """Yields the frames of a film whose second event begins at `change` seconds."""
    for number in range(seconds * rendered.FPS):
        time = number / rendered.FPS
        before = (rendered.LAST / 2 - 0.1) * time / change
        after = rendered.LAST / 2 * (1 + (time - change) / (seconds - change))
        yield rendered.render_frame(scene, before if time < change else after)


def render_films(folder: Path, count: int) -> list[Event]:
    """Writes films of 8 to 24 seconds with two events, and returns the events."""
    rng, events = random.Random(0), []
    scenes = [scene for scene in rendered.draw_scenes("test", 220) if scene.kind == "order"]
    for number, scene in enumerate(rng.sample(scenes, count)):
        seconds, name = rng.randint(8, 24), f"film{number:02}.mp4"
        change = seconds * rng.uniform(0.25, 0.75)
        frames = render_two_events(scene, seconds, change)
        write_film(folder / name, frames, rendered.SIDE, rendered.FPS)
        spans = ((0.0, change), (change, float(seconds)))
        for event, span in zip(scene.events, spans, strict=True):
            events.append(Event(f"a {event.size} {event.colour} {event.shape}", name, *span))
    return events


def join_clips(clips: Path, captions: Path, folder: Path) -> list[Event]:
    """Writes the clips as two films, and returns their captions."""
    known = json.loads(captions.read_text())
    order, events = random.Random(0).sample(known, len(known)), []
    for name, part in (("a.mp4", order[::2]), ("b.mp4", order[1::2])):
        frames: list[np.ndarray] = []
        for clip in part:
            first = len(frames)
            with av.open(str(clips / clip["video"])) as container:
                zero: Any = None
                for frame in container.decode(video=0):
                    zero = frame.time if zero is None else zero
                    while len(frames) - first <= (frame.time - zero) * RATE:
                        frames.append(np.asarray(ImageOps.fit(frame.to_image(), (SIDE, SIDE))))
            span = first / RATE, len(frames) / RATE
            events += [Event(caption, name, *span) for caption in clip["captions"]]
        write_film(folder / name, frames, SIDE, RATE)
    return events


def overlap(one: tuple[float, float], other: tuple[float, float]) -> float:
    """Returns the intersection over union of two intervals."""
    common = max(0.0, min(one[1], other[1]) - max(one[0], other[0]))
    return common / (max(one[1], other[1]) - min(one[0], other[0]))


def measure(index: Index, events: list[Event], *, in_film: bool) -> dict[str, float]:
    """Returns shares and means over the first results of the events' sentences.

    `in_film`: True to search each sentence in its film only.
    """
    seconds, moments, segments, weak = [], [], [], []
    for event in events:
        hit = index.query(event.text, k=1, path=event.film if in_film else None)[0]
        span, is_right = (event.start, event.end), Path(hit.path).name == event.film
        seconds.append(is_right and event.start <= hit.second <= event.end)
        moments.append(is_right * overlap((hit.start, hit.end), span))
        segments.append(is_right * overlap((hit.segment_start, hit.segment_end), span))
        weak.append(index.query(event.text, k=1)[0].weak)
    others = sample_sentences(4 * SENTENCES)[SENTENCES:]  # not those of the calibration
    unrelated = [index.query(text, k=1)[0].weak for text in others]
    return {
        "sentences": len(events),
        "second": np.mean(seconds).item(),
        "moment": np.mean(np.array(moments) >= 0.5).item(),
        "moment_IoU": np.mean(moments).item(),
        "segment": np.mean(np.array(segments) >= 0.5).item(),
        "segment_IoU": np.mean(segments).item(),
        "weak": np.mean(weak).item(),
        "weak_unrelated": np.mean(unrelated).item(),
    }


def main(argv: list[str] | None = None) -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", required=True, help="model or work directory")
    parser.add_argument("--clips", type=Path, help="folder of real clips")
    parser.add_argument("--captions", type=Path, help='[{"video": ..., "captions": [...]}]')
    parser.add_argument("--films", type=int, default=60, help="number of rendered films")
    args = parser.parse_args(argv)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        films = Path(temporary, "films")
        films.mkdir()
        if args.clips:
            events, settings = join_clips(args.clips, args.captions, films), JOINED
        else:
            events, settings = render_films(films, args.films), RENDERED
        with progress(len(settings), "measuring", "setting") as bar:
            for name, options in settings.items():
                index = Index.create(Path(temporary, name), args.model, **options)
                index.add(films)
                facts = measure(index, events, in_film=not args.clips)
                rows.append({"segments": name, **facts})
                bar.update(1)
    print(results.format_table(rows))
    name = "moments_joined" if args.clips else "moments_rendered"
    print(results.write(name, {"films": args.films}, rows))


if __name__ == "__main__":
    main()
