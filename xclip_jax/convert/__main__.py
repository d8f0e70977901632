r"""Converts a PyTorch checkpoint to a model directory, or a model directory to PyTorch.

    python -m xclip_jax.convert --input=ViT-B-32.pt --output=models/clip_b32 \
        --vocab=bpe_simple_vocab_16e6.txt.gz
    python -m xclip_jax.convert --input=openai/clip-vit-base-patch32 --output=models/clip_b32
    python -m xclip_jax.convert --input=pytorch_model.bin.4 --output=models/xclip --vocab=...
    python -m xclip_jax.convert --to=pytorch --input=models/xclip --output=exported

Reads OpenAI's .pt archives, state dicts, Hugging Face CLIP folders and hub ids, open_clip
checkpoints, and the official X-CLIP and CLIP4Clip pytorch_model.bin.N. Needs no PyTorch.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from xclip_jax.cli import InputError, one_line_errors, run_command
from xclip_jax.convert.exporting import export
from xclip_jax.convert.importing import convert


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m xclip_jax.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--input",
        required=True,
        help="checkpoint, Hugging Face folder or hub id; with --to=pytorch a model directory",
    )
    add("--output", required=True, type=Path, help="folder to write; must not exist yet")
    add("--to", choices=["jax", "pytorch"], default="jax", help="direction (default jax)")
    add("--vocab", help="tokenizer: OpenAI's bpe_simple_vocab_16e6.txt.gz, a folder or a hub id")
    add(
        "--head",
        choices=["mean_pooling", "xclip"],
        help="head for plain CLIP: mean_pooling (default) scores averaged frames as CLIP scores an "
        "image; xclip also compares words and frames, without a temporal encoder",
    )
    add(
        "--activation",
        choices=["quick_gelu", "gelu"],
        help="for checkpoints without config.json; default gelu for open_clip, else quick_gelu",
    )
    add("--vision_heads", type=int, help="attention heads of the image tower (default width / 64)")
    add("--text_heads", type=int, help="attention heads of the text tower (default width / 64)")
    add("--max_words", type=int, help="tokens per text, including start and end")
    add("--max_frames", type=int, help="frames per video (default 12)")
    add(
        "--crop_matrices",
        action="store_true",
        help="cut learned matrices to --max_words and --max_frames",
    )
    return parser


_ONLY_IMPORT = (
    *("vocab", "head", "activation", "vision_heads", "text_heads"),
    *("max_words", "max_frames", "crop_matrices"),
)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    args = _parser().parse_args(argv)
    options = {name: getattr(args, name) for name in _ONLY_IMPORT}
    with one_line_errors():
        if args.output.exists():
            raise InputError(f"{args.output} exists already: pass another --output or delete it")
        if args.to == "jax":
            convert(args.input, args.output, **options)
            return
        names = [f"--{name}" for name, value in options.items() if value not in (None, False)]
        if names:
            raise InputError(f"{', '.join(names)} cannot be used with --to=pytorch")
        export(args.input, args.output)


if __name__ == "__main__":
    run_command(main)
