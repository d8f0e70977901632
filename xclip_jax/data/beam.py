"""Reading frames on Apache Beam: many machines that see the same folders under the same paths."""

import dataclasses
import json

from xclip_jax.cli import InputError
from xclip_jax.data.extraction import Outcome, extract


def beam_pipeline(runner, options):
    """(runner, PipelineOptions) from the two flags of the command line.

    Args:
        runner: Beam's name of it, such as DirectRunner, DataflowRunner, FlinkRunner, SparkRunner.
        options: the runner's own flags in one text, such as "--project=p --region=r".

    Raises:
        InputError: Apache Beam is not installed, or knows no such runner.
    """
    try:
        from apache_beam.options.pipeline_options import PipelineOptions
        from apache_beam.runners import create_runner
    except ImportError:
        raise InputError(
            "--beam_runner needs Apache Beam: pip install -e '.[beam]' (docs/data.md)"
        ) from None
    try:
        create_runner(runner)
    except (ValueError, ImportError, AttributeError) as error:
        raise InputError(f"--beam_runner={runner}: {error}") from None
    return runner, PipelineOptions(options.split())


def extract_all_on_beam(jobs, folder, pipeline):
    """`extraction.extract` of every job, in order.

    Args:
        jobs: list of extraction.Job.
        folder: where the workers write what became of the jobs.
        pipeline: from `beam_pipeline`.
    """
    import apache_beam as beam

    prefix = folder / "outcomes"
    for old in folder.glob(f"{prefix.name}-*"):
        old.unlink()
    runner, options = pipeline
    try:
        with beam.Pipeline(runner=runner, options=options) as stages:
            (
                stages
                | beam.Create(list(enumerate(jobs)))
                | beam.Reshuffle()  # or the runner may take all jobs as one
                | beam.Map(_line)
                | beam.io.WriteToText(str(prefix))
            )
    except Exception as error:  # runners raise whatever they like
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"Apache Beam's {runner} failed: {reason}") from error
    lines = [json.loads(line) for path in folder.glob(f"{prefix.name}-*") for line in path.open()]
    outcomes = {number: Outcome(**outcome) for number, outcome in lines}
    return [outcomes[number] for number in range(len(jobs))]


def _line(numbered_job):
    number, job = numbered_job
    return json.dumps([number, dataclasses.asdict(extract(job))])
