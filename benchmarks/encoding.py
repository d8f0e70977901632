"""Measures how many frames a second encode_video takes from host memory, as search indexes them.

    python benchmarks/encoding.py --model=b32,b16 --dtype=bfloat16

Random weights and random uint8 frames, which lie in memory: decoding is not measured.
"""

import argparse
import statistics

import jax
import numpy as np
import results

from xclip_jax.checkpoint import init_params
from xclip_jax.config import BACKBONES, get_config
from xclip_jax.models import XClip, read_model_config
from xclip_jax.retriever import Retriever


def measure(backbone: str, dtype: str, *, videos: int, repeats: int) -> results.Row:
    """Returns the frames per second of a backbone."""
    config = get_config().model
    config.vision.patch_size = BACKBONES[f"vit_{backbone}"]
    config.dtype = dtype
    model = XClip(read_model_config(config))
    retriever = Retriever({}, model, jax.jit(lambda: init_params(model, 0))())
    shape = videos, config.max_frames
    side = config.vision.image_size
    frames = np.random.default_rng(0).integers(0, 256, (*shape, side, side, 3), np.uint8)
    inputs = frames, np.ones(shape, bool)

    def encode() -> object:
        return retriever.encode("encode_video", inputs, 64)

    results.measure_seconds(encode)  # compiles
    seconds = statistics.median(results.measure_seconds(encode)[0] for _ in range(repeats))
    return {"model": backbone, "dtype": dtype, "frames_per_s": frames[..., 0, 0, 0].size / seconds}


def main() -> None:
    """Prints the table and writes results/encoding_DEVICE.json."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="b32", help="b32, b16 or b32,b16")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--videos", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    sizes = {"videos": args.videos, "repeats": args.repeats}
    rows = [measure(model, args.dtype, **sizes) for model in args.model.split(",")]
    print(results.format_table(rows))
    print(results.write("encoding", vars(args), rows))


if __name__ == "__main__":
    main()
