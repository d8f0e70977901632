"""Searches your own videos by sentence, video or image.

    python -m xclip_jax.search index clips/ --model=runs/demo --index=my_index
    python -m xclip_jax.search query "a dog on a skateboard" --index=my_index
    python -m xclip_jax.search serve --index=my_index

Method and limits: docs/search.md.
"""

import argparse
import contextlib
import dataclasses
import inspect
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from xclip_jax.cli import (
    CommandParser,
    InputError,
    check_local,
    one_line_errors,
    run_command,
    show_log_times,
    terminate_like_ctrl_c,
)
from xclip_jax.data.annotations import read_text
from xclip_jax.data.tokenizer import is_blank
from xclip_jax.search import clips, indexing, mcp_server, output, vespa
from xclip_jax.search.adding import check_folder
from xclip_jax.search.backends import parse_distribution
from xclip_jax.search.bank import check_bank, digest_bank
from xclip_jax.search.calibration import sample_sentences
from xclip_jax.search.index import PRECISIONS, SEGMENT_SECONDS, Index
from xclip_jax.search.querying import parse_sources
from xclip_jax.search.results import SOURCES
from xclip_jax.search.searcher import Searcher
from xclip_jax.search.serve import open_listener, serve
from xclip_jax.search.sharded import open_sharded
from xclip_jax.search.store import ExistsError, exists
from xclip_jax.search.timed_text import make_readers


def run_index(args: argparse.Namespace) -> None:
    """Adds video files, and the video files in folders and their subfolders.

    Rerun after an interruption or a change of files: only new and changed files are read.
    """
    names = ("segment_seconds", "overlap_seconds", "shots", "precision")
    settings = {name: vars(args)[name] for name in names if vars(args)[name] is not None}
    names = ("workers", "shard", "beam_runner", "beam_options")
    distribution: Any = {name: vars(args)[name] for name in names}
    parse_distribution(args.index, **distribution)  # raises before an index exists
    bank = _read_bank(args.bank) if args.bank is not None else None
    if not exists(args.index):
        if args.model is None:
            raise InputError(f"--model is required: there is no index in {args.index} yet")
        make_readers(ocr=args.ocr, speech=args.speech)  # raises before an index exists
        indexing.find_videos(args.videos, allow_none=args.prune)  # raises before an index exists
        with contextlib.suppress(ExistsError):  # the processes of a job array start together
            Index.create(args.index, args.model, bank=bank, **settings)
    index = _open_index(args, bank, settings)
    started = time.perf_counter()
    if index.retriever.tokenizer is None:
        note = "the model has no tokenizer: search by video or image, or convert it with --vocab"
        print(f"note: {note}", file=sys.stderr)
    options: Any = {"prune": args.prune, "ocr": args.ocr, "speech": args.speech}
    with terminate_like_ctrl_c():
        summary = index.add(args.videos, **options, **distribution)
    for title, reasons in (("partly read", summary.partial), ("unreadable", summary.unreadable)):
        for path, reason in reasons.items():
            print(f"{title}: {output.shorten_path(path)}: {reason}", file=sys.stderr)
    print(
        f"{output.count(summary.files, 'file')} read in {time.perf_counter() - started:.0f} s, "
        f"{summary.unchanged:,} unchanged, {summary.removed:,} replaced or removed, "
        f"{len(summary.unreadable):,} unreadable"
    )
    if summary.texts:
        print(f"text found in {output.count(summary.texts, 'file')} (subtitles, speech, screen)")
    sizes = [output.count(index.num_segments, "segment"), output.count(index.num_files, "file")]
    print(f"{args.index}: {' of '.join(sizes)}")
    if not index.num_segments:
        raise InputError("no video could be read")


def _open_index(
    args: argparse.Namespace, bank: Sequence[str] | None, settings: dict[str, Any]
) -> Index:
    """Opens the index, or raises InputError if it was made with other options."""
    index = Index.open(args.index, args.model)
    for name, value in settings.items():
        if (former := index.about.get(name, 0)) != value:  # older indexes have no overlap
            problem = f"--{name}={value}: {args.index} was made with {former}"
            raise InputError(f"{problem}; omit the option or create another index")
    if bank and digest_bank(bank) != index.about.get("bank"):
        made = "with another bank" if "bank" in index.about else "without a bank"
        problem = f"--bank={args.bank}: {args.index} was made {made}"
        raise InputError(f"{problem}; omit --bank or create another index")
    return index


def run_query(args: argparse.Namespace) -> None:
    """Finds the moments that match a sentence, or are similar to a video or an image."""
    queries = [value for value in (args.text, args.video, args.image) if value is not None]
    if len(queries) != 1:
        raise InputError("query requires exactly one of: a sentence, --video, --image")
    if args.captions and not args.video:
        raise InputError("--captions requires --video, the video to rank them for")
    for option, is_given in (("--exhaustive", args.exhaustive), ("--in", args.sources is not None)):
        if is_given and args.text is None:
            raise InputError(f"{option} requires a sentence")
    others = ("segments", "dedupe", "path", "start", "end", "save_grid", "save_clips", "open")
    if args.captions and (given := [name for name in others if getattr(args, name)]):
        raise InputError(f"--captions ranks sentences for one video: --{given[0]} has no meaning")
    check_local("--save_clips", args.save_clips or "none")
    picture = check_local("--save_grid", args.save_grid or "none.png")
    if picture.suffix != ".png" or not picture.parent.is_dir():
        raise InputError(f"--save_grid={picture}: must be a .png file in an existing folder")
    index = Index.open(args.index, args.model, args.candidates, args.rerank)
    if args.captions:
        ranked = index.rank_captions(args.video, _read_lines(args.captions))[: args.k]
        if args.json:
            output.print_json([{"caption": caption, "score": score} for caption, score in ranked])
            return
        print(f"{'rank':>4}  {'score':>7}  caption")
        for rank, (caption, score) in enumerate(ranked, 1):
            print(f"{rank:4}  {score:7.2f}  {caption}")
        return
    options: Any = {"path": args.path, "start": args.start, "end": args.end}
    options |= {"dedupe": args.dedupe, "merge": not args.segments}
    if args.text is None:
        answer = index.similar(queries[0], args.k, **options)
    else:
        sources = parse_sources(args.sources) if args.sources is not None else None
        if args.exhaustive and sources is not None and "picture" not in sources:
            raise InputError(f"--exhaustive: pictures are not searched with --in={args.sources}")
        options |= {"exhaustive": args.exhaustive, "sources": sources}
        answer = index.query(args.text, args.k, **options)
    if args.json:
        output.print_json(dataclasses.asdict(answer))
    else:
        output.print_answer(answer)
    if args.save_grid and answer.hits:
        title = args.text or os.path.basename(queries[0])
        output.draw_grid(picture, title, answer.hits, thumbnail=index.thumbnail)
        print(f"picture: {picture}", file=sys.stderr)
    if args.save_clips and answer.hits:
        clips.print_saved(*clips.save_clips(answer.hits, args.save_clips))
    if args.open and answer.hits:
        output.play(answer[0])


def run_clip(args: argparse.Namespace) -> None:
    """Writes a moment of a video to a new file: .mp4, .mkv, .mov or .webm.

    Without --reencode, packets are copied if a key frame is at most a second before --start.
    """
    clips.run_clip(args.video, args.start, args.end, args.output, reencode=args.reencode)


def run_serve(args: argparse.Namespace) -> None:
    """Serves a web page with a search box, results, a player and a heat map.

    Only files of the index are served. Other programs use the same server: see its page /docs.
    """
    if args.allow_add is not None:
        check_folder("--allow_add", args.allow_add)  # before the model is loaded
    token = os.environ.get("XCLIP_JAX_TOKEN") or None if args.token is None else args.token
    options = {"allow_hosts": args.allow_host, "token": token, "browse": args.open}
    options |= {"allow_add": args.allow_add, "dedupe": args.dedupe}
    show_log_times()
    open_listener(args.host, args.port).close()  # raises before the index is opened
    # Shards on a cluster are deleted also when a scheduler ends this process.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with _open_for_serving(args) as index:
        index.warm_up()
        serve(index, args.host, args.port, **options)
    if args.allow_add is not None:
        os._exit(0)  # Python would wait for the processes that read a film; they end with this one


def _open_for_serving(args: argparse.Namespace) -> contextlib.AbstractContextManager[Searcher]:
    """Opens an index in this process, or with its parts in processes of a Ray cluster."""
    if args.shards is None:
        if args.ray is not None:
            raise InputError("--ray requires --shards=N")
        index = Index.open(args.index, args.model, args.candidates, args.rerank)
        return contextlib.nullcontext(index)
    if args.allow_add is not None:
        raise InputError("--allow_add requires an index without --shards: add by search index")
    options: Any = {"model": args.model, "candidates": args.candidates, "rerank": args.rerank}
    print(f"starting {args.shards} shards of {args.index} on Ray", file=sys.stderr)
    return open_sharded(args.index, args.shards, address=args.ray, **options)


def run_mcp(args: argparse.Namespace) -> None:
    """Serves assistants that speak the Model Context Protocol, on stdin and stdout."""

    def open_index() -> Index:
        index = Index.open(args.index, args.model, args.candidates, args.rerank)
        index.warm_up()
        return index

    output = None if args.output is None else check_folder("--output", args.output)
    mcp_server.run(open_index, output)


def run_recall(args: argparse.Namespace) -> None:
    """Reports the recall and times of the funnel, compared with exhaustive search."""
    index = Index.open(args.index, args.model, args.candidates, args.rerank)
    lines = _read_lines(args.queries)[: args.sample] if args.queries else None
    result = output.measure_recall(index, lines or sample_sentences(args.sample))
    if args.json:
        output.print_json(result)
        return
    print(
        f"{result['sentences']:,} sentences, {result['segments']:,} segments, funnel "
        f"{result['candidates']:,} -> {result['rerank']:,}\n"
        f"exhaustive first result in the funnel's first ten:  {result['top_1']:5.1f} %\n"
        f"exhaustive first ten in the funnel's first ten:     {result['top_10']:5.1f} %\n"
        f"{'milliseconds':16}{'p50':>8}{'p95':>8}"
    )
    for stage, times in result["milliseconds"].items():
        print(f"{stage:16}{times['p50']:8.1f}{times['p95']:8.1f}")


def run_export(args: argparse.Namespace) -> None:
    """Writes the embeddings to a file for other programs, or an application of Vespa."""
    index = Index.open(args.index, args.model, args.candidates, args.rerank)
    if args.format == "vespa":
        vespa.export_application(index, args.output)
    else:
        output.export_segments(index, args.output)
    print(f"{args.output}: {index.num_segments:,} segments")


def _read_lines(path: str) -> list[str]:
    """Returns the non-empty lines of a text file."""
    lines = [line.strip() for line in read_text(Path(path)).splitlines() if not is_blank(line)]
    if not lines:
        raise InputError(f"{path}: contains no sentence")
    return lines


def _read_bank(path: str) -> list[str]:
    """Returns the captions of a text file with one a line."""
    if not Path(path).is_file():
        raise InputError(f"--bank={path}: must be a text file")
    return check_bank(read_text(Path(path)).splitlines(), f"--bank={path}")


def _add_server_options(add: Callable[..., Any]) -> None:
    """Adds the options of `serve`."""
    add("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    add("--port", type=int, default=7870, help="port to listen on (default 7870)")
    text = "another name of this machine by which browsers may call it; may be repeated"
    add("--allow_host", action="append", default=[], metavar="NAME", help=text)
    text = "secret of each request, or the environment variable XCLIP_JAX_TOKEN; default: a random "
    text += "one if other machines can reach the address"
    add("--token", help=text)
    text = "let everyone who can reach the address search and watch"
    add("--no_token", action="store_const", const="", dest="token", help=text)
    text = "accept videos from everyone who can search, save them in FOLDER and index them"
    add("--allow_add", metavar="FOLDER", help=text)
    add("--dedupe", action="store_true", help="fold near-duplicates into one result")
    text = "hold the segments in N processes of a Ray cluster (extra ray), default: in this one"
    add("--shards", type=int, metavar="N", help=text)
    text = "address of a running cluster, such as auto or ray://HOST:10001; default: a new one on "
    text += "this machine"
    add("--ray", metavar="ADDRESS", help=text)
    add("--open", action="store_true", help="open the page in the browser")


def _add_index(add: Callable[..., Any]) -> None:
    """Adds the options of `index`."""
    add("videos", nargs="+", metavar="VIDEOS", help="video files or folders of video files")
    add("--model", help="model or work directory; required for a new index")
    add("--ocr", action="store_true", help="read text on screen (extra ocr)")
    text = "transcribe speech by this model of faster-whisper, a folder or a name (extra asr)"
    add("--speech", metavar="MODEL", help=text)
    # The next five are fixed when the index is made; None: the default, or the index's value.
    add("--segment_seconds", type=int, help=f"seconds per segment (default {SEGMENT_SECONDS})")
    text = "seconds by which neighbouring segments overlap (default 0)"
    add("--overlap_seconds", type=int, help=text)
    add("--shots", action="store_true", default=None, help="cut at shot changes as well")
    text = "precision of the stored features (default float32)"
    add("--precision", choices=PRECISIONS, help=text)
    text = "file of captions that resemble queries, one a line, to compute hubness biases from"
    add("--bank", metavar="FILE", help=text)
    add("--prune", action="store_true", help="remove files that no longer exist in VIDEOS")
    text = "where files are read and encoded: local:N (processes), ray, ray://HOST:PORT, "
    text += "ray:ADDRESS, beam; all machines need the index, the model and VIDEOS at the same paths"
    add("--workers", metavar="WHERE", help=f"{text} (extra workers, ray or beam)")
    text = "as task I of a job array, counted from 0, add only its share of the files, 1 of N"
    add("--shard", metavar="I/N", help=text)
    text = "runner of Apache Beam with --workers=beam (default DirectRunner)"
    add("--beam_runner", help=text)
    add("--beam_options", default="", help="the runner's own flags, in one string")


def _add_query(add: Callable[..., Any]) -> None:
    """Adds the options of `query`."""
    add("text", nargs="?", help="the sentence")
    add("--video", help="find moments similar to this video")
    add("--image", help="find moments similar to this image")
    add("--captions", help="with --video: file of sentences to rank, one per line")
    add("-k", type=int, default=10, help="number of results (default 10)")
    add("--path", help="only files whose path contains this; * and ? as in a shell")
    add("--start", type=float, help="only segments after this second of their file")
    add("--end", type=float, help="only segments before this second of their file")
    text = f"comma-separated list of what to search, of {', '.join(SOURCES)} (default: all)"
    add("--in", dest="sources", help=text)
    add("--segments", action="store_true", help="one result per segment: do not merge moments")
    add("--dedupe", action="store_true", help="fold near-duplicates into the best of them")
    add("--exhaustive", action="store_true", help="score every segment by the full model")
    add("--json", action="store_true", help="print JSON")
    add("--open", action="store_true", help="play the first result (mpv, VLC or ffplay)")
    add("--save_grid", metavar="PNG", help="save a picture of the results")
    add("--save_clips", metavar="FOLDER", help="save the moment of each result as a video file")


def _add_clip(add: Callable[..., Any]) -> None:
    """Adds the options of `clip`."""
    add("video", metavar="VIDEO", help="the video file")
    text = "seconds after its first frame, or m:ss, or h:mm:ss"
    add("--start", required=True, help=f"start of the moment: {text}")
    add("--end", required=True, help=f"end of the moment: {text}")
    add("--output", required=True, help="the file to write; an existing one is replaced")
    text = "encode it: exact start, upright, square pixels, codecs that every player knows"
    add("--reencode", action="store_true", help=text)


def _make_parser() -> argparse.ArgumentParser:
    parser = CommandParser(prog="python -m xclip_jax.search", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add_command(
        run: Callable[..., None], *, opens_index: bool = True, opens_model: bool = True
    ) -> Callable[..., Any]:
        """Adds the command of a function `run_...`, returns the function that adds its options."""
        name, text = run.__name__.removeprefix("run_"), inspect.cleandoc(run.__doc__ or "")
        texts: Any = {"help": text.splitlines()[0], "description": text}
        command = commands.add_parser(name, allow_abbrev=True, **texts)
        command.set_defaults(run=run)
        add = command.add_argument
        if opens_index:
            add("--index", required=True, help="folder or bucket URI of the index")
        if not opens_model:
            return add
        add("--model", help="model directory, if it has moved since the index was made")
        add("--candidates", type=int, default=5000, help="segments scored by words (default 5000)")
        add("--rerank", type=int, default=200, help="segments scored by frames (default 200)")
        return add

    add = add_command(run_index, opens_model=False)
    _add_index(add)

    add = add_command(run_query)
    _add_query(add)
    _add_clip(add_command(run_clip, opens_index=False, opens_model=False))

    add = add_command(run_serve)
    _add_server_options(add)

    add = add_command(run_mcp)
    text = "folder for clips that assistants ask for; without it they write none"
    add("--output", metavar="FOLDER", help=text)

    add = add_command(run_recall)
    add("--sample", type=int, default=200, help="number of sentences (default 200)")
    add("--queries", help="text file, one sentence per line; default: sentences of common words")
    add("--json", action="store_true", help="print JSON")

    add = add_command(run_export)
    text = "the .parquet or .npz file to write, with --format=vespa a new folder"
    add("--output", required=True, help=text)
    text = "vespa: an application package with the three stages, and its feed (not tested in Vespa)"
    add("--format", choices=("vespa",), help=text)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    args = _make_parser().parse_args(argv)
    with one_line_errors():
        for name in ("candidates", "rerank", "k", "sample", "segment_seconds", "shards"):
            value = getattr(args, name, None)
            if value is not None and value < 1:
                option = "-k " if name == "k" else f"--{name}="
                raise InputError(f"{option}{value}: must be at least 1")
        args.run(args)


if __name__ == "__main__":
    run_command(main)
