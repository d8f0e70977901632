"""Tests of frozen layers with both optimizers, and of saving their state."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from optimizers import make_options, params_of, random_tree, slices

from xclip_jax.config import OptimizerConfig
from xclip_jax.optimizer import make_optimizer, trainable_mask


def frozen_names(layers):
    """Returns the names that the release freezes."""
    embeddings = {"textual/tokens/embedding", "textual/positions", "visual/positions"}
    embeddings |= {"visual/class_token", "visual/patch/kernel"}
    embeddings |= {f"visual/ln_pre/norm/{name}" for name in ("scale", "bias")}
    blocks = {
        f"{tower}/encoder/blocks/{name}/{layer}"
        for tower in ("visual", "textual")
        for layer in range(layers)
        for name in (
            *(f"{part}/{end}" for part in ("fc", "proj") for end in ("kernel", "bias")),
            *(f"attention/{part}/{end}" for part in ("qkv", "out") for end in ("kernel", "bias")),
            *(f"{part}/norm/{end}" for part in ("ln_1", "ln_2") for end in ("scale", "bias")),
        )
    }
    return {f"clip/{name}" for name in embeddings | blocks}


@pytest.mark.parametrize("layers", [0, 1, 2, 3, 9])
def test_frozen_parameters_are_those_of_the_release(layers):
    params = params_of("transformer", layers=3)
    masks = trainable_mask(params, layers)
    whole = jax.tree.map(lambda mask, x: np.broadcast_to(mask, x.shape), masks, params)
    frozen = {name for name, mask in slices(whole).items() if not mask.any()}
    assert frozen == frozen_names(min(layers, 3))
    assert all(mask.all() for name, mask in slices(whole).items() if name not in frozen)


def update(params, gradients, name, freeze_layers=-1, steps=3):
    """Returns the updated parameters and the optimizer's state."""
    config = OptimizerConfig(name=name, **OPTIONS, freeze_layers=freeze_layers)
    optimizer = make_optimizer(config, 8)[1]
    state = jax.jit(optimizer.init)(params)
    step = jax.jit(optimizer.update)
    for _ in range(steps):
        updates, state = step(gradients, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


OPTIMIZERS = ("adamw", "bert_adam")


OPTIONS = make_options(1e-2, 0.5, 0.2, 0.25, 1.0)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("layers", [-1, 0, 1, 2])
def test_frozen_parameters_do_not_change(name, layers):
    before = random_tree(0)
    after, _ = update(before, random_tree(1), name, layers)
    before, after = slices(before), slices(after)
    same = {n for n in before if np.asarray(before[n]).tobytes() == np.asarray(after[n]).tobytes()}
    assert same == (set() if layers < 0 else frozen_names(layers) & set(before))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_frozen_gradients_have_no_influence(name):
    """Sets them to large values and NaN, which do not count even in the global norm."""
    params, masks = random_tree(0), trainable_mask(random_tree(0), 1)

    def with_frozen(value):
        return jax.tree.map(lambda x, mask: jnp.where(mask, x, value), random_tree(1, 1e-2), masks)

    expected = update(params, with_frozen(0), name, 1)
    for value in (1e3, np.nan):
        found = update(params, with_frozen(value), name, 1)
        jax.tree.map(np.testing.assert_array_equal, found, expected)
    # With gradients of 0 there, the other parameters are updated as without freezing.
    unfrozen, _ = update(params, with_frozen(0), name)
    found, unfrozen = slices(expected[0]), slices(unfrozen)
    for part in found.keys() - frozen_names(1):
        np.testing.assert_allclose(found[part], unfrozen[part], rtol=1e-6, err_msg=part)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("layers", [-1, 0])
def test_state_can_be_saved_and_restored(name, layers, tmp_path):
    _, state = update(random_tree(0), random_tree(1), name, layers, steps=2)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", jax.tree.map(jnp.zeros_like, state))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, restored, state)
