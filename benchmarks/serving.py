"""Measures the search server under load, in one process and with its index in parts.

    python benchmarks/serving.py --folder=DIR
    unshare --map-root-user --net python benchmarks/serving.py --folder=DIR --shards 0 2 4
    python benchmarks/serving.py --folder=DIR --opening --segments=1000000

DIR holds an index of synthetic segments, written first if there is none (see search.py). The model
is B/32 with random weights. Clients ask one sentence after the other, all of them different. Ray
listens on all addresses of a machine, so the second line runs in a network namespace.

The third line opens the index, adds 1,000 segments to a copy of it, and loads the new version.
"""

import argparse
import concurrent.futures
import http.client
import itertools
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import jax
import lancedb
import numpy as np
import pyarrow as pa
import results
import search

from xclip_jax.checkpoint import init_params, save_model
from xclip_jax.data.text import learn_tokenizer
from xclip_jax.retriever import load
from xclip_jax.search.calibration import sample_sentences
from xclip_jax.search.digests import PARTS, add_digests
from xclip_jax.search.indexing import fingerprint
from xclip_jax.search.store import Store

SECONDS, WARM_UP_SECONDS, NEW = 20.0, 5.0, 1000


def prepare(folder: Path, segments: int, work: Path) -> Path:
    """Returns an index with the rows of another one, and a model that can search it."""
    source = search.open_index(str(folder), segments, "float16")
    model = search.build_b32()
    tokenizer = learn_tokenizer(sample_sentences(1000), max_words=model.config.max_words)
    params = jax.jit(lambda: init_params(model, 0))()
    save_model(work / "model", model.config, params, tokenizer=tokenizer, extra={"step": 0})
    about = search.describe_index(model, fingerprint(load(work / "model")), "float16")
    Store.create(work / "index", about | {"model": str(work / "model")})
    table = lancedb.connect(str(work / "index")).open_table("segments")
    rows = lancedb.connect(source.location).open_table("segments").search().to_batches(4096)
    batches = (pa.RecordBatch.from_arrays(b.columns, schema=table.schema) for b in rows)
    table.add(pa.RecordBatchReader.from_batches(table.schema, batches))
    return work / "index"


@contextmanager
def serving(index: Path, shards: int) -> Iterator[str]:
    """Runs the server, yields its host and port."""
    command = [sys.executable, "-m", "xclip_jax.search", "serve", f"--index={index}", "--port=0"]
    command += [f"--shards={shards}"] if shards else []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            output: Any = process.stdout
            line = next(line for line in output if line.startswith("search page: "))
            yield urlsplit(line.split()[2]).netloc
        finally:
            process.terminate()


def run_clients(address: str, clients: int, seconds: float) -> results.Row:
    """Returns queries a second, quantiles of their milliseconds, and the number of errors."""
    sentences, stop = sample_sentences(4000), time.monotonic() + seconds
    numbers = itertools.count()

    def run(_: int) -> tuple[list[float], int]:
        connection, times, failed = http.client.HTTPConnection(address, timeout=60), [], 0
        while (start := time.monotonic()) < stop:
            text = sentences[next(numbers) % len(sentences)]
            body, headers = json.dumps({"text": text}), {"Content-Type": "application/json"}
            connection.request("POST", "/api/search", body, headers)
            response = connection.getresponse()
            answer = json.loads(response.read())
            failed += response.status != 200 or not answer["hits"] or bool(answer["missing"])
            times.append(time.monotonic() - start)
        return times, failed

    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
        parts = list(pool.map(run, range(clients)))
    times = np.concatenate([times for times, _ in parts])
    p50, p95 = 1000 * np.percentile(times, (50, 95))
    failed = sum(failed for _, failed in parts)
    counts = {"queries": len(times), "failed": failed, "queries_per_second": len(times) / seconds}
    return {"clients": clients, **counts, "p50": float(p50), "p95": float(p95)}


def measure_serving(args: argparse.Namespace, work: Path) -> None:
    """Prints and writes the measurements of servers."""
    index, rows = prepare(args.folder, args.segments, work), []
    for shards in args.shards:
        with serving(index, shards) as address:
            run_clients(address, 4, WARM_UP_SECONDS)
            for clients in args.clients:
                rows.append({"parts": shards, **run_clients(address, clients, args.seconds)})
    print(results.format_table(rows))
    arguments = {name: getattr(args, name) for name in ("segments", "clients", "shards", "seconds")}
    print(results.write("serving", arguments, rows))


def measure_opening(args: argparse.Namespace, work: Path) -> None:
    """Prints and writes the seconds and the memory of opening an index and a new version."""
    search.open_index(str(args.folder), args.segments, "float16")
    shutil.copytree(args.folder, work / "index")
    store, rows, start = Store(work / "index"), [], _memory("VmRSS")
    former = None
    for name in ("opened", f"{NEW:,} new segments"):
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        begin = time.monotonic()
        snapshot = store.snapshot(former=former)
        assert snapshot.durations
        seconds = time.monotonic() - begin
        memory = {"mib": _memory("VmRSS") - start, "peak_mib": _memory("VmHWM") - start}
        rows.append({"version": name, "segments": len(snapshot), "seconds": seconds, **memory})
        if former is None:
            _add_segments(store)
        former = snapshot
    print(results.format_table(rows))
    print(results.write("opening", {"segments": args.segments}, rows))


def _add_segments(store: Store) -> None:
    """Adds copies of the first segments, with other ids."""
    table = lancedb.connect(store.location).open_table("segments")
    rows = table.search().limit(NEW).to_arrow().drop_columns(list(PARTS))
    ids = pa.array([f"{2**60 + number:016x}" for number in range(NEW)])
    rows = add_digests(rows.set_column(rows.column_names.index("id"), "id", ids))
    table.add(rows.select(table.schema.names).cast(table.schema))


def _memory(name: str) -> float:
    """Returns a size of this process's memory in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) / 1024


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="index of synthetic segments")
    parser.add_argument("--segments", type=int, default=100_000)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--shards", type=int, nargs="+", default=[0], help="0: one process")
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--opening", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        (measure_opening if args.opening else measure_serving)(args, Path(work))


if __name__ == "__main__":
    main()
