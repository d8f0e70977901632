"""The data of the tests of training, and the weights that a run wrote."""

import jax
import numpy as np
import pytest
import tiny

from xclip_jax.checkpoint import load_model


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.make_dataset(tmp_path_factory.mktemp("data"))


def params_of(workdir):
    return load_model(workdir / "model")[2]


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)
