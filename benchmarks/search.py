"""Measures search in an index: time, memory, agreement with exhaustive scoring, cost of indexing.

    python benchmarks/search.py --segments=100000 --folder=DIR
    python benchmarks/search.py --indexing VIDEOS

The first line writes an index of synthetic segments to DIR if there is none, and queries it in a
separate process. Targets on two cores: with 100,000 segments a median of 40 ms and a 95th
percentile of 80 ms; with 1,000,000 segments a median of 120 ms and at most 4 GiB of memory above
the process's start; at least 0.99 of the full model's ten best among the ten results; no
compilation while queries run. The text tower's time is measured separately.

The second line indexes videos with random weights of B/32. Target: at most 1.2 times the sum of
reading the videos and running the towers. benchmarks/search_vectors.py describes the synthetic
vectors. After a few queries the index's files are in the page cache if memory suffices.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import multiprocessing
import statistics
import tempfile
from pathlib import Path
from typing import Any

import jax
import lancedb
import numpy as np
import pyarrow as pa
import results
import search_vectors

from xclip_jax.checkpoint import init_params
from xclip_jax.cli import progress
from xclip_jax.config import get_config
from xclip_jax.data.preprocess import frame_format
from xclip_jax.inference import copy_to_local_devices
from xclip_jax.models import XClip, read_model_config
from xclip_jax.retriever import Retriever
from xclip_jax.search.answers import Request, make_answer
from xclip_jax.search.funnel import STAGES, Funnel
from xclip_jax.search.index import SEGMENT_SECONDS, Index
from xclip_jax.search.indexing import find_videos
from xclip_jax.search.results import Answer
from xclip_jax.search.segments import SegmentJob, load_frames, read_segments
from xclip_jax.search.selection import EVERYTHING
from xclip_jax.search.shard import Scorer, Shard
from xclip_jax.search.shards import LocalParts, Shards
from xclip_jax.search.store import Store, exists
from xclip_jax.similarity import TextFeatures
from xclip_jax.workers import run_jobs

K, WARM_UP, COMPARED = 10, 20, 100
FUNNELS = {  # name: (candidates, rerank)
    "5000, 200": (5000, 200),
    "sentence-video, 200": (200, 200),
    "sentence-video, 2000": (2000, 2000),
}
COMPILATION_EVENT = "/jax/core/compile/backend_compile_duration"


def open_index(folder: str, segments: int, precision: str) -> Store:
    """Returns the index of synthetic segments in a folder, written first if there is none.

    The rows are written from Arrow batches in one commit, so that the index is complete or empty.
    """
    about = describe_index(build_b32(), f"{segments} synthetic segments", precision)
    store = Store(folder) if exists(folder) else Store.create(folder, about)
    if any(store.about.get(name) != value for name, value in about.items()):
        raise SystemExit(f"{folder} holds another index: {store.about}")
    table = lancedb.connect(folder).open_table("segments")
    if not table.count_rows():
        with progress(segments, "writing", "segments") as bar:
            rows = search_vectors.make_batches(table.schema, segments, bar)
            table.add(pa.RecordBatchReader.from_batches(table.schema, rows))
    return store


def describe_index(model: XClip, fingerprint: str, precision: str) -> dict[str, Any]:
    """Returns the index's metadata."""
    return {
        "model": "",
        "fingerprint": fingerprint,
        "max_frames": model.config.max_frames,
        "embed_dim": model.config.embed_dim,
        "segment_seconds": SEGMENT_SECONDS,
        "shots": False,
        "precision": precision,
    }


def build_b32() -> XClip:
    """Returns B/32 with the `paper` preset."""
    return XClip(read_model_config(get_config().model))


def measure(
    folder: str, text: TextFeatures, targets: np.ndarray, count: int
) -> tuple[results.Row, list[results.Row]]:
    """Returns (measurements of the index, one row per funnel).

    Args:
        folder: of the index.
        text: queries. The last `count` are measured, the ones before are for warming up.
        targets: row of the segment that each query describes.
        count: number of measured queries.
    """
    model = build_b32()  # only its similarity is used
    params = copy_to_local_devices({"clip": {"logit_scale": np.float32(np.log(100))}})
    compilations, memory_before, rows, answers = [], results.peak_mib(), [], []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compilations.append(name) if name == COMPILATION_EVENT else None
    )
    open_seconds, snapshot = results.measure_seconds(lambda: Store(folder).snapshot())
    scorer = Scorer(model, params)
    shards = Shards(LocalParts(Shard(snapshot, scorer)))
    warm_up, measured = np.split(np.arange(len(targets)), [len(targets) - count])
    for name, widths in FUNNELS.items():
        funnel = Funnel(scorer, *widths)
        run_queries(funnel, shards, text, warm_up)
        compilations.clear()
        hit_ids, milliseconds = run_queries(funnel, shards, text, measured)
        peak_mib = results.peak_mib() - memory_before
        counts = {"compiled": len(compilations), "peak_mib": peak_mib}
        rows.append({"funnel": name, **counts, **milliseconds})
        answers.append(hit_ids)
    compared = measured[:COMPARED]
    target_ids = np.array(shards.segments(snapshot.row_ids[targets[compared]]).ids)
    best = score_exhaustively(funnel, shards, jax.tree.map(lambda x: x[compared], text))
    for row, hit_ids in zip(rows, answers, strict=True):
        overlap = [np.isin(b, f) for b, f in zip(best, hit_ids, strict=False)]
        row["top_1"], row["top_10"] = float(np.mean(overlap, 0)[0]), float(np.mean(overlap))
    summary = {
        "segments": len(snapshot),
        "noise": search_vectors.noise_for(len(snapshot)),
        "exhaustive_R@1": float(np.mean(best[:, 0] == target_ids)),
        "open_seconds": open_seconds,
    }
    return summary, rows


def score_exhaustively(funnel: Funnel, shards: Shards, text: TextFeatures) -> np.ndarray:
    """Returns T x K, the ids of the full model's best scores of T queries."""
    rankings = funnel.rank_exhaustively(shards, EVERYTHING, text, K)
    return np.array([shards.segments(ranking.rows[:K]).ids for ranking in rankings])


def run_queries(
    funnel: Funnel, shards: Shards, text: TextFeatures, numbers: np.ndarray
) -> tuple[list[list[str]], dict[str, float]]:
    """Runs some of the queries one by one.

    Returns:
        The ids of the results of each query, and {stage_quantile: milliseconds}.
    """
    hit_ids, times = [], []
    for n in numbers:
        query = jax.tree.map(lambda x, n=n: x[n : n + 1], text)
        seconds, answer = results.measure_seconds(lambda q=query: run_one(funnel, shards, q))
        hit_ids.append([hit.id for hit in answer])
        times.append({"query": seconds, **answer.seconds})
    milliseconds = {name: [1000 * row[name] for row in times] for name in times[0]}
    return hit_ids, {
        f"{name}_p{quantile}": float(np.percentile(values, quantile))
        for name, values in milliseconds.items()
        for quantile in (50, 95)
    }


def run_one(funnel: Funnel, shards: Shards, query: TextFeatures) -> Answer:
    """Returns the answer to a query, one hit per segment."""
    ranking = funnel.rank(shards, EVERYTHING, query, K)
    return make_answer(ranking.segments, ranking, [], Request(K, merge=False))


def text_tower_milliseconds(repeats: int = 50) -> float:
    """Returns the median time in which B/32's text tower encodes one query."""
    model = build_b32()
    words = search_vectors.WORDS
    ids, mask = np.ones((1, words), np.int32), np.arange(words)[None] < 12
    params = jax.jit(lambda: init_params(model, 0))()
    inputs = "encode_text", (ids, mask), 64
    retriever = Retriever({}, model, copy_to_local_devices(params))
    run = functools.partial(retriever.encode, *inputs)
    run()
    return 1000 * statistics.median(results.measure_seconds(run)[0] for _ in range(repeats))


def measure_search(args: argparse.Namespace, folder: str) -> None:
    """Prints and writes the measurements of searching."""
    store = open_index(folder, args.segments, args.precision)
    text, targets = search_vectors.make_queries(store, args.segments, WARM_UP + args.queries)
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, spawn) as pool:
        summary, rows = pool.submit(measure, folder, text, targets, args.queries).result()
    summary["text_tower_ms"] = text_tower_milliseconds()
    print(results.format_table([summary]))
    columns = ("funnel", "compiled", "peak_mib", "top_1", "top_10", "query_p50", "query_p95")
    print(results.format_table([{name: row[name] for name in columns} for row in rows]))
    for quantile in ("p50", "p95"):
        stages = [{s.replace(" ", "_"): row[f"{s}_{quantile}"] for s in STAGES} for row in rows]
        print(f"{quantile} of the stages:\n{results.format_table(stages)}")
    print("milliseconds; top_1, top_10: share of the full model's best among the ten results")
    arguments = {name: getattr(args, name) for name in ("segments", "queries", "precision")}
    print(results.write(f"search_{args.segments}", arguments, [summary, *rows]))


def measure_indexing(args: argparse.Namespace) -> None:
    """Alternately indexes videos and runs only reading and encoding."""
    model = build_b32()
    params = copy_to_local_devices(jax.jit(lambda: init_params(model, 0))())
    retriever = Retriever(dataclasses.asdict(model.config), model, params)
    (files, _), rows = find_videos(args.indexing), []
    about = describe_index(model, "", "float32")
    for _ in range(args.repeats + 1):
        row = measure_unavoidable(model, params, files)
        with tempfile.TemporaryDirectory() as folder:
            index = Index(Store.create(folder, about))
            index.retriever = retriever
            row["adding"], added = results.measure_seconds(lambda index=index: index.add(files))
        rows.append(row)
    del rows[0]  # it includes compilation
    rows.append({name: statistics.median(row[name] for row in rows) for name in rows[0]})
    rows = [row | {"ratio": row["adding"] / (row["decoding"] + row["towers"])} for row in rows]
    print(results.format_table(rows))
    print(f"{added.files} files, seconds, the medians last; the ratio should be at most 1.2")
    megabytes = sum(Path(file).stat().st_size for file in files) / 1e6
    arguments = {"files": added.files, "megabytes": megabytes, "repeats": args.repeats}
    print(results.write("search_indexing", arguments, rows))


def measure_unavoidable(model: XClip, params: dict, files: list[str]) -> results.Row:
    """Returns the seconds to read the segments of all files on all cores, and of the towers."""
    c, readings = model.config, []
    side, max_frames = c.vision.image_size, c.max_frames
    with tempfile.TemporaryDirectory() as folder:
        jobs = [
            SegmentJob(
                file, Path(folder, str(number)), frame_format(c), max_frames, SEGMENT_SECONDS
            )
            for number, file in enumerate(files)
        ]
        decoding, _ = results.measure_seconds(
            lambda: run_jobs(read_segments, jobs, lambda *reading: readings.append(reading))
        )
        segments = [x for n, reading in readings for x in load_frames(jobs[n], reading[0])]
    # The batch size of Index.add.
    batch = (4 if jax.default_backend() == "cpu" else 64) * jax.local_device_count()
    padded = -(-len(segments) // batch) * batch
    frames = np.zeros((padded, max_frames, side, side, 3), np.uint8)
    mask = np.zeros((padded, max_frames), bool)
    for number, images in enumerate(segments):
        frames[number, : len(images)], mask[number, : len(images)] = images, True
    inputs = "encode_video", (frames, mask), batch
    towers, _ = results.measure_seconds(lambda: Retriever({}, model, params).encode(*inputs))
    return {"segments": len(segments), "decoding": decoding, "towers": towers}


def main(arguments: list[str] | None = None) -> None:
    """Measures searching, or indexing with --indexing."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--segments", type=int, default=100_000, help="size of the index")
    parser.add_argument("--queries", type=int, default=200, help="number of measured queries")
    parser.add_argument("--folder", help="of the index, which is kept (default: temporary)")
    parser.add_argument("--precision", choices=("float32", "float16"), default="float16")
    parser.add_argument("--indexing", nargs="+", metavar="VIDEOS", help="files and folders")
    parser.add_argument("--repeats", type=int, default=3, help="of --indexing")
    args = parser.parse_args(arguments)
    if args.indexing:
        measure_indexing(args)
    elif args.folder:
        measure_search(args, args.folder)
    else:
        with tempfile.TemporaryDirectory() as folder:
            measure_search(args, folder)


if __name__ == "__main__":
    main()
