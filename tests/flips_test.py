"""Tests that flipped bits are noticed, in a short version of tests/flips.py."""

import flips
import pytest


@pytest.mark.parametrize("kind", flips.MAKERS)
def test_flipped_bits_are_noticed_or_harmless(tmp_path, kind):
    read = flips.MAKERS[kind](tmp_path / "folder")
    outcomes = flips.count_outcomes(tmp_path / "folder", read, times=60, seed=1)
    assert set(outcomes) <= set(flips.HARMLESS)
    assert len(outcomes) > 1
