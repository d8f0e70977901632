"""Tests of dual softmax, QB-Norm and the hubness bias against their definitions."""

import numpy as np
import pytest

from xclip_jax.metrics import dual_softmax, hubness_bias, qb_norm, subtract_hubness_bias


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


def test_hubness_bias_matches_values_by_hand():
    bank_BxG = np.log([[1.0, 2.0], [3.0, 2.0]])
    np.testing.assert_allclose(hubness_bias(bank_BxG, beta=1.0), np.log([2, 2]))
    expected = [np.log((1**2 + 3**2) / 2) / 2, np.log((2**2 + 2**2) / 2) / 2]
    np.testing.assert_allclose(hubness_bias(bank_BxG, beta=2.0), expected)


def test_hubness_bias_lies_between_mean_and_maximum_of_the_bank():
    bank_BxG = np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32)
    bias_G = hubness_bias(bank_BxG)
    assert bias_G.dtype == np.float64
    assert (bank_BxG.mean(0) < bias_G).all()
    assert (bias_G < bank_BxG.max(0)).all()
    np.testing.assert_allclose(hubness_bias(bank_BxG, beta=1e-6), bank_BxG.mean(0), atol=1e-5)
    np.testing.assert_allclose(hubness_bias(bank_BxG, beta=1e6), bank_BxG.max(0), atol=1e-5)


def test_hub_is_demoted():
    """Makes item 0 similar to every caption of the bank: another item is right for both queries."""
    bank_BxG = np.array([[0.9, 0.1, 0.2], [0.8, 0.3, 0.1], [0.9, 0.2, 0.3]])
    scores_QxG = np.array([[0.6, 0.5, 0.1], [0.6, 0.1, 0.4]])
    assert scores_QxG.argmax(1).tolist() == [0, 0]
    assert subtract_hubness_bias(scores_QxG, bank_BxG).argmax(1).tolist() == [1, 2]


def test_bank_without_hubs_changes_no_rank():
    scores_QxG = np.random.default_rng(0).normal(size=(20, 4))
    bank_BxG = np.array([[0.9, 0.1, 0.2, 0.4], [0.1, 0.9, 0.4, 0.2]])
    bank_BxG = np.concatenate([bank_BxG, bank_BxG[:, ::-1], bank_BxG[:, [1, 0, 3, 2]]])
    even_BxG = np.concatenate([np.roll(bank_BxG, shift, 1) for shift in range(4)])
    found = subtract_hubness_bias(scores_QxG, even_BxG)
    np.testing.assert_array_equal(found.argsort(1), scores_QxG.argsort(1))
    np.testing.assert_allclose(np.diff(scores_QxG - found, axis=1), 0, atol=1e-12)


def test_hubness_bias_ignores_a_shift_of_the_bank_and_the_order_of_captions():
    rng = np.random.default_rng(0)
    bank_BxG, scores_QxG = rng.normal(size=(50, 6)), rng.normal(size=(20, 6))
    expected = subtract_hubness_bias(scores_QxG, bank_BxG)
    shifted = subtract_hubness_bias(scores_QxG, bank_BxG + 3)
    np.testing.assert_allclose(shifted, expected - 3)
    np.testing.assert_array_equal(shifted.argsort(1), expected.argsort(1))
    permuted = subtract_hubness_bias(scores_QxG, rng.permutation(bank_BxG))
    np.testing.assert_allclose(permuted, expected)
    np.testing.assert_allclose(hubness_bias(np.tile(bank_BxG, (3, 1))), hubness_bias(bank_BxG))


def test_hubness_bias_ranks_a_query_independently_of_the_others():
    rng = np.random.default_rng(0)
    bank_BxG, scores_QxG = rng.normal(size=(50, 6)), rng.normal(size=(20, 6))
    together = subtract_hubness_bias(scores_QxG, bank_BxG)
    for query, expected in zip(scores_QxG, together, strict=True):
        np.testing.assert_array_equal(subtract_hubness_bias(query[None], bank_BxG)[0], expected)


def test_hubness_bias_ranks_queries_near_a_hub_as_qb_norm():
    rng = np.random.default_rng(0)
    bank_BxG, scores_QxG = rng.normal(size=(50, 6)), rng.normal(size=(20, 6))
    assert len(set(bank_BxG.argmax(1))) == 6  # every item is a hub
    inverted = qb_norm(scores_QxG, bank_BxG, beta=3.0)
    found = scores_QxG - hubness_bias(bank_BxG, beta=3.0)
    np.testing.assert_array_equal(found.argsort(1), inverted.argsort(1))
