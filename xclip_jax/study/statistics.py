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
        low, high: ends of a 95 % interval of the mean by resampling the test videos with their
            queries: how much another test set of the same kind would change it. Other seeds are
            not in it.
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


def values_of(counts_SxCxQ, metric, video_Q=None):
    """S x V: a metric of each test video, of `rank_counts` of S seeds; their mean is the metric.

    Args:
        video_Q: the video of each query; None: each query is of a video of its own. A video with
            several captions counts as one draw: its captions are not independent of each other.
            Its value is the mean of all queries plus its share of their deviations (the linearised
            ratio of sums, Cochran, Sampling Techniques, 1977, Sec. 6).
    """
    better_SxQ, equal_SxQ = np.moveaxis(np.asarray(counts_SxCxQ), 1, 0)
    if metric == "MnR":
        values_SxQ = expected_ranks(better_SxQ, equal_SxQ)
    else:
        values_SxQ = recall(better_SxQ, equal_SxQ, int(metric.removeprefix("R@")))
    if video_Q is None:
        return values_SxQ
    mean_Sx1 = values_SxQ.mean(1, keepdims=True)
    deviations = [np.bincount(video_Q, values_Q) for values_Q in values_SxQ - mean_Sx1]
    return mean_Sx1 + np.array(deviations) * (video_Q.max() + 1) / len(video_Q)


def describe(values_SxV):
    """The Stat of a metric of each seed and test video."""
    of_seeds_S, of_videos_V = values_SxV.mean(1), values_SxV.mean(0)
    interval = stats.bootstrap(
        (of_videos_V,), np.mean, n_resamples=RESAMPLES, batch=100, method="percentile", rng=0
    ).confidence_interval
    std = float(of_seeds_S.std(ddof=1)) if len(of_seeds_S) > 1 else None
    ends = float(interval.low), float(interval.high)
    return Stat(float(of_seeds_S.mean()), std, *ends, of_seeds_S.tolist())


def compare(values_SxV, reference_SxV):
    """The Difference of two variants tried with the same seeds and test videos.

    Its variance is that of the mean over videos plus that of the mean over seeds, its interval
    Student's, with the degrees of freedom by Satterthwaite (1946), https://doi.org/10.2307/3002019.
    With one seed the interval knows of videos alone.
    """
    difference_SxV = values_SxV - reference_SxV
    means = difference_SxV.mean(0), difference_SxV.mean(1)  # of videos, of seeds
    parts = [x.var(ddof=1) / len(x) if len(x) > 1 else 0.0 for x in means]
    mean, variance = float(difference_SxV.mean()), sum(parts)
    if not variance:
        return Difference(mean, mean, mean)
    freedom = variance**2 / sum(
        v**2 / max(len(x) - 1, 1) for v, x in zip(parts, means, strict=True)
    )
    half = float(stats.t.ppf(0.975, freedom) * np.sqrt(variance))
    return Difference(mean, mean - half, mean + half)
