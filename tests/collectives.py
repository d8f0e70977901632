"""Collectives of compiled programs: their bytes, in and outside of loops."""

import collections
import math
import re

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8}
COLLECTIVES = "all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all"


def collective_bytes(text):
    """Returns {collective: bytes that it yields on a device}, with all iterations of loops.

    `text` is HLO. A loop without a known number of iterations counts once.
    """
    computations = _computations(text)

    def count(name):
        total = collections.Counter()
        for line in computations[name].splitlines():
            for shapes, kind in re.findall(rf"= (.*?) ({COLLECTIVES})(?:-done)?\(", line):
                total[kind] += _shape_bytes(shapes)
            trips = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
            for inner in re.findall(r"(?:calls|to_apply|body)=%?([\w.-]+)", line):
                for kind, size in count(inner).items():
                    total[kind] += size * (int(trips[1]) if trips else 1)
        return total

    return dict(count(re.findall(r"^ENTRY %?([\w.-]+)", text, re.M)[0]))


def reduced_bytes(text):
    """Returns (bytes that all-reduce yields outside of loops, those in bodies of loops).

    `text` is HLO. A body counts once, however often it runs.
    """
    computations = _computations(text)
    bodies = set(re.findall(r"body=%?([\w.-]+)", text))
    while (
        inner := {
            name
            for body in bodies
            for name in re.findall(r"(?:calls|to_apply|body)=%?([\w.-]+)", computations[body])
        }
        - bodies
    ):
        bodies |= inner
    sums = {True: 0, False: 0}
    for name, lines in computations.items():
        for shapes in re.findall(r"= (.*?) all-reduce(?:-start)?\(", lines):
            sums[name in bodies] += _shape_bytes(shapes)
    return sums[False], sums[True]


def _computations(text):
    return dict(re.findall(r"^(?:ENTRY )?%?([\w.-]+) [^\n]*\{\n(.*?)^\}", text, re.M | re.S))


def _shape_bytes(shapes):
    found = re.findall(r"(\w+)\[([\d,]*)\]", shapes)
    return sum(
        BYTES[kind] * math.prod(int(n) for n in sizes.split(",") if n) for kind, sizes in found
    )
