"""A study's results as one table: what each row says, whatever it is written as."""

import dataclasses
import json

from xclip_jax.paper import backbone
from xclip_jax.report.table import DIRECTIONS
from xclip_jax.study.plan import RESULTS
from xclip_jax.study.statistics import METRICS, WAYS, Difference, Stat, compare, describe, values_of


@dataclasses.dataclass(frozen=True)
class Row:
    """A variant's results.

    Attributes:
        name: of the variant.
        labels: what stands in the table's first columns.
        stats: {direction: {metric: Stat}} over the seeds that are finished; {} where none is.
        differences: {direction: Difference} to the reference; {} for itself or where one lacks.
        seeds: {seed: None, or why there is no result}.
        paper: the paper's R@1 text to video, where the data are the paper's.
    """

    name: str
    labels: tuple[str, ...]
    stats: dict[str, dict[str, Stat]]
    differences: dict[str, Difference]
    seeds: dict[int, str | None]
    paper: float | None

    @property
    def missing(self):
        """{seed: why there is no result}."""
        return {seed: reason for seed, reason in self.seeds.items() if reason}

    @property
    def problem(self):
        """Why seeds are missing; "" if none is."""
        missing = self.missing
        if len(set(missing.values())) == 1 and len(missing) == len(self.seeds):
            return next(iter(missing.values()))
        return "; ".join(f"seed {seed} {reason}" for seed, reason in missing.items())


@dataclasses.dataclass(frozen=True)
class Table:
    """A study with its rows, and what its numbers are of (`facts`, a sentence)."""

    title: str
    columns: tuple[str, ...]
    rows: list[Row]
    reference: str
    lines: bool
    note: str
    facts: str


def make_table(study, runs):
    """The Table of a study.

    Args:
        runs: {variant: [Run of each seed]}.
    """
    found = {name: _finished(study.variants[name].option, r) for name, r in runs.items()}
    rows = [_row(study, name, runs[name], found) for name in study.variants]
    one = next(iter(runs.values()))[0]
    facts = _facts([run for of_seeds in runs.values() for run in of_seeds], one.config)
    return Table(study.title, study.columns, rows, study.reference, study.lines, study.note, facts)


def _finished(option, runs):
    """{seed: {direction: (2 x Q, video of each query or None)}} of the runs that are finished."""
    results = {run.config.seed: run.results() for run in runs}
    return {seed: _of_option(ranks, option) for seed, ranks in results.items() if ranks}


def _of_option(ranks, option):
    found = {}
    for name, counts in ranks.items():
        prefix, _, way = name.rpartition("/")
        if way in WAYS and (prefix.startswith(option) if option else not prefix):
            found[way] = counts, ranks["text_video"] if way == "text_to_video" else None
    return found


def _values(results, seeds, way, metric):
    counts, videos = zip(*(results[seed][way] for seed in seeds), strict=True)
    return values_of(counts, metric, videos[0])


def _row(study, name, runs, found):
    own, reference = found[name], found[study.reference]
    ways = [way for way in WAYS if own and all(way in both for both in own.values())]
    stats = {
        way: {metric: describe(_values(own, own, way, metric)) for metric in METRICS}
        for way in ways
    }
    common = [seed for seed in own if seed in reference and name != study.reference]
    differences = {
        way: compare(_values(own, common, way, "R@1"), _values(reference, common, way, "R@1"))
        for way in ways
        if common and all(way in reference[seed] for seed in common)
    }
    config = runs[0].config
    of_paper = (config.data.dataset, config.data.variant) == ("msrvtt", "9k")
    paper = study.variants[name].paper.get(backbone(config.model.vision)) if of_paper else None
    seeds = {run.config.seed: None if run.config.seed in own else _why_not(run) for run in runs}
    return Row(name, study.cells(name), stats, differences, seeds, paper)


def _why_not(run):
    reason = run.failure()
    return f"failed: {reason}" if reason else "not run yet"


def _facts(runs, config):
    """What the numbers are of, with the note of the results, such as of an evaluation on training
    clips; the config's name alone where no run is finished."""
    for run in runs:
        if run.results() is not None:
            results = json.loads((run.workdir / RESULTS).read_text())
            texts, videos = f"{results['num_texts']:,}", f"{results['num_videos']:,}"
            note = f" ({results['note']})" if "note" in results else ""
            return f"{config.name}, {results['split']} split, {texts} texts, {videos} videos{note}"
    return config.name


def best(table):
    """{(direction, metric): the best mean as it is printed} over the rows."""
    found = {}
    for way, _ in DIRECTIONS:
        for metric in METRICS:
            means = [
                round(row.stats[way][metric].mean, 1) for row in table.rows if way in row.stats
            ]
            if means:
                found[way, metric] = min(means) if metric == "MnR" else max(means)
    return found


def as_json(table):
    """The table as JSON text, for `from_json`."""
    return json.dumps(dataclasses.asdict(table), indent=1, ensure_ascii=False)


def from_json(text):
    """The Table that `as_json` wrote."""
    plain = json.loads(text)
    rows = [
        Row(
            row["name"],
            tuple(row["labels"]),
            {w: {m: Stat(**s) for m, s in stats.items()} for w, stats in row["stats"].items()},
            {way: Difference(**both) for way, both in row["differences"].items()},
            {int(seed): reason for seed, reason in row["seeds"].items()},
            row["paper"],
        )
        for row in plain["rows"]
    ]
    return Table(**{**plain, "columns": tuple(plain["columns"]), "rows": rows})
