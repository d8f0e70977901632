"""Tests of the extrapolated table of docs/scale.md."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def load_benchmark():
    spec = importlib.util.spec_from_file_location("scale", ROOT / "benchmarks/scale.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_table_of_the_docs_is_the_computed_one():
    assert load_benchmark().format_tables() in (ROOT / "docs/scale.md").read_text("utf-8")


def test_line_passes_through_the_measured_sizes():
    scale = load_benchmark()
    values = scale.extrapolate(1)
    measured = scale.read("search_1000000_cpu")[1]
    assert values["query in one process"] == f"{measured['query_p50'] / 1000:.2f} s"
    assert values["peak memory of one process"] == f"{measured['peak_mib'] / 1024:.0f} GiB"
    # By hand: 13 vectors of 512 numbers of 2 bytes and a thumbnail of 12 kB.
    assert values["disk or bucket, float16"] == "25 GB"


def test_shards_are_counted_in_whole_machines():
    scale = load_benchmark()
    assert scale.choose_machines(1, 4.6) == (4, "4 CPUs")
    assert scale.choose_machines(12, 4.6) == (20, "1 x 16 + 4 CPUs")  # 12 x 4.6 of 57.6 GiB
    assert scale.choose_machines(13, 4.6) == (36, "2 x 16 + 4 CPUs")
    assert scale.choose_machines(28, 1.0) == (36, "2 x 16 + 4 CPUs")  # 14 of 16 CPUs
