"""Extrapolates the sizes, times and costs of an index from the measurements in results/.

    python benchmarks/scale.py

Prints the table of docs/scale.md. Nothing is measured here. The prices are assumptions.
"""

import json
import math
from pathlib import Path
from typing import Any

SIZES = {"1 million": 1, "10 million": 10, "100 million": 100}  # millions of segments
SECONDS, DIM, FRAMES = 10, 512, 12  # of a segment
MEASURED_SECONDS = 30  # of a segment, about, when indexing was measured
THUMBNAIL = 12_000  # bytes, mean of fourteen real clips
FEED = 52_400  # bytes of Vespa's feed a segment, see docs/scale.md
GETS = 243  # of the first query of an index of 100,000 segments in an S3 stand-in
# Assumptions: replace them by your provider's. Dollars.
CPU_HOUR, SPOT_CPU_HOUR, GPU_HOUR = 0.05, 0.02, 10.0  # a CPU comes with 4 GiB of memory
STORED_GB_MONTH, THOUSAND_GETS = 0.023, 0.0004
HOURS_A_MONTH, QUERIES_A_MONTH = 730, 1_000_000
MACHINE_CPUS, MACHINE_GIB, FREE_CPUS, FREE_SHARE, FRONT_CPUS = 16, 64, 2, 0.1, 4
PROCESS_GIB, SECOND_VERSION_GIB = 0.5, 0.1  # of a shard, besides the measured peak


def read(name: str) -> list[dict[str, Any]]:
    """Returns the rows of a file of results."""
    path = Path(__file__).parent / "results" / f"{name}.json"
    return json.loads(path.read_text())["rows"]


def extrapolate(millions: int) -> dict[str, str]:
    """Returns {label: value} of an index with so many million segments."""
    small, large = read("search_100000_cpu")[1], read("search_1000000_cpu")[1]
    count, rows = millions * 1e6, {}

    def line(name: str) -> float:
        """Continues the line through both measured sizes."""
        return small[name] + (large[name] - small[name]) / 0.9 * (millions - 0.1)

    def gigabytes(bytes_each: float) -> str:
        return f"{bytes_each * count / 1e9:,.0f} GB"

    numbers, half = DIM * (FRAMES + 1), 2 * DIM * (FRAMES + 1) + THUMBNAIL
    rest = large["query_p50"] - large["sentence-video_p50"]  # depends on the funnel's widths only
    shard_gib = large["peak_mib"] / 1024 + PROCESS_GIB + SECOND_VERSION_GIB
    cpus, text = choose_machines(millions, shard_gib)
    core_hours = {name: seconds * count / 3600 for name, seconds in read_indexing().items()}
    spot = core_hours["decoding and encoding"] * SPOT_CPU_HOUR
    mixed = core_hours["decoding"] * SPOT_CPU_HOUR + core_hours["GPU"] * GPU_HOUR
    reads = GETS * QUERIES_A_MONTH / 1000 * THOUSAND_GETS
    rows[f"hours of video, {SECONDS} s a segment"] = f"{count * SECONDS / 3600:,.0f}"
    rows["disk or bucket, float32"] = gigabytes(4 * numbers + THUMBNAIL)
    rows["disk or bucket, float16"] = gigabytes(half)
    rows["feed for Vespa"] = gigabytes(FEED)
    rows["peak memory of one process"] = f"{line('peak_mib') / 1024:,.0f} GiB"
    rows["query in one process"] = f"{(line('sentence-video_p50') + rest) / 1000:,.2f} s"
    rows["shards of a million segments"] = f"{millions}"
    rows["memory of all shards"] = f"{millions * shard_gib:,.0f} GiB"
    rows["core hours to index without GPUs"] = f"{core_hours['decoding and encoding']:,.0f}"
    rows["core hours to decode, with GPUs"] = f"{core_hours['decoding']:,.0f}"
    rows["GPU hours to encode"] = f"{core_hours['GPU']:,.1f}"
    rows["machines to serve"] = text
    rows["**machines, a month**"] = f"${cpus * CPU_HOUR * HOURS_A_MONTH:,.0f}"
    rows["**storage, a month**, float16"] = f"${half * count / 1e9 * STORED_GB_MONTH:,.0f}"
    rows["**reads, a million queries**, one reader of a bucket"] = f"${reads:,.0f}"
    rows["**indexing once**, spot CPUs"] = f"${spot:,.0f}"
    rows["**indexing once**, spot CPUs and GPUs"] = f"${mixed:,.0f}"
    return rows


def read_indexing() -> dict[str, float]:
    """Returns {resource: measured seconds a segment of SECONDS, of one core or GPU}."""
    row = read("search_indexing_cpu")[-1]  # medians, on two cores
    overhead = row["adding"] / (row["decoding"] + row["towers"])
    decoding = 2 * row["decoding"] / row["segments"] * SECONDS / MEASURED_SECONDS * overhead
    # A segment is encoded as FRAMES frames, whatever its length.
    encoding = 2 * row["towers"] / row["segments"] * overhead
    gpu = FRAMES / read("encoding_nvidia_h200")[0]["frames_per_s"]
    return {"decoding": decoding, "decoding and encoding": decoding + encoding, "GPU": gpu}


def choose_machines(shards: int, shard_gib: float) -> tuple[int, str]:
    """Returns (number of CPUs, description) of the machines for the shards and the front end."""
    if shards == 1:
        return FRONT_CPUS, f"{FRONT_CPUS} CPUs"
    fitting = int(MACHINE_GIB * (1 - FREE_SHARE) / shard_gib)
    machines = math.ceil(shards / min(MACHINE_CPUS - FREE_CPUS, fitting))
    cpus = machines * MACHINE_CPUS + FRONT_CPUS
    return cpus, f"{machines} x {MACHINE_CPUS} + {FRONT_CPUS} CPUs"


def format_tables() -> str:
    """Returns the table as Markdown."""
    columns = [extrapolate(millions) for millions in SIZES.values()]
    rows = [["segments", *SIZES], ["---"] * (len(SIZES) + 1)]
    rows += [[label, *(column[label] for column in columns)] for label in columns[0]]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def main() -> None:
    """Prints the table."""
    print(format_tables(), end="")


if __name__ == "__main__":
    main()
