"""Test-time normalisation of similarities. Off by default, and printed beside the raw numbers.

Both use more than the query and the gallery: their numbers are not those of a search for one query
at a time.
"""

import numpy as np
from scipy.special import log_softmax, logsumexp


def dual_softmax(scores_QxG):
    """Scores times their softmax over the queries.

    Dual Softmax at inference: CAMoE, Cheng et al., 2021, https://arxiv.org/abs/2109.04290.
    Assumes that all queries are known at once and that each gallery item is wanted by about one of
    them, as in a benchmark and not in a search engine.

    Args:
        scores_QxG: scaled similarities (logits) of every query with every gallery item.

    Returns:
        Q x G float64.
    """
    scores_QxG = np.asarray(scores_QxG, np.float64)
    return scores_QxG * np.exp(log_softmax(scores_QxG, axis=0))


def qb_norm(scores_QxG, bank_BxG, beta=20.0):
    """Querybank normalisation with the dynamic inverted softmax.

    QB-Norm, Bogolin et al., CVPR 2022, https://arxiv.org/abs/2112.12777. The queries whose
    best gallery item is also the best one of a query of the bank (an item that attracts many: a
    hub) are ranked by exp(beta s) / sum over the bank of exp(beta s), the others as they are.
    Assumes a bank of queries like those to come; needs neither other test queries nor pairs.

    Args:
        scores_QxG: similarities (cosines) of every query with every gallery item.
        bank_BxG: the same of the bank's queries, such as captions of the training split.
        beta: inverse temperature; the paper's 20 is for cosines.

    Returns:
        Q x G float64; only the order within a row means anything (rows are logarithms or raw).
    """
    scores_QxG = np.asarray(scores_QxG, np.float64)
    bank_BxG = np.asarray(bank_BxG, np.float64)
    hubs = np.unique(bank_BxG.argmax(1))
    near_hub_Q = np.isin(scores_QxG.argmax(1), hubs)
    normalised_QxG = beta * scores_QxG - logsumexp(beta * bank_BxG, axis=0)
    return np.where(near_hub_Q[:, None], normalised_QxG, scores_QxG)
