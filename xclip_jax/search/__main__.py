"""Searches your own videos by sentence, video or image.

    python -m xclip_jax.search index clips/ --model=runs/demo --index=my_index
    python -m xclip_jax.search query "a dog on a skateboard" --index=my_index
    python -m xclip_jax.search serve --index=my_index

Method and limits: docs/search.md.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from xclip_jax.cli import InputError, one_line_errors, progress, run_command
from xclip_jax.search import output
from xclip_jax.search.index import PRECISIONS, SEGMENT_SECONDS, Index
from xclip_jax.search.recall import format_recall, measure_recall, sample_sentences
from xclip_jax.search.serve import serve
from xclip_jax.search.store import exists

Add = Callable[..., Any]  # ArgumentParser.add_argument


def run_index(args: argparse.Namespace) -> None:
    """Adds video files, and the video files in folders and their subfolders.

    Rerun after an interruption or a change of files: only new and changed files are read.
    """
    names = ("segment_seconds", "shots", "precision")
    settings = {name: vars(args)[name] for name in names if vars(args)[name] is not None}
    if exists(args.index):
        index = Index.open(args.index, args.model)
        for name, value in settings.items():
            if index.about[name] != value:
                raise InputError(
                    f"--{name}={value}: {args.index} was made with {index.about[name]}; "
                    "omit the option or create another index"
                )
    elif args.model is None:
        raise InputError(f"--model is required: there is no index in {args.index} yet")
    else:
        index = Index.create(args.index, args.model, **settings)
    started = time.perf_counter()
    if index.retriever.tokenizer is None:
        print(
            "note: the model has no tokenizer, so only videos and images can be used as queries; "
            "for sentences convert the model again with --vocab",
            file=sys.stderr,
        )
    summary = index.add(args.videos, prune=args.prune)
    problems = {"partly read": summary.partial, "unreadable": summary.unreadable}
    for title, reasons in problems.items():
        for path, reason in reasons.items():
            print(f"{title}: {output.shorten_path(path)}: {reason}", file=sys.stderr)
    print(
        f"{summary.files:,} files read in {time.perf_counter() - started:.0f} s, "
        f"{summary.unchanged:,} unchanged, {summary.removed:,} replaced or removed, "
        f"{len(summary.unreadable):,} unreadable"
    )
    print(f"{args.index}: {index.num_segments:,} segments of {index.num_files:,} files")
    if not index.num_segments:
        raise InputError("no video could be read")


def run_query(args: argparse.Namespace) -> None:
    """Finds the segments that match a sentence, or are similar to a video or an image."""
    queries = [value for value in (args.text, args.video, args.image) if value is not None]
    if len(queries) != 1:
        raise InputError("query requires exactly one of: a sentence, --video, --image")
    if args.captions and not args.video:
        raise InputError("--captions requires --video, the video to rank them for")
    if args.exhaustive and args.text is None:
        raise InputError("--exhaustive requires a sentence")
    if args.save_grid and not (
        Path(args.save_grid).suffix == ".png" and Path(args.save_grid).parent.is_dir()
    ):
        raise InputError(f"--save_grid={args.save_grid}: must be a .png file in an existing folder")
    index = _open(args)
    if args.captions:
        ranked = index.rank_captions(args.video, _read_lines(args.captions))
        output.print_captions(ranked[: args.k], as_json=args.json)
        return
    filters = {"path": args.path, "start": args.start, "end": args.end}
    if args.text is None:
        answer = index.similar(queries[0], args.k, **filters)
    elif args.exhaustive:
        with progress(index.num_segments, "scoring", "segment") as bar:
            answer = index.query_exhaustively([args.text], args.k, bar=bar, **filters)[0]
    else:
        answer = index.query(args.text, args.k, **filters)
    output.print_answer(answer, as_json=args.json)
    if args.save_grid and answer.hits:
        title = args.text or os.path.basename(queries[0])
        output.draw_grid(args.save_grid, title, answer.hits, thumbnail=index.thumbnail)
        print(f"picture: {args.save_grid}", file=sys.stderr)
    if args.open and answer.hits:
        output.play(answer[0])


def run_serve(args: argparse.Namespace) -> None:
    """Serves a web page with a search box, results, a player and a heat map.

    Only files of the index are served.
    """
    index = _open(args)
    index.warm_up()
    serve(index, args.host, args.port, open_page=args.open)


def run_recall(args: argparse.Namespace) -> None:
    """Reports the recall and times of the funnel, compared with exhaustive search."""
    index = _open(args)
    lines = _read_lines(args.queries)[: args.sample] if args.queries else None
    result = measure_recall(index, lines or sample_sentences(args.sample))
    if args.json:
        output.print_json(result)
    else:
        print(format_recall(result))


def run_export(args: argparse.Namespace) -> None:
    """Writes the embeddings to a file for other programs."""
    index = Index.open(args.index)
    output.export_segments(index, args.output)
    print(f"{args.output}: {index.num_segments:,} segments")


def _open(args: argparse.Namespace) -> Index:
    return Index.open(args.index, args.model, args.candidates, args.rerank)


def _read_lines(path: str) -> list[str]:
    """Returns the non-empty lines of a text file."""
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text") from None
    lines = [line for line in lines if line]
    if not lines:
        raise InputError(f"{path}: contains no sentence")
    return lines


def _add_index_options(add: Add) -> None:
    add("videos", nargs="+", metavar="VIDEOS", help="video files or folders of video files")
    add("--model", help="model or work directory; required for a new index")
    # The next three are fixed when the index is made; None: the default, or as it was made.
    add("--segment_seconds", type=int, help=f"length of a segment (default {SEGMENT_SECONDS})")
    add("--shots", action="store_true", default=None, help="cut at shot changes as well")
    add("--precision", choices=PRECISIONS, help="of the stored features (default float32)")
    add("--prune", action="store_true", help="remove files that no longer exist in VIDEOS")


def _add_model_options(add: Add) -> None:
    add("--model", help="model directory, if it has moved since the index was made")
    add("--candidates", type=int, default=5000, help="segments compared by words (default 5000)")
    add("--rerank", type=int, default=200, help="segments compared by frames (default 200)")


def _add_query_options(add: Add) -> None:
    add("text", nargs="?", help="the sentence")
    add("--video", help="find segments similar to this video; with --captions: rank them for it")
    add("--image", help="find segments similar to this image")
    add("--captions", help="text file, one sentence per line")
    add("-k", type=int, default=10, help="number of results (default 10)")
    add("--path", help="only files whose path contains this; * and ? as in a shell")
    add("--start", type=float, help="only segments after this second of their file")
    add("--end", type=float, help="only segments before this second of their file")
    add("--exhaustive", action="store_true", help="score every segment by the full model")
    add("--json", action="store_true", help="print JSON")
    add("--open", action="store_true", help="play the first result (mpv, VLC or ffplay)")
    add("--save_grid", metavar="PNG", help="save a picture of the results")
    _add_model_options(add)


def _add_serve_options(add: Add) -> None:
    add("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    add("--port", type=int, default=7870, help="port to listen on (default 7870)")
    add("--open", action="store_true", help="open the page in the browser")
    _add_model_options(add)


def _add_recall_options(add: Add) -> None:
    add("--sample", type=int, default=200, help="number of sentences (default 200)")
    add("--queries", help="text file, one sentence per line; default: sentences of common words")
    add("--json", action="store_true", help="print JSON")
    _add_model_options(add)


def _add_export_options(add: Add) -> None:
    add("--output", required=True, help="the .parquet or .npz file to write")


_COMMANDS = {
    "index": (run_index, _add_index_options),
    "query": (run_query, _add_query_options),
    "serve": (run_serve, _add_serve_options),
    "recall": (run_recall, _add_recall_options),
    "export": (run_export, _add_export_options),
}


def _make_parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m xclip_jax.search", description=__doc__, formatter_class=formatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (run, add_options) in _COMMANDS.items():
        description = run.__doc__ or ""
        summary = description.splitlines()[0]
        command = commands.add_parser(
            name, help=summary, description=description, formatter_class=formatter
        )
        command.add_argument("--index", required=True, help="folder or bucket URI of the index")
        add_options(command.add_argument)
        command.set_defaults(run=run)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    args = _make_parser().parse_args(argv)
    with one_line_errors():
        for name in ("candidates", "rerank", "k", "sample", "segment_seconds"):
            value = getattr(args, name, None)
            if value is not None and value < 1:
                raise InputError(f"--{name}={value}: must be at least 1")
        args.run(args)


if __name__ == "__main__":
    run_command(main)
