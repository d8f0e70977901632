"""Tells what the devices of this process can compute."""

import re

import jax


def is_recent_gpu() -> bool:
    """Returns True for an NVIDIA GPU of compute capability 8.0 (Ampere) or higher.

    It has products of bfloat16 numbers and cuDNN's kernels of attention.
    """
    if jax.default_backend() != "gpu":
        return False
    capability = str(getattr(jax.local_devices()[0], "compute_capability", ""))
    return bool(re.fullmatch(r"\d+\.\d+", capability)) and float(capability) >= 8
