"""Collectives of compiled programs: their bytes, in and outside of loops."""

import math
import re

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8}


def reduced_bytes(text):
    """Returns (bytes that all-reduce yields outside of loops, those in bodies of loops).

    `text` is HLO. A body counts once, however often it runs.
    """
    computations = dict(re.findall(r"^(?:ENTRY )?%?([\w.-]+) .*?\{\n(.*?)^\}", text, re.M | re.S))
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
            for kind, sizes in re.findall(r"(\w+)\[([\d,]*)\]", shapes):
                count = math.prod(int(n) for n in sizes.split(",") if n)
                sums[name in bodies] += BYTES[kind] * count
    return sums[False], sums[True]
