"""Search in an index: seconds, memory and agreement with scoring everything; cost of indexing.

    python benchmarks/search.py --segments=100000 --folder=DIR
    python benchmarks/search.py --indexing VIDEOS

The first line makes an index of synthetic segments in DIR, unless it is there, and asks it in a
process of its own. Targets on two cores: at 100,000 segments half of the queries within 40 ms and
95 % within 80; at 1,000,000 half within 120 ms, with at most 4 GiB of memory above what the process
had before; at least 0.99 of the ten best of the whole model in the funnel's ten; nothing compiled
while queries are answered. The second line takes videos in with random weights of B/32; the target
is 1.2 times the bare sum of reading them and of the towers.

Files of 20 synthetic segments have a sub-topic of a topic, which others share. A frame is the sum
of equal parts of topic, sub-topic, file, segment and its own; one in ten is of something else. All
have a direction in common, as CLIP's have: unrelated videos have a cosine of 0.6, a sentence has
0.2 with those of others and 0.4 with its own. It is about three frames of its segment, half of its
words each about one of them, while the other half say nothing; noise is added to all. Its amount
(see `noise`) was chosen, by trying several with 20,000 and 100,000 segments, so that the whole
model ranks the own segment first about every other time: the larger the gallery, the less noise.

The index's files are in the page cache after a few queries where memory suffices for them.
"""

import argparse
import concurrent.futures
import functools
import json
import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path

import jax
import lancedb
import numpy as np
import pyarrow as pa
import results

from xclip_jax.config import get_config
from xclip_jax.inference import encode_texts, encode_videos, on_local_devices
from xclip_jax.model_directory import init_params
from xclip_jax.models import build_model, resolve
from xclip_jax.progress import progress
from xclip_jax.retriever import Retriever
from xclip_jax.search.funnel import STAGES, Funnel
from xclip_jax.search.index import SEGMENT_SECONDS, Index
from xclip_jax.search.indexing import find_videos
from xclip_jax.search.segments import Job, frames_of, read_segments
from xclip_jax.search.store import Store, exists
from xclip_jax.similarity import TextFeatures
from xclip_jax.workers import run_jobs

DIM, FRAMES, WORDS = 512, 12, 32
FILE, CHUNK = 20, 4000  # segments of a file; of what is in memory at once
TOPICS = 200
SPECTRUM = np.arange(1, DIM + 1, dtype=np.float32) ** -0.375
K, WARM_UP, COMPARED = 10, 20, 100
FUNNELS = {  # name -> candidates, rerank
    "5000, 200": (5000, 200),
    "sentence-video, 200": (200, 200),
    "sentence-video, 2000": (2000, 2000),
}
COMPILED = "/jax/core/compile/backend_compile_duration"


class World:
    """What videos and sentences are about, the same in every run."""

    def __init__(self, segments):
        rng = np.random.default_rng(0)
        self.pictures, other = directions(rng, 2)  # what all pictures have in common
        self.texts = 0.4 * self.pictures + (1 - 0.4**2) ** 0.5 * other
        self.topics = directions(rng, TOPICS)
        subtopics = max(10, segments // 100)
        self.subtopics = directions(rng, subtopics)
        self.topic_of = rng.integers(0, TOPICS, subtopics)

    def subjects(self, rng, count):
        """count x D: topic and sub-topic, some more frequent than others."""
        sub = (len(self.subtopics) * rng.random(count) ** 1.5).astype(int)
        return self.topics[self.topic_of[sub]] + self.subtopics[sub]

    def frames(self, rng, count):
        """Frames of CHUNK segments."""
        files = self.subjects(rng, count // FILE) + directions(rng, count // FILE)
        segments = np.repeat(files, FILE, axis=0) + directions(rng, count)
        frames = directions(rng, count, FRAMES)
        elsewhere = rng.random(frames.shape[:2]) < 0.1
        other = self.subjects(rng, elsewhere.sum()) + 2**0.5 * directions(rng, elsewhere.sum())
        segments = np.repeat(segments[:, None], FRAMES, axis=1)
        segments[elsewhere] = other
        return unit((frames + segments) * 5**-0.5 + self.pictures)

    def queries(self, rng, video, noise):
        """TextFeatures of a sentence for each of some VideoFeatures."""
        count = len(video.mask)
        described = (rng.random((count, 3)) * video.mask.sum(1)[:, None]).astype(int)
        frames = np.take_along_axis(video.frames, described[..., None], 1)
        content = unit(frames - (frames @ self.pictures)[..., None] * self.pictures)
        lengths = rng.integers(6, 18, count)
        mask = np.arange(WORDS) < lengths[:, None]
        told = np.take_along_axis(content, rng.integers(0, 3, (count, WORDS))[..., None], 1)
        told *= rng.random((count, WORDS, 1)) < 0.5
        shared = directions(rng, count)
        own = directions(rng, count, WORDS)
        words = self.texts + told + noise * (shared[:, None] + own) * 0.5**0.5
        sentence = self.texts + unit(content.mean(1)) + noise * shared
        return TextFeatures(unit(sentence), unit(words), mask)


def directions(rng, *shape):
    """Unit vectors; few of their dimensions hold most of them, so that more are alike."""
    return unit(rng.standard_normal((*shape, DIM), np.float32) * SPECTRUM)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def make(folder, segments, precision):
    """A Store of so many synthetic segments; the one in the folder if it is that.

    Written from Arrow tables in one commit, so that it is there whole or empty; Store.add takes
    dicts, and each call commits.
    """
    wanted = about(tower_config()[1], f"{segments} synthetic segments", precision)
    store = Store(folder) if exists(folder) else Store.create(folder, wanted)
    if any(store.about.get(name) != value for name, value in wanted.items()):
        raise SystemExit(f"{folder} holds another index: {store.about}")
    table = lancedb.connect(folder).open_table("segments")
    if not table.count_rows():
        with progress(segments, "writing", "segments") as bar:
            batches = _batches(table.schema, segments, bar)
            table.add(pa.RecordBatchReader.from_batches(table.schema, batches))
    return store


def about(model, fingerprint, precision):
    return {
        "model": "",
        "fingerprint": fingerprint,
        "max_frames": model.max_frames,
        "embed_dim": model.embed_dim,
        "segment_seconds": SEGMENT_SECONDS,
        "shots": False,
        "precision": precision,
    }


def _batches(schema, segments, bar):
    """Yields Arrow batches of CHUNK rows; their numbers do not depend on the batches before."""
    world = World(segments)
    for first in range(0, segments, CHUNK):
        rng = np.random.default_rng([1, first])
        number = np.arange(first, min(first + CHUNK, segments))
        count = np.where(rng.random(CHUNK) < 0.05, rng.integers(1, FRAMES + 1, CHUNK), FRAMES)
        mask = (np.arange(FRAMES) < count[:, None])[: len(number), :, None]
        frames = world.frames(rng, CHUNK)[: len(number)] * mask
        start = number % FILE * float(SEGMENT_SECONDS)
        columns = {
            "id": [f"{n:016x}" for n in number],
            "path": [f"/videos/{n // FILE % 1000:03}/{n // FILE:08}.mp4" for n in number],
            "size": number * 0,
            "mtime": number * 0,
            "start": start,
            "end": start + SEGMENT_SECONDS,
            "count": count[: len(number)],
            "times": (start[:, None] + np.linspace(1, 28, FRAMES)) * mask[..., 0],
            "video": unit(frames.sum(1)),  # Eq. 2
            "frames": frames.reshape(len(number), -1),
            "thumbnail": [b""] * len(number),
        }
        arrays = [_column(columns[field.name], field.type) for field in schema]
        yield pa.RecordBatch.from_arrays(arrays, schema=schema)
        bar.update(len(number))


def _column(values, kind):
    if not pa.types.is_fixed_size_list(kind):
        return pa.array(values, kind)
    flat = np.asarray(values, kind.value_type.to_pandas_dtype()).reshape(-1)
    return pa.FixedSizeListArray.from_arrays(flat, type=kind)


def noise(segments):
    """See above."""
    return 2.1 - 0.2 * float(np.log10(segments / 100_000))


def make_queries(store, segments, count):
    """(TextFeatures of sentences, row of each one's own segment)."""
    snapshot, rng = store.snapshot(), np.random.default_rng(2)
    rows = rng.choice(segments, count, replace=count > segments)
    text = World(segments).queries(rng, snapshot.features(rows), noise(segments))
    return text, rows


def tower_config():
    """The architecture of B/32 in its `paper` preset, and the model."""
    architecture = resolve(json.loads(get_config().model.to_json()))
    return architecture, build_model(architecture)


def measure(folder, text, own, count):
    """(row of the snapshot, row of each funnel), in a process of its own.

    Args:
        text: TextFeatures of queries: some to warm up with, then the `count` measured.
        own: row of each one's own segment.
    """
    _, model = tower_config()  # of which only the similarity is used
    params = on_local_devices({"clip": {"logit_scale": np.float32(np.log(100))}})
    compiled, before, rows = [], results.peak_mib(), []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if name == COMPILED else None
    )
    opening, snapshot = seconds(lambda: Store(folder).snapshot())
    warm_up, measured = np.split(np.arange(len(own)), [len(own) - count])
    for name, widths in FUNNELS.items():
        funnel = Funnel(model, params, *widths)
        _answer(funnel, snapshot, text, warm_up)
        compiled.clear()
        found, took = _answer(funnel, snapshot, text, measured)
        row = {"compiled": len(compiled), "peak_mib": results.peak_mib() - before}
        rows.append({"funnel": name, "found": found, **row, **took})
    compared = measured[:COMPARED]
    best = _exhaustive(funnel, snapshot, jax.tree.map(lambda x: x[compared], text))
    for row in rows:
        there = [np.isin(b, f) for b, f in zip(best, row.pop("found"), strict=False)]
        row["top_1"], row["top_10"] = float(np.mean(there, 0)[0]), float(np.mean(there))
    recall = float(np.mean(best[:, 0] == own[compared]))
    whole = {"segments": len(snapshot), "noise": noise(len(snapshot)), "exhaustive_R@1": recall}
    return whole | {"open_seconds": opening}, rows


def _exhaustive(funnel, snapshot, text):
    """T x K, the best rows of T queries."""
    with progress(len(snapshot), "scoring everything", "segments") as bar:
        return np.stack([found.rows for found in funnel.exhaustive(snapshot, text, K, bar=bar)])


def _answer(funnel, snapshot, text, numbers):
    """([rows found], {stage: milliseconds}) of some of the queries, one after another."""
    answers, took = [], []
    shown = ["id", "path", "start", "end", "times"]  # as Index.query reads them
    for n in numbers:
        one = jax.tree.map(lambda x, n=n: x[n : n + 1], text)
        whole, found = seconds(lambda one=one: funnel.search(snapshot, one, K))
        hits, _ = seconds(lambda found=found: snapshot.read(found.rows, shown).to_pylist())
        answers.append(found.rows)
        took.append({"query": whole + hits, **found.seconds, "hits": hits})
    table = {name: [1000 * one[name] for one in took] for name in took[0]}
    both = [(name, q) for name in table for q in (50, 95)]
    return answers, {f"{name}_p{q}": float(np.percentile(table[name], q)) for name, q in both}


def seconds(function):
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def text_tower(repeats=50):
    """Milliseconds in which B/32's text tower, with random weights, encodes one query; p50."""
    architecture, model = tower_config()
    ids, mask = np.ones((1, WORDS), np.int32), np.arange(WORDS)[None] < 12
    params = jax.jit(lambda: init_params(model, architecture, 0))()
    encode = functools.partial(encode_texts, model, on_local_devices(params), ids, mask)
    encode()
    return 1000 * statistics.median(seconds(encode)[0] for _ in range(repeats))


def searching(args, folder):
    store = make(folder, args.segments, args.precision)
    text, own = make_queries(store, args.segments, WARM_UP + args.queries)
    fresh = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, fresh) as pool:
        whole, rows = pool.submit(measure, folder, text, own, args.queries).result()
    whole["text_tower_ms"] = text_tower()
    print(results.table([whole]))
    columns = ("compiled", "peak_mib", "top_1", "top_10", "query_p50", "query_p95")
    print(results.table([{name: row[name] for name in ("funnel", *columns)} for row in rows]))
    for quantile in ("p50", "p95"):
        stages = {stage: f"{stage}_{quantile}" for stage in (*STAGES, "hits")}
        named = [{k.replace(" ", "_"): row[v] for k, v in stages.items()} for row in rows]
        print(f"{quantile} of the stages:\n{results.table(named)}")
    print("milliseconds; top_1, top_10: share of the whole model's best in the funnel's ten")
    said = {name: getattr(args, name) for name in ("segments", "queries", "precision")}
    print(results.write(f"search_{args.segments}", said, [whole, *rows]))


def indexing(args):
    """Takes in files, and does the bare work, in turns."""
    architecture, model = tower_config()
    params = on_local_devices(jax.jit(lambda: init_params(model, architecture, 0))())
    retriever, files, rows = Retriever(architecture, model, params), find_videos(args.indexing), []
    for turn in range(args.repeats + 1):
        row = bare(model, params, files)
        with tempfile.TemporaryDirectory() as folder:
            index = Index(Store.create(folder, about(model, "", "float32")))
            index.retriever = retriever
            row["adding"], added = seconds(lambda index=index: index.add(files))
        row["ratio"] = row["adding"] / (row["decoding"] + row["towers"])
        rows += [row] if turn else []  # the first one compiles
    row = {name: statistics.median(row[name] for row in rows) for name in row}
    row["ratio"] = row["adding"] / (row["decoding"] + row["towers"])
    print(results.table([*rows, row]))
    print(f"{added.files} files, seconds; last the medians and their ratio, target 1.2")
    megabytes = sum(Path(file).stat().st_size for file in files) / 1e6
    said = {"files": added.files, "megabytes": megabytes, "repeats": args.repeats}
    print(results.write("search_indexing", said, [*rows, row]))


def bare(model, params, files):
    """Seconds to read the segments of all files on all cores, and of their towers."""
    side, most, read = model.vision.image_size, model.max_frames, []
    with tempfile.TemporaryDirectory() as folder:
        places = [Path(folder, str(number)) for number in range(len(files))]
        size = side, most, SEGMENT_SECONDS
        jobs = [Job(*job, *size) for job in zip(files, places, strict=True)]
        decoding, _ = seconds(lambda: run_jobs(read_segments, jobs, lambda *x: read.append(x)))
        found = [x for n, reading in read for x in frames_of(jobs[n], reading.segments)]
    batch = (4 if jax.default_backend() == "cpu" else 64) * jax.local_device_count()  # Index.add's
    whole = -(-len(found) // batch) * batch
    frames, mask = np.zeros((whole, most, side, side, 3), np.uint8), np.zeros((whole, most), bool)
    for number, pictures in enumerate(found):
        frames[number, : len(pictures)], mask[number, : len(pictures)] = pictures, True
    towers, _ = seconds(lambda: encode_videos(model, params, frames, mask, batch))
    return {"segments": len(found), "decoding": decoding, "towers": towers}


def main(arguments=None):
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("--segments", type=int, default=100_000, help="of the synthetic index")
    parser.add_argument("--queries", type=int, default=200, help="measured, after the warm-up")
    parser.add_argument("--folder", help="of the index, which is kept; else a temporary one")
    parser.add_argument("--precision", choices=("float32", "float16"), default="float16")
    parser.add_argument("--indexing", nargs="+", metavar="VIDEOS", help="files and folders")
    parser.add_argument("--repeats", type=int, default=3, help="of --indexing")
    args = parser.parse_args(arguments)
    if args.indexing:
        indexing(args)
    elif args.folder:
        searching(args, args.folder)
    else:
        with tempfile.TemporaryDirectory() as folder:
            searching(args, folder)


if __name__ == "__main__":
    main()
