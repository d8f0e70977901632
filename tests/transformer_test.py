"""Tests of the loop over layers, of outputs of the first position only, and of dense layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xclip_jax.compile_only import matrix_flops
from xclip_jax.models import transformer
from xclip_jax.models.config import BlockConfig
from xclip_jax.models.dense import dot_general, multiply
from xclip_jax.models.transformer import REMAT, Transformer

LOOPED = transformer.MAX_UNROLLED + 2
# Sub-norms, gates and a cap of attention are those of other families.
FIELDS = [{}, {"gated": True, "inner_norms": True}, {"logit_cap": 5.0}]
INPUT = np.random.default_rng(0).normal(size=(3, 7, 12)).astype(np.float32)


def make(layers, *, remat="auto", first_only=False, **fields):
    config = BlockConfig(width=12, layers=layers, heads=3, activation="gelu", **fields)
    return Transformer(config, remat=remat, first_only=first_only)


def make_params(model):
    """Returns random parameters, biases included."""
    params = jax.jit(model.init)(jax.random.key(0), INPUT)["params"]
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), params)


def value_and_gradient(model, params):
    """Returns the output, and the gradient of a function of the first position."""

    def loss(params):
        y = model.apply({"params": params}, INPUT)
        return jnp.sum(jnp.sin(3 * y[:, 0])), y

    (_, y), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return y, gradient


def assert_near(found, expected):
    """Compares within float32's rounding of the largest value."""

    def check(a, b):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1, np.abs(b).max()))

    jax.tree.map(check, found, expected)


def flops(model, params):
    program = jax.jit(lambda p: model.apply({"params": p}, INPUT)).lower(params).compile()
    return program.cost_analysis()["flops"]


@pytest.mark.parametrize("fields", FIELDS, ids=str)
@pytest.mark.parametrize("layers", [1, 2, LOOPED])
def test_first_position_alone_equals_that_of_all(layers, fields):
    whole, first = (make(layers, first_only=first, **fields) for first in (False, True))
    params = make_params(whole)
    (y, gradient), (y_first, gradient_first) = (
        value_and_gradient(model, params) for model in (whole, first)
    )
    assert y.shape == INPUT.shape
    assert y_first.shape == (3, 1, 12)
    np.testing.assert_allclose(y_first, y[:, :1], atol=2e-6)
    assert_near(gradient_first, gradient)


def test_first_position_alone_needs_fewer_operations():
    whole, first = make(1), make(1, first_only=True)
    params = make_params(whole)
    # Of 12 E^2 operations for a position, those of queries, keys and values stay: 3 E^2.
    assert flops(first, params) < 0.5 * flops(whole, params)


def test_initial_parameters_do_not_depend_on_the_output():
    whole, first = (
        jax.jit(make(3, first_only=f).init)(jax.random.key(0), INPUT) for f in (False, True)
    )
    jax.tree.map(np.testing.assert_array_equal, whole, first)
    layers = whole["params"]["blocks"]["fc"]["kernel"]
    assert layers.shape == (3, 12, 48)
    assert not np.allclose(layers[0], layers[1])


@pytest.mark.parametrize("first_only", [False, True])
@pytest.mark.parametrize("layers", [2, LOOPED])
@pytest.mark.parametrize("remat", [*REMAT, "none", "auto"])
def test_layers_and_recomputation_change_no_value(remat, layers, first_only):
    params = make_params(make(layers))
    expected = value_and_gradient(make(layers, first_only=first_only), params)
    found = value_and_gradient(make(layers, remat=remat, first_only=first_only), params)
    assert_near(found, expected)


def test_long_stacks_are_compiled_as_a_loop_except_in_training_on_cpu():
    params = make_params(make(LOOPED))

    def has_loop(remat, first_only=False):
        model = make(LOOPED, remat=remat, first_only=first_only)
        return "scan[" in str(jax.make_jaxpr(lambda p: model.apply({"params": p}, INPUT))(params))

    assert has_loop("auto")
    assert has_loop("auto", first_only=True)
    assert has_loop("dots")
    assert has_loop("none") == (jax.default_backend() != "cpu")


@pytest.mark.parametrize("layers", [2, LOOPED])
def test_recomputation_is_what_its_name_says(layers):
    params = make_params(make(layers))

    def count(remat):
        model = make(layers, remat=remat)
        gradient = jax.grad(lambda p: jnp.sum(jnp.sin(model.apply({"params": p}, INPUT))))
        return matrix_flops(jax.make_jaxpr(gradient)(params).jaxpr)

    none, dots, layers = (count(remat) for remat in ("none", "dots", "layers"))
    assert none < dots < 1.1 * none  # attention has few operations
    assert layers > 1.2 * none


def test_last_layer_of_a_very_large_stack_stays_in_the_loop(monkeypatch):
    params = make_params(make(LOOPED))
    split = make(LOOPED, first_only=True)
    expected, operations = split.apply({"params": params}, INPUT), flops(split, params)
    monkeypatch.setattr(transformer, "MAX_COPIED", 100)
    found = split.apply({"params": params}, INPUT)
    np.testing.assert_allclose(found, expected, atol=2e-6)
    assert found.shape == (3, 1, 12)
    assert flops(split, params) != operations


@pytest.mark.parametrize("cap", [0.0, 5.0])
@pytest.mark.parametrize("rows", [1, 7])
def test_first_position_alone_sees_its_row_of_the_mask(rows, cap):
    mask = np.random.default_rng(0).random((3, 1, rows, 7)) < 0.5
    mask[..., 0] = True
    angles = np.random.default_rng(1).normal(size=(7, 2)).astype(np.float32)
    whole, first = (make(2, first_only=f, logit_cap=cap) for f in (False, True))
    params = make_params(whole)
    y, y_first = (m.apply({"params": params}, INPUT, mask, angles) for m in (whole, first))
    np.testing.assert_allclose(y_first, y[:, :1], atol=2e-6)
    without = first.apply({"params": params}, INPUT, None, angles)
    assert np.abs(without - y_first).max() > 1e-3


def test_parameters_of_another_number_of_layers_are_refused():
    for layers in (2, LOOPED):
        params = make_params(make(layers))
        for other in (layers - 1, layers + 1):
            with pytest.raises(ValueError, match=f"of {layers} layers, expected {other}"):
                make(other).apply({"params": params}, INPUT)


def test_product_of_no_rows():
    no_rows, kernel = jnp.zeros((0, 4)), jnp.ones((4, 2, 3))
    dimensions = ((1,), (0,)), ((), ())
    assert dot_general(no_rows, kernel, dimensions).shape == (0, 2, 3)
    gradient = jax.grad(lambda k: jnp.sum(dot_general(no_rows, k, dimensions)))(kernel)
    np.testing.assert_array_equal(gradient, np.zeros((4, 2, 3)))


# The matrix of fewer columns is transposed: x, or the gradient.
@pytest.mark.parametrize(("inputs", "outputs"), [(5, 9), (9, 5), (6, 6)])
@pytest.mark.parametrize("rows", [(4,), (2, 3), (2, 3, 4)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_product_and_its_gradient_match_the_plain_ones(inputs, outputs, rows, dtype):
    rng = np.random.default_rng(0)
    x, kernel, seed = (
        jnp.asarray(rng.normal(size=shape), dtype)
        for shape in ((*rows, inputs), (inputs, outputs), (*rows, outputs))
    )
    found, pull = jax.vjp(multiply, x, kernel)
    expected, expected_pull = jax.vjp(jnp.matmul, x, kernel)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, expected)
    for a, b in zip(pull(seed), expected_pull(seed), strict=True):
        assert a.dtype == b.dtype
        tolerance = 1e-5 if dtype == jnp.float32 else 0.1
        np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), atol=tolerance)


@pytest.mark.parametrize(
    ("x_shape", "kernel_shape", "axes"),
    [((2, 3, 4), (4, 5), 1), ((2, 3, 4), (4, 3, 2, 5), 1), ((2, 3, 4, 5), (4, 5, 6), 2)],
)
def test_dense_layers_contract_the_last_axes(x_shape, kernel_shape, axes):
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=x_shape), rng.normal(size=kernel_shape)
    last, first = range(len(x_shape) - axes, len(x_shape)), range(axes)
    dimensions = (tuple(last), tuple(first)), ((), ())
    found = dot_general(x.astype(np.float32), kernel.astype(np.float32), dimensions, precision=None)
    np.testing.assert_allclose(found, np.tensordot(x, kernel, axes), atol=1e-5)
