"""Computes the results of a study as a table of means and intervals."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float, Int
from scipy import stats

from xclip_jax.metrics import expected_ranks, recall
from xclip_jax.paper import backbone
from xclip_jax.report import DIRECTIONS
from xclip_jax.study import Study
from xclip_jax.study.runs import RESULTS, Run

Metric = Literal["R@1", "R@5", "R@10", "MnR"]
STUDY_METRICS: tuple[Metric, ...] = get_args(Metric)
RESAMPLES = 2000
# {direction: {metric: {seed: V values, see metric_values}}} of a variant's finished runs.
Values = dict[str, dict[Metric, dict[int, np.ndarray]]]


@dataclasses.dataclass(frozen=True)
class Stat:
    """A metric of a variant, with a 95 % interval of its mean.

    The interval comes from resampling the test videos with their queries. It shows the spread over
    similar test sets, not over seeds.
    """

    mean: float  # over seeds
    std: float | None  # standard deviation over seeds (n - 1); None with one seed
    low: float
    high: float
    seeds: list[float]  # the metric of each seed


@dataclasses.dataclass(frozen=True)
class Difference:
    """A variant's R@1 minus the reference's, with a 95 % interval."""

    mean: float
    low: float
    high: float


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
    def problem(self) -> str:
        """Reasons why seeds have no results, or ""."""
        missing = {seed: reason for seed, reason in self.seeds.items() if reason}
        if len(set(missing.values())) == 1 and len(missing) == len(self.seeds):
            return next(iter(missing.values()))
        return "; ".join(f"seed {seed} {reason}" for seed, reason in missing.items())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """The rows of a study, and `facts`, a sentence on the test data."""

    title: str
    columns: tuple[str, ...]
    rows: list[Row]
    reference: str
    lines: bool
    note: str
    facts: str

    @property
    def has_paper(self) -> bool:
        """True if any row has a number from the paper."""
        return any(row.paper is not None for row in self.rows)


def make_table(study: Study, runs: Mapping[str, Sequence[Run]]) -> Table:
    """Returns the Table of a study with the runs of each variant."""
    values = {name: _load_values(runs[name], study.variants[name].option) for name in runs}
    return Table(
        title=study.title,
        columns=study.columns,
        rows=[_make_row(study, name, runs[name], values) for name in study.variants],
        reference=study.reference,
        lines=study.lines,
        note=study.note,
        facts=_describe_data([run for of_variant in runs.values() for run in of_variant]),
    )


def _load_values(runs: Sequence[Run], option: str) -> Values:
    """Returns the values of the finished runs, with a test-time option ("": without)."""
    values: Values = {way: {metric: {} for metric in STUDY_METRICS} for way in DIRECTIONS}
    for run in runs:
        ranks = run.load_ranks() or {}
        for name, counts_2xQ in ranks.items():
            prefix, _, way = name.rpartition("/")  # "", "dual softmax" or "QB-Norm (9 captions)"
            if way in DIRECTIONS and prefix.partition(" (")[0] == option:
                video_Q = ranks["text_video"] if way == "text_to_video" else None
                for metric, by_seed in values[way].items():
                    by_seed[run.config.seed] = metric_values(counts_2xQ[None], metric, video_Q)[0]
    return values


def _make_row(study: Study, name: str, runs: Sequence[Run], values: Mapping[str, Values]) -> Row:
    row_stats, differences = {}, {}
    for way, by_metric in values[name].items():
        finished, reference = by_metric["R@1"], values[study.reference][way]["R@1"]
        if finished:
            arrays = {
                metric: np.stack([*by_seed.values()]) for metric, by_seed in by_metric.items()
            }
            row_stats[way] = {metric: estimate_metric(array) for metric, array in arrays.items()}
        common = [seed for seed in finished if seed in reference]
        if common and name != study.reference:
            pair = (np.stack([of[seed] for seed in common]) for of in (finished, reference))
            differences[way] = estimate_difference(*pair)
    finished, config = values[name]["text_to_video"]["R@1"], runs[0].config
    is_paper_data = (config.data.dataset, config.data.variant) == ("msrvtt", "9k")
    paper = study.variants[name].paper.get(backbone(config.model.vision))
    return Row(
        name=name,
        labels=study.labels(name),
        stats=row_stats,
        differences=differences,
        seeds={r.config.seed: None if r.config.seed in finished else r.why_missing() for r in runs},
        paper=paper if is_paper_data else None,
    )


def _describe_data(runs: Sequence[Run]) -> str:
    """Returns the config's name, with split, sizes and note of the first finished run."""
    name = runs[0].config.name
    for run in runs:
        if run.load_ranks() is not None:
            results = json.loads((run.workdir / RESULTS).read_text())
            texts, videos = f"{results['num_texts']:,}", f"{results['num_videos']:,}"
            note = f" ({results['note']})" if "note" in results else ""
            return f"{name}, {results['split']} split, {texts} texts, {videos} videos{note}"
    return name


def metric_values(
    counts_Sx2xQ: Int[np.ndarray, "S 2 Q"],
    metric: Metric,
    video_Q: Int[np.ndarray, " Q"] | None = None,
) -> Float[np.ndarray, "S V"]:
    """Returns a metric of every seed and test video, whose mean over videos is the metric.

    Args:
        counts_Sx2xQ: `rank_counts` of S seeds.
        metric: its name.
        video_Q: video of each query, or None if every query has its own. A video with several
            captions is one sample, since its captions are not independent. Its value is the mean
            over all queries plus the video's share of their deviations (the linearised ratio of
            sums, Cochran, Sampling Techniques, 1977, Sec. 6).
    """
    better_SxQ, equal_SxQ = np.moveaxis(counts_Sx2xQ, 1, 0)
    if metric == "MnR":
        values_SxQ = expected_ranks(better_SxQ, equal_SxQ)
    else:
        values_SxQ = recall(better_SxQ, equal_SxQ, int(metric.removeprefix("R@")))
    if video_Q is None:
        return values_SxQ
    mean_Sx1 = values_SxQ.mean(1, keepdims=True)
    deviations = [np.bincount(video_Q, values_Q) for values_Q in values_SxQ - mean_Sx1]
    return mean_Sx1 + np.array(deviations) * (video_Q.max() + 1) / len(video_Q)


def estimate_metric(values_SxV: Float[np.ndarray, "S V"]) -> Stat:
    """Returns the Stat of a metric of every seed and test video."""
    seeds_S, videos_V = values_SxV.mean(1), values_SxV.mean(0)
    interval = stats.bootstrap(
        (videos_V,), np.mean, n_resamples=RESAMPLES, batch=100, method="percentile", rng=0
    ).confidence_interval
    std = float(seeds_S.std(ddof=1)) if len(seeds_S) > 1 else None
    low, high = map(float, interval)
    return Stat(float(seeds_S.mean()), std, low, high, seeds_S.tolist())


def estimate_difference(
    values_SxV: Float[np.ndarray, "S V"], reference_SxV: Float[np.ndarray, "S V"]
) -> Difference:
    """Returns the Difference of two variants with the same seeds and test videos.

    Its variance is that of the mean over videos plus that of the mean over seeds. The interval is
    Student's, with the degrees of freedom of Satterthwaite (1946), https://doi.org/10.2307/3002019.
    With one seed the interval covers the choice of videos alone.
    """
    difference_SxV = values_SxV - reference_SxV
    means = difference_SxV.mean(0), difference_SxV.mean(1)  # of videos, of seeds
    variances = [x.var(ddof=1) / len(x) if len(x) > 1 else 0.0 for x in means]
    mean, variance = float(difference_SxV.mean()), sum(variances)
    if not variance:
        return Difference(mean, mean, mean)
    freedom = variance**2 / sum(
        v**2 / max(len(x) - 1, 1) for v, x in zip(variances, means, strict=True)
    )
    half_width = float(stats.t.ppf(0.975, freedom) * np.sqrt(variance))
    return Difference(mean, mean - half_width, mean + half_width)


def table_to_json(table: Table) -> str:
    """Returns a table as JSON, to be read by `table_from_json`."""
    return json.dumps(dataclasses.asdict(table), indent=1, ensure_ascii=False)


def table_from_json(text: str) -> Table:
    """Returns the Table that `table_to_json` wrote."""
    plain = json.loads(text)
    rows = []
    for row in plain["rows"]:
        row["labels"] = tuple(row["labels"])
        row["stats"] = {w: {m: Stat(**s) for m, s in of.items()} for w, of in row["stats"].items()}
        row["differences"] = {w: Difference(**d) for w, d in row["differences"].items()}
        row["seeds"] = {int(seed): reason for seed, reason in row["seeds"].items()}
        rows.append(Row(**row))
    return Table(**{**plain, "columns": tuple(plain["columns"]), "rows": rows})
