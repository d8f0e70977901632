"""The matrix product of dense layers, with a gradient that is fast on CPU."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from xclip_jax.similarity import AnyArray


def dot_general(x: AnyArray, kernel: AnyArray, dimensions: Any, **_: Any) -> Array:
    """Returns the product of flax's dense layers: of the last axes of `x`, the first of `kernel`.

    `dimensions` are those of jax.lax.dot_general.
    """
    count = len(dimensions[0][0])
    rows, columns = x.shape[: x.ndim - count], kernel.shape[count:]
    x, kernel = jnp.reshape(x, (*rows, -1)), jnp.asarray(kernel)
    return multiply(x, kernel.reshape(x.shape[-1], -1)).reshape(*rows, *columns)


@jax.custom_vjp
def multiply(x: Float[AnyArray, "*N A"], kernel_AxB: Float[AnyArray, "A B"]) -> Array:
    """Returns the product x @ kernel, *N x B."""
    return jnp.matmul(x, kernel_AxB)


def _multiply_forward(x: AnyArray, kernel_AxB: AnyArray) -> tuple[Array, Any]:
    return jnp.matmul(x, kernel_AxB), (x, kernel_AxB)


def _multiply_backward(residuals: Any, gradient: Array) -> tuple[Array, Array]:
    x, kernel_AxB = residuals
    matrices = [y.reshape(-1, y.shape[-1]) for y in (x, gradient)]
    of_kernel = jax.lax.platform_dependent(*matrices, cpu=_contract_on_cpu, default=_contract)
    return gradient @ kernel_AxB.T, of_kernel


multiply.defvjp(_multiply_forward, _multiply_backward)


def _contract(a_NxA: Array, b_NxB: Array) -> Array:
    return a_NxA.T @ b_NxB


# XLA's fastest product on CPU is that of two matrices neither of which is transposed. Left alone,
# XLA transposes both here, the larger one too, or takes a slower product: 4 % of a step of B/32.
def _contract_on_cpu(a_NxA: Array, b_NxB: Array) -> Array:
    keep = jax.lax.optimization_barrier
    if a_NxA.shape[1] <= b_NxB.shape[1]:
        return keep(a_NxA.T) @ b_NxB
    return keep(keep(b_NxB.T) @ a_NxA).T
