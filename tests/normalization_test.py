"""Tests of dual softmax and QB-Norm against their definitions."""

import numpy as np
import pytest

from xclip_jax.metrics import dual_softmax, qb_norm


def test_dual_softmax_matches_values_by_hand():
    scores_QxG = np.log([[2.0, 6.0], [1.0, 2.0]])
    expected = scores_QxG * [[2 / 3, 6 / 8], [1 / 3, 2 / 8]]  # each column adds up to 1
    np.testing.assert_allclose(dual_softmax(scores_QxG), expected)


def test_dual_softmax_of_one_query_and_of_large_logits():
    scores = np.array([[3.0, 5.0, 1.0]])
    np.testing.assert_allclose(dual_softmax(scores), scores)
    assert np.isfinite(dual_softmax(np.array([[900.0, 1.0], [1.0, 900.0]]))).all()


def test_dual_softmax_resolves_competing_queries():
    scores_QxG = np.array([[30.0, 28.0], [29.0, 20.0]])  # both prefer item 0
    assert scores_QxG.argmax(1).tolist() == [0, 0]
    scores_QxG = np.array([[30.0, 29.5], [33.0, 20.0]])  # item 0 goes to the second query
    assert dual_softmax(scores_QxG).argmax(1).tolist() == [1, 0]


def test_qb_norm_matches_values_by_hand():
    """Makes item 0 the bank's only hub. Only query 0 has it first and is normalised."""
    bank_BxG = np.array([[0.9, 0.1, 0.2], [0.8, 0.3, 0.1]])
    scores_QxG = np.array([[0.6, 0.5, 0.1], [0.2, 0.5, 0.4]])
    beta = 2.0
    found = qb_norm(scores_QxG, bank_BxG, beta)
    inverted = np.exp(beta * scores_QxG[0]) / np.exp(beta * bank_BxG).sum(0)
    np.testing.assert_allclose(np.exp(found[0]), inverted)
    assert found[0].argmax() == 1  # the hub is no longer first
    np.testing.assert_array_equal(found[1], scores_QxG[1])


@pytest.mark.parametrize("shift", [0.0, 5.0])
def test_qb_norm_ignores_offsets_of_an_item(shift):
    """Adds an offset to an item's scores with bank and queries."""
    rng = np.random.default_rng(0)
    bank_BxG, scores_QxG = rng.normal(size=(50, 6)), rng.normal(size=(20, 6))
    added = np.array([shift, 0, 0, 0, 0, 0])
    found = qb_norm(scores_QxG + added, bank_BxG + added, 1.0)
    normalised = scores_QxG - np.log(np.exp(bank_BxG).sum(0))
    hub = (scores_QxG + added).argmax(1) == 0
    assert hub.any()
    np.testing.assert_array_equal(found[hub].argsort(1), normalised[hub].argsort(1))
