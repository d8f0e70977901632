"""Means, spread over seeds, and intervals of metrics and of their differences."""

import dataclasses
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float, Int
from scipy import stats

from xclip_jax.metrics import expected_ranks, recall

Metric = Literal["R@1", "R@5", "R@10", "MnR"]
STUDY_METRICS: tuple[Metric, ...] = get_args(Metric)
RESAMPLES = 2000


@dataclasses.dataclass(frozen=True)
class Stat:
    """A metric of a variant.

    Attributes:
        mean: over seeds.
        std: standard deviation over seeds (n - 1); None with one seed.
        low, high: ends of a 95 % interval of the mean by resampling the test videos with their
            queries. It shows the spread over similar test sets, not over seeds.
        seeds: the metric of each seed.
    """

    mean: float
    std: float | None
    low: float
    high: float
    seeds: list[float]


@dataclasses.dataclass(frozen=True)
class Difference:
    """A variant's R@1 minus the reference's, with a 95 % interval."""

    mean: float
    low: float
    high: float


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
            captions is one draw, since its captions are not independent. Its value is the mean over
            all queries plus the video's share of their deviations (the linearised ratio of sums,
            Cochran, Sampling Techniques, 1977, Sec. 6).
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
    low, high = float(interval.low), float(interval.high)
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
