"""Runs a command of xclip_jax: `xclip-jax COMMAND` or `python -m xclip_jax COMMAND`."""

import functools
import importlib
import sys
from collections.abc import Sequence

from xclip_jax.cli import run_command

COMMANDS = {
    "train": ("xclip_jax.main", "train and evaluate a model"),
    "prepare": ("xclip_jax.prepare", "sample the frames of videos and write a data set"),
    "convert": ("xclip_jax.convert.__main__", "convert PyTorch checkpoints, in both directions"),
    "search": ("xclip_jax.search.__main__", "index, query and serve a collection of videos"),
    "study": ("xclip_jax.study.__main__", "train variants of a config and compare them"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command named by the first argument with the remaining arguments."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    rows = "\n".join(f"  {name:9}{summary}" for name, (_, summary) in COMMANDS.items())
    text = f"usage: xclip-jax COMMAND [OPTIONS]\n\n{rows}\n\nOptions: xclip-jax COMMAND --help"
    if arguments and arguments[0] in ("-h", "--help"):
        print(text)
        return
    if not arguments or arguments[0] not in COMMANDS:
        name = arguments[0] if arguments else "no command"
        print(f"error: {name}: must be one of {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    module = importlib.import_module(COMMANDS[arguments[0]][0])  # only what this command needs
    run_command(functools.partial(module.main, arguments[1:]))


if __name__ == "__main__":
    main()
