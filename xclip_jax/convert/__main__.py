r"""Converts a PyTorch checkpoint to a model directory, or a model directory to PyTorch.

    python -m xclip_jax.convert --input=ViT-B-32.pt --output=models/clip_b32 \
        --vocab=bpe_simple_vocab_16e6.txt.gz
    python -m xclip_jax.convert --input=openai/clip-vit-base-patch32 --output=models/clip_b32
    python -m xclip_jax.convert --input=google/siglip2-base-patch16-224 --output=models/siglip2_b16
    python -m xclip_jax.convert --input=pytorch_model.bin.4 --output=models/xclip --vocab=...
    python -m xclip_jax.convert --to=pytorch --input=models/xclip --output=exported
    python -m xclip_jax.convert --to=safetensors --input=runs/demo --output=exported

Reads VideoPrism's .npz, OpenAI's .pt archives, CLIP and SigLIP of Hugging Face, PE-Core, Long-CLIP,
models of open_clip with ViT, SigLIP, PE-Core or EVA-02 towers, as files, folders or hub ids, and
the official X-CLIP and CLIP4Clip pytorch_model.bin.N: see docs/encoders.md. --to=pytorch writes the
files that the original code and transformers read, if they support the model; --to=safetensors
writes any model, for examples/xclip_torch.py (docs/pytorch.md). Needs no PyTorch.
"""

from collections.abc import Sequence

from xclip_jax.cli import CommandParser, InputError, check_local, one_line_errors, run_command
from xclip_jax.convert.exporting import export, export_safetensors
from xclip_jax.convert.importing import convert
from xclip_jax.convert.reading import Options
from xclip_jax.convert.settings import is_rgb
from xclip_jax.models.config import PreprocessConfig


def _parse_rgb(text: str) -> tuple[float, ...]:
    """Returns three numbers from 0 to 1."""
    values = tuple(map(float, text.split(",")))
    if not (len(values) == 3 and is_rgb(values, "mean")):
        raise ValueError
    return values


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = CommandParser(prog="python -m xclip_jax.convert", description=__doc__)
    add = parser.add_argument
    text = "checkpoint, folder or hub id; to export: a model or work directory"
    add("--input", required=True, help=text)
    add("--output", required=True, help="folder to write; must not exist yet")
    text = "jax (default): a model directory; the others: an export of one, see above"
    add("--to", choices=["jax", "pytorch", "safetensors"], default="jax", help=text)
    add("--vocab", help="tokenizer: OpenAI's bpe_simple_vocab_16e6.txt.gz, a folder or a hub id")
    text = (
        "head for encoders without one: mean_pooling (default) scores averaged frames as CLIP "
        "scores an image; xclip also compares words and frames, without a temporal encoder"
    )
    add("--head", choices=["mean_pooling", "xclip"], help=text)
    text = "required where neither the weights nor a file beside them states it"
    add("--activation", choices=["quick_gelu", "gelu"], help=text)
    text = "attention heads of the image tower (if not stated: width / 64, up to a width of 1024)"
    add("--vision_heads", type=int, help=text)
    add("--text_heads", type=int, help="the same of the text tower")
    text = "mean and deviation of RGB in [0, 1] in training, as in 0.5,0.5,0.5 (default: CLIP's)"
    add("--image_mean", type=_parse_rgb, help=text)
    add("--image_std", type=_parse_rgb, help="see --image_mean")
    add("--max_words", type=int, help="tokens per text, special ones included")
    add("--max_frames", type=int, help="frames per video (default 12)")
    text = "cut learned matrices to --max_words and --max_frames"
    add("--crop_matrices", action="store_true", help=text)
    options = vars(parser.parse_args(argv))
    source, output, to = (options.pop(name) for name in ("input", "output", "to"))
    mean, std = options.pop("image_mean"), options.pop("image_std")
    if (mean is None) != (std is None):
        parser.error("--image_mean and --image_std belong together")
    if std and not is_rgb(std, "std"):
        parser.error("--image_std: must be above 0")
    options["preprocess"] = PreprocessConfig(mean, std) if mean and std else None
    with one_line_errors():
        output = check_local("--output", output)
        if output.exists():
            raise InputError(f"{output} exists already: pass another --output or delete it")
        if to == "jax":
            return convert(source, output, Options(**options))
        if names := [f"--{name}" for name, value in options.items() if value not in (None, False)]:
            raise InputError(f"{', '.join(names)} cannot be used with --to={to}")
        (export if to == "pytorch" else export_safetensors)(source, output)


if __name__ == "__main__":
    run_command(main)
