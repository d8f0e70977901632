"""Search in an index: seconds, memory and agreement with scoring everything; cost of indexing.

    python benchmarks/search.py --segments=100000 --folder=DIR
    python benchmarks/search.py --indexing VIDEOS

The first line makes an index of synthetic segments in DIR, unless it is there, and asks it in a
process of its own. Targets on two cores: at 100,000 segments half of the queries within 40 ms and
95 % within 80; at 1,000,000 half within 120 ms, with at most 4 GiB of memory above what the process
had before; at least 0.99 of the ten best of the whole model in the funnel's ten; nothing compiled
while queries are answered. The second line takes videos in with random weights of B/32; the target
is 1.2 times the bare sum of reading them and of the towers.

The synthetic vectors: benchmarks/search_vectors.py. The index's files are in the page cache after a
few queries where memory suffices for them. The text tower's time comes on top of a query's.
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
import search_vectors

from xclip_jax.checkpoint import init_params
from xclip_jax.cli import progress
from xclip_jax.config import get_config
from xclip_jax.inference import encode_texts, encode_videos, on_local_devices
from xclip_jax.models import build_model, resolve
from xclip_jax.retriever import Retriever
from xclip_jax.search.funnel import STAGES, Funnel
from xclip_jax.search.index import SEGMENT_SECONDS, Index
from xclip_jax.search.indexing import find_videos
from xclip_jax.search.segments import Job, frames_of, read_segments
from xclip_jax.search.store import Store, exists
from xclip_jax.workers import run_jobs

K, WARM_UP, COMPARED = 10, 20, 100
FUNNELS = {  # name -> candidates, rerank
    "5000, 200": (5000, 200),
    "sentence-video, 200": (200, 200),
    "sentence-video, 2000": (2000, 2000),
}
COMPILED = "/jax/core/compile/backend_compile_duration"


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
            rows = search_vectors.batches(table.schema, segments, bar)
            table.add(pa.RecordBatchReader.from_batches(table.schema, rows))
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
    whole = {
        "segments": len(snapshot),
        "noise": search_vectors.noise(len(snapshot)),
        "exhaustive_R@1": recall,
    }
    return whole | {"open_seconds": opening}, rows


def _exhaustive(funnel, snapshot, text):
    """T x K, the best rows of T queries."""
    with progress(len(snapshot), "scoring everything", "segments") as bar:
        return np.stack([found.rows for found in funnel.exhaustive(snapshot, text, K, bar=bar)])


def _answer(funnel, snapshot, text, numbers):
    """([rows found], {stage: milliseconds}) of some of the queries, one after another."""
    answers, took = [], []
    for n in numbers:
        one = jax.tree.map(lambda x, n=n: x[n : n + 1], text)
        whole, found = seconds(lambda one=one: funnel.search(snapshot, one, K))
        answers.append(found.rows)
        took.append({"query": whole, **found.seconds})
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
    ids, mask = (
        np.ones((1, search_vectors.WORDS), np.int32),
        np.arange(search_vectors.WORDS)[None] < 12,
    )
    params = jax.jit(lambda: init_params(model, architecture, 0))()
    encode = functools.partial(encode_texts, model, on_local_devices(params), ids, mask)
    encode()
    return 1000 * statistics.median(seconds(encode)[0] for _ in range(repeats))


def searching(args, folder):
    store = make(folder, args.segments, args.precision)
    text, own = search_vectors.make_queries(store, args.segments, WARM_UP + args.queries)
    fresh = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, fresh) as pool:
        whole, rows = pool.submit(measure, folder, text, own, args.queries).result()
    whole["text_tower_ms"] = text_tower()
    print(results.table([whole]))
    columns = ("compiled", "peak_mib", "top_1", "top_10", "query_p50", "query_p95")
    print(results.table([{name: row[name] for name in ("funnel", *columns)} for row in rows]))
    for quantile in ("p50", "p95"):
        stages = {stage: f"{stage}_{quantile}" for stage in STAGES}
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
