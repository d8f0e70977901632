"""What a table says of its rows: means, their spread over seeds, intervals, differences."""

import dataclasses

import numpy as np
from scipy import stats

from xclip_jax.metrics import expected_ranks, recall

WAYS = ("text_to_video", "video_to_text")
METRICS = ("R@1", "R@5", "R@10", "MnR")
RESAMPLES = 2000


@dataclasses.dataclass(frozen=True)
class Stat:
    """A metric of a variant.

    Attributes:
        mean: over seeds.
        std: its standard deviation over seeds (n - 1); None where there is one seed.
        low, high: ends of a 95 % interval of the mean by resampling the queries: how much another
            test set of the same kind would change it. Other seeds are not in it.
        seeds: the metric of each seed.
    """

    mean: float
    std: float | None
    low: float
    high: float
    seeds: list[float]


@dataclasses.dataclass(frozen=True)
class Difference:
    """By how much a variant's R@1 is above the reference's, with a 95 % interval."""

    mean: float
    low: float
    high: float


def values_of(counts_SxCxQ, metric):
    """S x Q: a metric of each query alone, of `rank_counts` of S seeds."""
    better_SxQ, equal_SxQ = np.moveaxis(np.asarray(counts_SxCxQ), 1, 0)
    if metric == "MnR":
        return expected_ranks(better_SxQ, equal_SxQ)
    return recall(better_SxQ, equal_SxQ, int(metric.removeprefix("R@")))


def describe(values_SxQ):
    """The Stat of a metric of each seed and query."""
    of_seeds_S, of_queries_Q = values_SxQ.mean(1), values_SxQ.mean(0)
    interval = stats.bootstrap(
        (of_queries_Q,), np.mean, n_resamples=RESAMPLES, batch=100, method="percentile", rng=0
    ).confidence_interval
    std = float(of_seeds_S.std(ddof=1)) if len(of_seeds_S) > 1 else None
    ends = float(interval.low), float(interval.high)
    return Stat(float(of_seeds_S.mean()), std, *ends, of_seeds_S.tolist())


def compare(values_SxQ, reference_SxQ):
    """The Difference of two variants tried with the same seeds and queries.

    Its variance is that of the mean over queries plus that of the mean over seeds, its interval
    Student's, with the degrees of freedom by Satterthwaite (1946), https://doi.org/10.2307/3002019.
    With one seed the interval knows of queries alone.
    """
    difference_SxQ = values_SxQ - reference_SxQ
    means = difference_SxQ.mean(0), difference_SxQ.mean(1)  # of queries, of seeds
    parts = [x.var(ddof=1) / len(x) if len(x) > 1 else 0.0 for x in means]
    mean, variance = float(difference_SxQ.mean()), sum(parts)
    if not variance:
        return Difference(mean, mean, mean)
    freedom = variance**2 / sum(
        v**2 / max(len(x) - 1, 1) for v, x in zip(parts, means, strict=True)
    )
    half = float(stats.t.ppf(0.975, freedom) * np.sqrt(variance))
    return Difference(mean, mean - half, mean + half)
