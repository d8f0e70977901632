"""A study's results as a table, independent of its file format."""

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from xclip_jax.paper import backbone
from xclip_jax.report.page import DIRECTIONS
from xclip_jax.study import Study
from xclip_jax.study.runs import RESULTS, Run
from xclip_jax.study.statistics import (
    STUDY_METRICS,
    Difference,
    Metric,
    Stat,
    estimate_difference,
    estimate_metric,
    metric_values,
)

# {seed: {direction: (2 x Q rank counts, video of each query or None)}} of finished runs.
Counts = dict[int, dict[str, tuple[np.ndarray, np.ndarray | None]]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A variant's results."""

    name: str
    labels: tuple[str, ...]  # texts of the first columns
    stats: dict[str, dict[Metric, Stat]]  # by direction, over the finished seeds
    differences: dict[str, Difference]  # by direction, over the seeds shared with the reference
    seeds: dict[int, str | None]  # None, or why a seed has no result
    paper: float | None  # R@1 text to video in the paper, on the paper's data only

    @property
    def num_finished(self) -> int:
        """Number of seeds with results."""
        return sum(reason is None for reason in self.seeds.values())

    @property
    def problem(self) -> str:
        """Reasons why seeds have no results, or ""."""
        missing = {seed: reason for seed, reason in self.seeds.items() if reason}
        if len(set(missing.values())) == 1 and len(missing) == len(self.seeds):
            return next(iter(missing.values()))
        return "; ".join(f"seed {seed} {reason}" for seed, reason in missing.items())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """A study with its rows and `facts`, a sentence on the test data."""

    title: str
    columns: tuple[str, ...]
    rows: list[Row]
    reference: str
    lines: bool
    note: str
    facts: str

    @property
    def has_paper(self) -> bool:
        """True if a row has a number of the paper."""
        return any(row.paper is not None for row in self.rows)

    @functools.cached_property
    def best_means(self) -> dict[tuple[str, Metric], float]:
        """The best mean over the rows, as printed, by (direction, metric)."""
        best = {}
        for way in DIRECTIONS:
            for metric in STUDY_METRICS:
                rows = [row.stats[way][metric] for row in self.rows if way in row.stats]
                means = [round(stat.mean, 1) for stat in rows]
                if means:
                    best[way, metric] = min(means) if metric == "MnR" else max(means)
        return best


def make_table(study: Study, runs: Mapping[str, Sequence[Run]]) -> Table:
    """Returns the Table of a study with the runs of each variant."""
    counts = {name: _load_counts(study.variants[name].option, runs[name]) for name in runs}
    every_run = [run for of_variant in runs.values() for run in of_variant]
    return Table(
        title=study.title,
        columns=study.columns,
        rows=[_make_row(study, name, runs[name], counts) for name in study.variants],
        reference=study.reference,
        lines=study.lines,
        note=study.note,
        facts=_describe_data(every_run, every_run[0].config),
    )


def _load_counts(option: str, runs: Sequence[Run]) -> Counts:
    """Returns the rank counts of the finished runs, with a test-time option or without ("")."""
    counts = {}
    for run in runs:
        ranks = run.load_ranks()
        if ranks is None:
            continue
        counts[run.config.seed] = ways = {}
        for name, array in ranks.items():
            prefix, _, way = name.rpartition("/")
            if way in DIRECTIONS and (prefix.startswith(option) if option else not prefix):
                ways[way] = array, ranks["text_video"] if way == "text_to_video" else None
    return counts


def _values(counts: Counts, seeds: Sequence[int], way: str, metric: Metric) -> np.ndarray:
    arrays, videos = zip(*(counts[seed][way] for seed in seeds), strict=True)
    return metric_values(np.stack(arrays), metric, videos[0])


def _make_row(study: Study, name: str, runs: Sequence[Run], counts: Mapping[str, Counts]) -> Row:
    finished, reference = counts[name], counts[study.reference]
    ways = [
        way for way in DIRECTIONS if finished and all(way in both for both in finished.values())
    ]
    common = [seed for seed in finished if seed in reference and name != study.reference]
    config, by_seed = runs[0].config, {run.config.seed: run for run in runs}
    is_paper_data = (config.data.dataset, config.data.variant) == ("msrvtt", "9k")
    paper = study.variants[name].paper.get(backbone(config.model.vision))
    return Row(
        name=name,
        labels=study.labels(name),
        stats={
            way: {
                m: estimate_metric(_values(finished, list(finished), way, m)) for m in STUDY_METRICS
            }
            for way in ways
        },
        differences={
            way: estimate_difference(
                _values(finished, common, way, "R@1"), _values(reference, common, way, "R@1")
            )
            for way in ways
            if common and all(way in reference[seed] for seed in common)
        },
        seeds={s: None if s in finished else run.why_missing() for s, run in by_seed.items()},
        paper=paper if is_paper_data else None,
    )


def _describe_data(runs: Sequence[Run], config: Any) -> str:
    """Returns the config's name, with split, sizes and note of the first finished run."""
    for run in runs:
        if run.load_ranks() is not None:
            results = json.loads((run.workdir / RESULTS).read_text())
            texts, videos = f"{results['num_texts']:,}", f"{results['num_videos']:,}"
            note = f" ({results['note']})" if "note" in results else ""
            return f"{config.name}, {results['split']} split, {texts} texts, {videos} videos{note}"
    return config.name


def table_to_json(table: Table) -> str:
    """Returns a table as JSON, to be read by `table_from_json`."""
    return json.dumps(dataclasses.asdict(table), indent=1, ensure_ascii=False)


def table_from_json(text: str) -> Table:
    """Returns the Table that `table_to_json` wrote."""
    plain = json.loads(text)
    rows = [
        Row(
            name=row["name"],
            labels=tuple(row["labels"]),
            stats={w: {m: Stat(**s) for m, s in of.items()} for w, of in row["stats"].items()},
            differences={w: Difference(**d) for w, d in row["differences"].items()},
            seeds={int(seed): reason for seed, reason in row["seeds"].items()},
            paper=row["paper"],
        )
        for row in plain["rows"]
    ]
    return Table(**{**plain, "columns": tuple(plain["columns"]), "rows": rows})
