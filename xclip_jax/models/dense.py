"""The matrix product of dense layers, with a gradient that is fast on CPU."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from xclip_jax.similarity import AnyArray


def dot_general(x: AnyArray, kernel: AnyArray, dimensions: Any, **_: Any) -> Array:
    """Returns the product that flax's dense layers compute.

    The last axes of `x` are contracted with the first ones of `kernel`, as many as `dimensions`,
    those of jax.lax.dot_general, list.
    """
    count = len(dimensions[0][0])
    inputs, outputs = kernel.shape[:count], kernel.shape[count:]
    rows, size = x.shape[: x.ndim - count], math.prod(inputs)
    kernel_AxB = jnp.reshape(kernel, (size, math.prod(outputs)))
    return multiply(jnp.reshape(x, (*rows, size)), kernel_AxB).reshape(*rows, *outputs)


def multiply(x: Float[AnyArray, "*N A"], kernel_AxB: Float[AnyArray, "A B"]) -> Array:
    """Returns the product x @ kernel, *N x B.

    On CPU it has a gradient of its own, and therefore no forward-mode derivative, nor a gradient
    inside shard_map with `check_vma`.
    """
    if jax.default_backend() != "cpu":
        return jnp.matmul(x, kernel_AxB)
    return _multiply_on_cpu(x, kernel_AxB)


@jax.custom_vjp
def _multiply_on_cpu(x: AnyArray, kernel_AxB: AnyArray) -> Array:
    return jnp.matmul(x, kernel_AxB)


def _forward(x: AnyArray, kernel_AxB: AnyArray) -> tuple[Array, Any]:
    return jnp.matmul(x, kernel_AxB), (x, kernel_AxB)


def _backward(residuals: Any, gradient: Array) -> tuple[Array, Array]:
    x, kernel_AxB = residuals
    a_NxA, b_NxB = (y.reshape(math.prod(y.shape[:-1]), y.shape[-1]) for y in (x, gradient))
    # The other platforms are those of a topology, for which a program is compiled on CPU.
    options: Any = {"cpu": _contract, "default": lambda a, b: a.T @ b}
    return gradient @ kernel_AxB.T, jax.lax.platform_dependent(a_NxA, b_NxB, **options)


_multiply_on_cpu.defvjp(_forward, _backward)


def _contract(a_NxA: Float[AnyArray, "N A"], b_NxB: Float[AnyArray, "N B"]) -> Array:
    """Returns a.T @ b, A x B.

    XLA's fastest product on CPU takes two matrices that are not transposed. By itself XLA also
    transposes the larger matrix here, or takes a slower product: 4 % of a training step of B/32.
    """
    store = jax.lax.optimization_barrier
    if a_NxA.shape[1] <= b_NxB.shape[1]:
        return store(a_NxA.T) @ b_NxB
    return store(store(b_NxB.T) @ a_NxA).T
