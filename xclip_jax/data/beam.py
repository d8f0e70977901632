"""Runs work with Apache Beam, on machines that share folders under the same paths."""
# pyright: reportMissingImports=false, reportUnusedExpression=false

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from xclip_jax.cli import InputError

BeamRunner = tuple[str, Any]  # (name, PipelineOptions)


def parse_beam_flags(name: str, options: str) -> BeamRunner:
    """Returns (runner, PipelineOptions) from the two flags of the command line.

    Args:
        name: Beam's name, such as DirectRunner, DataflowRunner, FlinkRunner, SparkRunner.
        options: the runner's own flags in one string, such as "--project=p --region=r".

    Raises:
        InputError: Apache Beam is not installed, or the runner is unknown.
    """
    try:
        from apache_beam.options.pipeline_options import PipelineOptions
        from apache_beam.runners import create_runner
    except ImportError:
        raise InputError(
            "--beam_runner requires Apache Beam: pip install -e '.[beam]' (docs/data.md)"
        ) from None
    try:
        create_runner(name)
    except (ValueError, ImportError, AttributeError) as error:
        raise InputError(f"--beam_runner={name}: {error}") from None
    return name, PipelineOptions(options.split())


def map_on_beam(
    function: Callable[[Any], Any], items: Sequence[Any], folder: Path, beam_runner: BeamRunner
) -> list[Any]:
    """Returns function(item) for every item in order, computed on Apache Beam.

    Args:
        function: returns a JSON value; function and items are pickled.
        items: any number of items.
        folder: shared folder where the workers write their results for this process.
        beam_runner: from `parse_beam_flags`.

    Raises:
        InputError: the runner failed.
    """
    import apache_beam as beam

    prefix = folder / "beam_results"
    for old in folder.glob(f"{prefix.name}-*"):
        old.unlink()
    runner, options = beam_runner
    try:
        with beam.Pipeline(runner=runner, options=options) as stages:
            (
                stages
                | beam.Create(list(enumerate(items)))
                | beam.Reshuffle()  # otherwise the runner may fuse all items into one bundle
                | beam.Map(functools.partial(_result_line, function))
                | beam.io.WriteToText(str(prefix))
            )
    except Exception as error:  # runners may raise any exception
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"Apache Beam's {runner} failed: {reason}") from error
    results = {}
    for path in folder.glob(f"{prefix.name}-*"):
        results.update(map(json.loads, path.read_text().splitlines()))
        path.unlink()
    return [results[index] for index in range(len(items))]


def _result_line(function: Callable[[Any], Any], numbered_item: tuple[int, Any]) -> str:
    index, item = numbered_item
    return json.dumps([index, function(item)])
