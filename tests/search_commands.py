"""Parses commands of the search in files for launching."""

import pytest

from xclip_jax.search.__main__ import _make_parser

# Options of workers and shards, which a version of the search may lack.
WORKERS_AND_SHARDS = {"index": {"--workers"}, "serve": {"--shards", "--ray"}}


def search_command(words):
    """Returns the values of a command of the search, parsed as the program parses them."""
    assert words[1:3] == ["-m", "xclip_jax.search"]
    parser = _make_parser()
    [commands] = [a for a in parser._actions if a.dest == "command"]
    known = commands.choices[words[3]]._option_string_actions
    used = {word.partition("=")[0] for word in words}
    if missing := sorted((WORKERS_AND_SHARDS[words[3]] & used) - set(known)):
        pytest.skip(f"this version of the search has no {missing[0]}")
    return parser.parse_args(words[3:])
