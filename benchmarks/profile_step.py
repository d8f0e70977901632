"""Lists the shares of a training step on CPU: products and the rest, by part of the model.

    python benchmarks/profile_step.py --batch=4

Random weights and frames of the default config, in float32. JAX's profiler records when each
operation of the compiled program runs; operations run one after another here, so that times do not
overlap. A product that runs in the background counts partly for the operation after it. Writes
results/profile_step_cpu.json.
"""

import argparse
import collections
import os
import re
import tempfile
from pathlib import Path

# Before JAX starts.
os.environ["XLA_FLAGS"] = "--xla_cpu_enable_concurrency_optimized_scheduler=false"

import jax
import results
import train_step

from xclip_jax.allocator import use_huge_pages
from xclip_jax.models import XClip, read_model_config

PARTS = {  # in the name of an operation -> part, the first that fits
    "/visual/": "image tower",
    "/textual/": "text tower",
    "relate_frames": "temporal encoder",
    "similarity": "similarity (AOSM)",
}
INSTRUCTION = re.compile(r"%?([\w.\-]+) = \S+ ([\w\-]+)\(.*?op_name=\"([^\"]*)\"")


def record_step(side: train_step.JaxStep) -> tuple[dict[str, float], float]:
    """Returns the seconds of each operation in one step, and of the step."""
    for _ in range(3):
        side.step()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            seconds, _ = results.measure_seconds(side.step)
        (file,) = Path(folder).rglob("*.xplane.pb")
        profile = jax.profiler.ProfileData.from_file(str(file))
    lines = [line for plane in profile.planes for line in plane.lines if line.name != "python"]
    events = sorted(
        (e.start_ns, e.start_ns + e.duration_ns, e.name) for x in lines for e in x.events
    )
    times: dict[str, float] = collections.Counter()
    started, before = {}, 0.0
    for start, end, name in events:
        if not name.startswith("end: "):
            started[name] = start
        elif (operation := name.removeprefix("end: ")) in started:
            times[operation] += max(0, end - max(started.pop(operation), before)) / 1e9
            before = max(before, end)
    return times, seconds


def summarize(program: str, times: dict[str, float], seconds: float) -> list[results.Row]:
    """Returns rows of (part, pass, kind) with their share of the step, the largest first."""
    found = {name: (kind, source) for name, kind, source in INSTRUCTION.findall(program)}
    shares: dict[tuple[str, str, str], float] = collections.Counter()
    for name, time in times.items():
        if name not in found or found[name][0] == "while":
            continue
        kind, source = found[name]
        part = next((part for key, part in PARTS.items() if key in source), None)
        way = "backward" if "transpose(" in source else "forward"
        part, way = (part, way) if part else ("loss, optimizer, other", "")
        is_product = name.startswith("ynn") or kind == "dot"
        shares[part, way, "products" if is_product else "other"] += time
    rest = seconds - sum(shares.values())
    rows = [*shares.items(), (("not attributed", "", ""), rest)]
    return [
        {"part": part, "pass": way, "kind": kind, "seconds": time, "share": time / seconds}
        for (part, way, kind), time in sorted(rows, key=lambda row: -row[1])
    ]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=("b32", "b16"), default="b32")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--frames", type=int, default=12)
    parser.add_argument("--remat", choices=("none", "dots", "layers"), default="none")
    args = parser.parse_args()
    args.dtype, args.micro_batch = "float32", 0
    config = train_step.make_config(args, args.model, args.batch)
    model = XClip(read_model_config(config.model))
    batch = train_step.random_batch(model.config, args.batch)
    side = train_step.JaxStep(config, model, batch)
    times, seconds = record_step(side)
    rows = summarize(side.compiled.as_text(), times, seconds)
    print(f"{seconds:.2f} s")
    print(results.format_table(rows))
    print(results.write("profile_step", vars(args), rows))


if __name__ == "__main__":
    use_huge_pages()  # as training does
    main()
