"""Runs a command of xclip_jax: `xclip-jax COMMAND` or `python -m xclip_jax COMMAND`."""

import functools
import importlib
import sys
from collections.abc import Sequence

from xclip_jax.allocator import use_huge_pages
from xclip_jax.cli import run_command

COMMANDS = {
    "train": ("xclip_jax.main", "train and evaluate a model"),
    "prepare": ("xclip_jax.prepare", "sample the frames of videos and write a data set"),
    "convert": ("xclip_jax.convert.__main__", "convert PyTorch checkpoints, in both directions"),
    "search": ("xclip_jax.search.__main__", "index, query and serve a collection of videos"),
    "study": ("xclip_jax.study.__main__", "train variants of a config and compare them"),
    "push": ("xclip_jax.push", "write a model to the Hugging Face hub, with a model card"),
    "runs": ("xclip_jax.runs", "compare the results and curves of all runs on one page"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command named by the first argument with the remaining arguments."""
    name, *arguments = (sys.argv[1:] if argv is None else argv) or ["no command"]
    if name in ("-h", "--help"):
        rows = "".join(f"  {command:9}{text}\n" for command, (_, text) in COMMANDS.items())
        print(f"usage: xclip-jax COMMAND [OPTIONS]\n\n{rows}\nOptions: xclip-jax COMMAND --help")
    elif name in COMMANDS:
        if argv is None and name in ("train", "study"):  # called from Python, it must not restart
            use_huge_pages()
        module = importlib.import_module(COMMANDS[name][0])  # only what this command needs
        run_command(functools.partial(module.main, arguments))
    else:
        print(f"error: {name}: must be one of {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
