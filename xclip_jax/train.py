"""Training: one pure step, jitted over the mesh, and the loop around it."""

import collections
import dataclasses
import functools
import itertools
import math
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from flax import struct
from ml_collections import ConfigDict

from xclip_jax import sharding
from xclip_jax.checkpoint import Checkpoints, claim_workdir, init_params, model_folder, save_model
from xclip_jax.cli import InputError
from xclip_jax.config import RunConfig
from xclip_jax.data.builder import Dataset
from xclip_jax.data.pipeline import TrainingPairs, steps_per_epoch, training_batches
from xclip_jax.data.text import Tokenizer, load_tokenizer
from xclip_jax.distributed import PREEMPTED, Preemption, print_once, shutdown, wait_for_all
from xclip_jax.evaluate import check_image_size, evaluate_split
from xclip_jax.inference import on_local_devices
from xclip_jax.initialization import how_to_convert, start_from_clip
from xclip_jax.loss import LOSS_SCALES, loss_and_grad
from xclip_jax.models import ModelConfig, XClip, read_model_config
from xclip_jax.monitor import Monitor
from xclip_jax.optimizer import make_optimizer


@struct.dataclass
class TrainState:
    """What a checkpoint holds. There is no random state: a step depends on its number alone."""

    step: jax.Array
    params: dict
    opt_state: optax.OptState


def train_step(
    state: TrainState,
    batch: dict[str, jax.Array],
    *,
    model: XClip,
    optimizer: optax.GradientTransformation,
    config: RunConfig,
    mesh: jax.sharding.Mesh,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Returns the updated state and the metrics of one step.

    Args:
        state: the state before the step.
        batch: see xclip_jax.data.pipeline; its leading axes may be split over devices, but the
            contrast is always over the whole batch.
        model: the linen module.
        optimizer: see xclip_jax.optimizer.
        config: its sections `loss` and `train` are read.
        mesh: the mesh of the program.
    """
    (loss, accuracy), gradients = loss_and_grad(
        model,
        state.params,
        batch,
        same_video=config.loss.same_video,
        scale=config.loss.scale or LOSS_SCALES[config.model.preset],
        micro_batch=config.train.micro_batch,
        block_cells=config.loss.block_cells,
        mesh=mesh,
    )
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = clamp_logit_scale(optax.apply_updates(state.params, updates))
    metrics = {
        "loss": loss,
        "accuracy": accuracy,
        "gradient_norm": optax.global_norm(gradients),
        "logit_scale": jnp.exp(params["clip"]["logit_scale"]),
    }
    return TrainState(state.step + 1, params, opt_state), metrics


def clamp_logit_scale(params):
    """Keeps exp(logit_scale) at most 100 (Radford et al., 2021, Sec. 2.5)."""
    scale = jnp.minimum(params["clip"]["logit_scale"], math.log(100))
    return {**params, "clip": {**params["clip"], "logit_scale": scale}}


def train(config, workdir):
    """Trains, or goes on training, and leaves the selected weights in `workdir`/model.

    Raises:
        InputError: the config does not fit the data, the devices or the work directory, or the loss
            stopped being finite.
    """
    workdir = Path(workdir)
    setup = set_up(config)
    claim_workdir(workdir, config, setup.dataset)
    model, mesh, total_steps = setup.model, setup.mesh, setup.total_steps
    state = init_state(model, setup.optimizer, config.seed, mesh)
    print_once(
        f"{sum(x.size for x in jax.tree.leaves(state.params)) / 1e6:.2f} M parameters, "
        f"{len(setup.pairs)} pairs, {total_steps} steps of {config.train.batch_size} pairs "
        f"on {mesh.size} x {jax.devices()[0].device_kind}"
    )
    if mesh.size > 1:
        print_once("\n".join(sharding.describe(state.params, mesh)))
    checkpoints = Checkpoints(workdir / "checkpoints")
    restored = checkpoints.restore_newest(state)
    if restored:
        state = restored[1]
        print_once(f"resuming from step {restored[0]} of {total_steps}")
    elif config.init.clip:
        state = _start_from_clip(state, model.config, config.init.clip)
    if not total_steps and not restored:
        checkpoints.save(0, state)

    step_fn = compile_step(model, setup.optimizer, config, mesh, state)
    with Monitor(config, workdir, setup.schedule, total_steps, int(state.step)) as monitor:
        _fit(config, setup, state, step_fn, checkpoints, monitor)
    best, state = checkpoints.restore_best(state)
    params = on_local_devices(state.params)
    checkpoints.close()
    on_last = config.train.select == "last" or not setup.selected_on
    chosen = "last step" if on_last else setup.selected_on
    extra = {"step": best, "selected_on": chosen}
    save_model(workdir / "model", model.config, params, tokenizer=setup.tokenizer, extra=extra)
    wait_for_all("the model directory")


def _start_from_clip(state, model_config, directory):
    """The state with CLIP's weights in it; prints a table of what came from where."""
    params, rows = start_from_clip(state.params, model_config, directory)
    for name, number, origin in rows:
        print_once(f"  {name:22}{number / 1e6:9.2f} M  {origin}")
    return state.replace(params=jax.tree.map(_like, params, state.params))


def _like(value, array):
    # A copy: the step gives up its buffers, and two parameters may come from one array.
    return jax.device_put(jnp.array(value, copy=True), array.sharding)


def compile_step(model, optimizer, config, mesh, state):
    """`train_step` jitted over the mesh; the state passed in is given up for the new one."""
    step = functools.partial(
        train_step, model=model, optimizer=optimizer, config=config, mesh=mesh
    )
    shardings = sharding.state_shardings(state, mesh), sharding.replicated(mesh)
    return jax.jit(step, donate_argnums=0, out_shardings=shardings)


def _fit(config, setup, state, step_fn, checkpoints, monitor):
    """Runs the steps that are left; evaluates and saves where the config says so."""
    eval_every = config.train.eval_every or setup.epoch_steps
    first, preemption = int(state.step) + 1, Preemption()
    batches = prefetch(setup.batches(first - 1), setup.mesh, setup.total_steps - first + 1)
    for step, (batch, truncated) in enumerate(batches, first):
        monitor.profile(step)
        state, metrics = step_fn(state, batch)
        monitor.step(step, metrics, truncated)
        last, stop = step == setup.total_steps, preemption.reached(step)
        if step % eval_every == 0 or last:
            monitor.flush()  # never save a state whose loss was not seen to be finite
            score = _validate(config, setup, state.params, monitor, step)
            checkpoints.save(step, state, None if config.train.select == "last" else score)
        elif step % config.train.checkpoint_every == 0 or stop:
            monitor.flush()
            checkpoints.save(step, state)
        if stop and not last:
            checkpoints.wait()
            total = setup.total_steps
            print_once(f"preempted: saved after step {step} of {total}; the same command goes on")
            shutdown()
            sys.exit(PREEMPTED)


def prefetch(batches, mesh, count, depth=2):
    """`count` batches on the devices, `depth` of them before they are asked for.

    Yields:
        (batch, how many captions of this process's share were cut).
    """
    waiting = collections.deque()
    for batch in itertools.islice(batches, count):
        truncated = int(batch.pop("truncated").sum())
        waiting.append((sharding.shard_batch(batch, mesh), truncated))
        if len(waiting) > depth:
            yield waiting.popleft()
    yield from waiting


def _validate(config, setup, params, monitor, step):
    """The score that selects weights; None where there is no split to validate on."""
    if not setup.selected_on:
        return None
    local = on_local_devices(params)
    data = setup.dataset, setup.selected_on, setup.tokenizer
    return monitor.validation(
        step, setup.selected_on, evaluate_split(config, setup.model, local, *data).metrics
    )


def init_state(model, optimizer, seed, mesh):
    """A fresh TrainState, the same for the same seed, laid out on the mesh."""
    init = functools.partial(_init, model, optimizer, seed)
    return jax.jit(init, out_shardings=sharding.state_shardings(jax.eval_shape(init), mesh))()


def state_shapes(model, optimizer, mesh):
    """The shapes of a TrainState and where its arrays live; nothing is allocated."""
    shapes = jax.eval_shape(functools.partial(_init, model, optimizer, 0))
    shardings = sharding.state_shardings(shapes, mesh)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )


def _init(model, optimizer, seed):
    params = init_params(model, seed)
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


@dataclasses.dataclass(frozen=True)
class Setup:
    """All that training needs besides its state.

    Attributes:
        selected_on: the split evaluated during training; None where the data set has none.
        batches: start step -> endless batches of this process.
    """

    mesh: jax.sharding.Mesh
    dataset: Dataset
    pairs: TrainingPairs
    tokenizer: Tokenizer
    model: XClip
    schedule: Callable
    optimizer: optax.GradientTransformation
    epoch_steps: int
    total_steps: int
    selected_on: str | None
    batches: Callable


def set_up(config):
    """The Setup of a config.

    Raises:
        InputError: the config does not fit the data or the devices.
    """
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    check_batch_sizes(config.train, mesh)
    dataset = Dataset(config.data.path, config.data.dataset, config.data.variant)
    selected_on = validation_split(config, dataset)
    pairs = TrainingPairs(
        dataset, config.data.train_split, config.data.captions, config.data.max_videos
    )
    tokenizer = load_tokenizer(_tokenizer_folder(config, dataset), config.model.max_words)
    model = XClip(configure_model(config.model, tokenizer))
    check_image_size(dataset, model.config)
    epoch_steps = steps_per_epoch(pairs, config.train.batch_size)
    total_steps = config.train.epochs * epoch_steps

    def batches(start_step):
        return training_batches(
            pairs,
            tokenizer,
            config.train.batch_size,
            model.config.max_frames,
            dataset.image_size,
            config.seed,
            start_step=start_step,
            process=(jax.process_index(), jax.process_count()),
        )

    schedule, optimizer = configured_optimizer(config.optimizer, max(1, total_steps))
    return Setup(
        mesh,
        dataset,
        pairs,
        tokenizer,
        model,
        schedule,
        optimizer,
        epoch_steps,
        total_steps,
        selected_on,
        batches,
    )


def validation_split(config, dataset):
    """The split that is evaluated during training; None where the data set has none.

    Raises:
        InputError: the weights are to be the best on a test split that is not there.
    """
    on_test = config.train.select == "test"
    split = config.data.test_split if on_test else config.data.val_split
    if split in dataset.captions_per_clip:
        return split
    if on_test:
        raise InputError(f"config.train.select = 'test': {dataset.path} has no split {split!r}")
    return None


def _tokenizer_folder(config, dataset):
    """CLIP's tokenizer goes with CLIP's weights; else the data set's own."""
    if not config.init.clip:
        return dataset.path / "tokenizer"
    folder = model_folder(config.init.clip) / "tokenizer"
    if not folder.is_dir():
        patch_size = config.model.vision.patch_size
        raise InputError(
            f"config.init.clip = {config.init.clip}: no model with a tokenizer there, looked for "
            f"{folder}; {how_to_convert(config.init.clip, patch_size)}"
        )
    return folder


def check_batch_sizes(train, mesh):
    """Raises InputError if the batch or the micro-batch of config.train cannot be split evenly."""
    sharding.check_batch_size("batch_size", train.batch_size, mesh)
    if train.micro_batch:
        sharding.check_batch_size("micro_batch", train.micro_batch, mesh)
        if train.batch_size % train.micro_batch:
            whole = [n for n in range(1, train.batch_size + 1) if train.batch_size % n == 0]
            fitting = [n for n in whole if n % mesh.size == 0]
            raise InputError(
                f"config.train.micro_batch = {train.micro_batch}: must divide batch_size = "
                f"{train.batch_size}; on {mesh.size} devices that can be "
                f"{', '.join(map(str, fitting))}"
            )


def configured_optimizer(o, total_steps):
    """(learning rate schedule, optimizer) of config.optimizer."""
    rates = o.lr, total_steps, o.encoder_lr / o.lr, o.weight_decay, o.warmup
    return make_optimizer(o.name, *rates, o.b1, o.b2, o.eps, o.clip_norm, o.freeze_layers)


def configure_model(fields: ConfigDict, tokenizer: Tokenizer) -> ModelConfig:
    """Returns the ModelConfig of config.model, with the tokenizer's vocabulary size where it is 0.

    Raises:
        InputError: the tokenizer has more ids than the vocabulary.
    """
    config = read_model_config(fields)
    size = config.text.vocab_size or tokenizer.vocab_size
    if tokenizer.vocab_size > size:
        raise InputError(
            f"config.model.text.vocab_size = {size}: must be at least the "
            f"{tokenizer.vocab_size} ids of the tokenizer (or 0: its size)"
        )
    return dataclasses.replace(config, text=dataclasses.replace(config.text, vocab_size=size))
