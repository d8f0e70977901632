"""Search over one's own videos: type a sentence, get the second.

    python -m xclip_jax.search index clips/ --model=runs/demo --index=my_index
    python -m xclip_jax.search query "a dog on a skateboard" --index=my_index
    python -m xclip_jax.search serve --index=my_index

How it works, and how large it can be: docs/search.md.
"""

import argparse

from xclip_jax.cli import InputError, one_line_errors, run_command
from xclip_jax.search import commands
from xclip_jax.search.index import PRECISIONS, SEGMENT_SECONDS


def _parser():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m xclip_jax.search", description=__doc__, formatter_class=formatter
    )
    add = parser.add_subparsers(dest="command", required=True, metavar="COMMAND").add_parser
    for name, options in _OPTIONS.items():
        function = getattr(commands, name)
        summary = function.__doc__.splitlines()[0]
        command = add(name, help=summary, description=function.__doc__, formatter_class=formatter)
        command.add_argument("--index", required=True, help="folder of the index, or bucket URI")
        options(command.add_argument)
        command.set_defaults(function=function)
    return parser


def _index(add):
    add("videos", nargs="+", metavar="VIDEOS", help="video files, or folders of them")
    add("--model", help="model or work directory; needed the first time")
    add(
        "--segment_seconds",
        type=int,
        help=f"length that long videos are cut into (default {SEGMENT_SECONDS}); "
        "fixed when the index is made",
    )
    add(
        "--shots",
        action="store_true",
        default=None,
        help="cut at changes of shot, none longer than --segment_seconds; likewise fixed",
    )
    add(
        "--precision",
        choices=PRECISIONS,
        help="of the stored features (default float32); float16 halves them; likewise fixed",
    )
    add("--prune", action="store_true", help="forget files that are gone from VIDEOS")


def _asking(add):
    add("--model", help="where the model is now, if it has moved")
    add(
        "--candidates", type=int, default=5000, help="segments compared word by word (default 5000)"
    )
    add("--rerank", type=int, default=200, help="segments compared frame by frame (default 200)")


def _query(add):
    add("text", nargs="?", help="the sentence")
    add("--video", help="find what resembles this video; with --captions: rank them for it")
    add("--image", help="find what resembles this picture")
    add("--captions", help="text file, a sentence a line")
    add("-k", type=int, default=10, help="how many results (default 10)")
    add("--path", help="only files whose path has this in it; * and ? as in a shell")
    add("--start", type=float, help="only what is shown after this second of its file")
    add("--end", type=float, help="only what is shown before this second of its file")
    add("--exhaustive", action="store_true", help="score every segment by the whole model")
    add("--json", action="store_true", help="print JSON")
    add("--open", action="store_true", help="play the best one (mpv, VLC or ffplay: at the second)")
    add("--save_grid", metavar="PNG", help="save a picture of the results")
    _asking(add)


def _serve(add):
    add("--host", default="127.0.0.1", help="address to listen on (default: this machine alone)")
    add("--port", type=int, default=7870, help="(default 7870)")
    add("--open", action="store_true", help="open it in the browser")
    _asking(add)


def _recall(add):
    add("--sample", type=int, default=200, help="how many sentences (default 200)")
    add("--queries", help="text file, a sentence a line; default: sentences of common words")
    add("--json", action="store_true", help="print JSON")
    _asking(add)


def _export(add):
    add("--output", required=True, help="a .parquet or .npz file")


_OPTIONS = {
    "index": _index,
    "query": _query,
    "serve": _serve,
    "recall": _recall,
    "export": _export,
}


def main(argv=None):
    """The command line."""
    args = vars(_parser().parse_args(argv))
    args.pop("command")
    function, location = args.pop("function"), args.pop("index")
    with one_line_errors():
        for name in ("candidates", "rerank", "k", "sample", "segment_seconds"):
            if args.get(name) is not None and args[name] < 1:
                raise InputError(f"--{name}={args[name]}: must be at least 1")
        function(location, **args)


if __name__ == "__main__":
    run_command(main)
