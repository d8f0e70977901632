"""Trains a model: the loop, the pure training step, and the setup from a config."""

import collections
import dataclasses
import functools
import itertools
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import Mesh

from xclip_jax import sharding
from xclip_jax.checkpoint import Checkpoints, claim_workdir, init_params, model_folder, save_model
from xclip_jax.cli import InputError
from xclip_jax.config import RunConfig
from xclip_jax.data.builder import Dataset
from xclip_jax.data.pipeline import TrainingPairs, steps_per_epoch, training_batches
from xclip_jax.data.text import Tokenizer, load_tokenizer
from xclip_jax.distributed import PREEMPTED, Preemption, print_once, shutdown, wait_for_all
from xclip_jax.evaluate import check_image_size, evaluate_split
from xclip_jax.inference import copy_to_local_devices
from xclip_jax.initialization import how_to_convert, start_from_clip
from xclip_jax.loss import LOSS_SCALES, loss_and_grad
from xclip_jax.models import ModelConfig, XClip, read_model_config
from xclip_jax.monitor import Monitor
from xclip_jax.optimizer import make_optimizer
from xclip_jax.retriever import Retriever

PyTree = Any
Batch = dict[str, Any]  # arrays by name, see training_batches


@struct.dataclass
class TrainState:
    """The content of a checkpoint.

    It has no random state, because a step depends on its number.
    """

    step: Any
    params: PyTree
    opt_state: PyTree


def train(config: RunConfig, workdir: str | Path) -> None:
    """Trains, or resumes training, and writes the selected weights to `workdir`/model.

    Raises:
        InputError: the config does not fit the data, the devices or the work directory, or the loss
            became NaN or infinite.
    """
    workdir = Path(workdir)
    setup = set_up(config)
    claim_workdir(workdir, config, setup.dataset)
    state = init_state(setup.model, setup.optimizer, config.seed, setup.mesh)
    _print_summary(config, setup, state)
    checkpoints = Checkpoints(workdir / "checkpoints")
    if restored := checkpoints.restore_newest(state):
        step, state = restored
        print_once(f"resuming from step {step} of {setup.total_steps}")
    else:
        if config.init.clip:
            state = _start_from_clip(state, setup.model.config, config.init.clip)
        if not setup.total_steps:
            checkpoints.save(0, state)
    state = _run_steps(config, setup, state, checkpoints, workdir)
    step, state = checkpoints.restore_best(state)
    params = copy_to_local_devices(state.params)
    checkpoints.close()
    selected_on = setup.val_split if config.train.select != "last" else None
    extra = {"step": step, "selected_on": selected_on or "last step"}
    folder, model_config = workdir / "model", setup.model.config
    save_model(folder, model_config, params, tokenizer=setup.tokenizer, extra=extra)
    wait_for_all("model directory")


def _run_steps(
    config: RunConfig, setup: "Setup", state: TrainState, checkpoints: Checkpoints, workdir: Path
) -> TrainState:
    """Runs the remaining steps, with evaluations and checkpoints at the config's intervals."""
    start, total = int(state.step), setup.total_steps
    eval_every = config.train.eval_every or setup.epoch_steps
    step_fn = compile_step(setup.model, setup.optimizer, config, setup.mesh, state)
    batches = prefetch(setup.batches(start), setup.mesh, total - start)
    preemption = Preemption()
    with Monitor(config, workdir, setup.schedule, total_steps=total, start=start) as monitor:
        for step, (batch, truncated) in enumerate(batches, start + 1):
            monitor.profile(step)
            state, metrics = step_fn(state, batch)
            monitor.log_step(step, metrics, truncated)
            stop = preemption.reached(step) and step < total
            if step % eval_every == 0 or step == total:
                monitor.flush()  # raises before a state with a NaN loss is saved
                score = _validate(config, setup, state.params, monitor, step)
                checkpoints.save(step, state, None if config.train.select == "last" else score)
            elif step % config.train.checkpoint_every == 0 or stop:
                monitor.flush()
                checkpoints.save(step, state)
            if stop:
                checkpoints.wait()
                print_once(f"preempted: saved step {step} of {total}; the same command resumes")
                shutdown()
                sys.exit(PREEMPTED)
    return state


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    model: XClip,
    optimizer: optax.GradientTransformation,
    config: RunConfig,
    mesh: Mesh,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Returns the state after one update and its metrics, as a pure function.

    Args:
        state: parameters and optimizer state.
        batch: see training_batches; its leading axes may be split over devices, the loss compares
            all pairs of the batch in any case.
        model: the linen module.
        optimizer: turns gradients into updates.
        config: its sections `loss` and `train` are read.
        mesh: the device mesh.
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


def clamp_logit_scale(params: PyTree) -> PyTree:
    """Limits exp(logit_scale) to 100 (Radford et al., 2021, Sec. 2.5)."""
    scale = jnp.minimum(params["clip"]["logit_scale"], math.log(100))
    return {**params, "clip": {**params["clip"], "logit_scale": scale}}


def compile_step(
    model: XClip,
    optimizer: optax.GradientTransformation,
    config: RunConfig,
    mesh: Mesh,
    state: TrainState,
) -> Any:
    """Returns `train_step` jitted over the mesh, with the state donated."""
    step = functools.partial(train_step, model=model, optimizer=optimizer, config=config, mesh=mesh)
    shardings = sharding.state_shardings(state, mesh), sharding.replicated(mesh)
    return jax.jit(step, donate_argnums=0, out_shardings=shardings)


def init_state(
    model: XClip, optimizer: optax.GradientTransformation, seed: int, mesh: Mesh
) -> TrainState:
    """Returns a fresh state on the mesh, which depends only on the seed."""
    init = functools.partial(_init_state, model, optimizer, seed)
    return jax.jit(init, out_shardings=sharding.state_shardings(jax.eval_shape(init), mesh))()


def state_shapes(model: XClip, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Returns the ShapeDtypeStructs of a state with their shardings, without allocating it."""
    shapes = jax.eval_shape(functools.partial(_init_state, model, optimizer, 0))
    shardings = sharding.state_shardings(shapes, mesh)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )


def _init_state(model: XClip, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    params = init_params(model, seed)
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def _start_from_clip(state: TrainState, model_config: ModelConfig, directory: str) -> TrainState:
    """Returns the state with CLIP's weights and prints the source of each part."""

    def place(value: Any, array: jax.Array) -> jax.Array:
        # Copies, because the step donates its buffers and two parameters may share an array.
        return jax.device_put(jnp.array(value, copy=True), array.sharding)

    params, rows = start_from_clip(state.params, model_config, directory)
    for name, size, source in rows:
        print_once(f"  {name:22}{size / 1e6:9.2f} M  {source}")
    return dataclasses.replace(state, params=jax.tree.map(place, params, state.params))


def _print_summary(config: RunConfig, setup: "Setup", state: TrainState) -> None:
    size, mesh = sum(x.size for x in jax.tree.leaves(state.params)), setup.mesh
    print_once(
        f"{size / 1e6:.2f} M parameters, {len(setup.pairs)} pairs, {setup.total_steps} steps of "
        f"{config.train.batch_size} pairs on {mesh.size} x {jax.devices()[0].device_kind}"
    )
    if mesh.size > 1:
        print_once("\n".join(sharding.summarize_split(state.params, mesh)))


def prefetch(
    batches: Iterator[Mapping[str, np.ndarray]], mesh: Mesh, count: int, depth: int = 2
) -> Iterator[tuple[Batch, int]]:
    """Copies `count` batches to the devices, `depth` of them in advance.

    Yields:
        (batch, number of truncated captions in this process's part of it).
    """
    queue = collections.deque()
    for batch in itertools.islice(batches, count):
        arrays = {name: array for name, array in batch.items() if name != "truncated"}
        queue.append((sharding.shard_batch(arrays, mesh), int(batch["truncated"].sum())))
        if len(queue) > depth:
            yield queue.popleft()
    yield from queue


def _validate(
    config: RunConfig, setup: "Setup", params: PyTree, monitor: Monitor, step: int
) -> float | None:
    """Returns the score that selects weights, or None without a split to validate on."""
    if setup.val_split is None:
        return None
    params = copy_to_local_devices(params)
    retriever = Retriever({}, setup.model, params, setup.tokenizer)
    evaluation = evaluate_split(config, retriever, setup.dataset, setup.val_split)
    return monitor.log_validation(step, setup.val_split, evaluation.metrics)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """The objects that training needs besides its state.

    Attributes:
        val_split: the split evaluated during training; None if the data set has none.
        batches: start step -> endless batches of this process.
    """

    mesh: Mesh
    dataset: Dataset
    pairs: TrainingPairs
    tokenizer: Tokenizer
    model: XClip
    schedule: Callable[..., Any]
    optimizer: optax.GradientTransformation
    epoch_steps: int
    total_steps: int
    val_split: str | None
    batches: Callable[[int], Iterator[Batch]]


def set_up(config: RunConfig) -> Setup:
    """Builds the objects that training needs from a config.

    Raises:
        InputError: the config does not fit the data or the devices.
    """
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    check_batch_sizes(config, mesh)
    data, batch_size = config.data, config.train.batch_size
    dataset = Dataset(data.path, data.dataset, data.variant)
    val_split = _find_val_split(config, dataset)
    pairs = TrainingPairs(dataset, data.train_split, data.captions, data.max_videos)
    tokenizer = load_tokenizer(_find_tokenizer(config, dataset), config.model.max_words)
    model = XClip(configure_model(config.model, tokenizer))
    check_image_size(dataset, model.config)
    epoch_steps = steps_per_epoch(pairs, batch_size)
    total_steps = config.train.epochs * epoch_steps
    schedule, optimizer = configured_optimizer(config, max(1, total_steps))

    def batches(start_step: int) -> Iterator[Batch]:
        return training_batches(
            pairs,
            tokenizer,
            batch_size,
            model.config.max_frames,
            dataset.image_size,
            seed=config.seed,
            start_step=start_step,
            process=(jax.process_index(), jax.process_count()),
        )

    return Setup(
        mesh=mesh,
        dataset=dataset,
        pairs=pairs,
        tokenizer=tokenizer,
        model=model,
        schedule=schedule,
        optimizer=optimizer,
        epoch_steps=epoch_steps,
        total_steps=total_steps,
        val_split=val_split,
        batches=batches,
    )


def _find_val_split(config: RunConfig, dataset: Dataset) -> str | None:
    on_test = config.train.select == "test"
    split = config.data.test_split if on_test else config.data.val_split
    if split in dataset.captions_per_clip:
        return split
    if on_test:
        raise InputError(f"config.train.select = 'test': {dataset.path} has no split {split!r}")
    return None


def _find_tokenizer(config: RunConfig, dataset: Dataset) -> Path:
    """Returns the folder of CLIP's tokenizer if training starts from CLIP, else the data set's."""
    if not config.init.clip:
        return Path(dataset.path) / "tokenizer"
    folder = model_folder(config.init.clip) / "tokenizer"
    if not folder.is_dir():
        advice = how_to_convert(config.init.clip, config.model.vision.patch_size)
        raise InputError(
            f"config.init.clip = {config.init.clip}: no tokenizer in {folder}; {advice}"
        )
    return folder


def check_batch_sizes(config: RunConfig, mesh: Mesh) -> None:
    """Raises InputError if the batch or the micro-batch cannot be split evenly."""
    size, micro = config.train.batch_size, config.train.micro_batch
    sharding.check_batch_size("batch_size", size, mesh)
    if micro:
        sharding.check_batch_size("micro_batch", micro, mesh)
        if size % micro:
            allowed = [n for n in range(mesh.size, size + 1, mesh.size) if size % n == 0]
            raise InputError(
                f"config.train.micro_batch = {micro}: must divide batch_size = {size} and be a "
                f"multiple of the {mesh.size} devices: {', '.join(map(str, allowed))}"
            )


def configured_optimizer(
    config: RunConfig, total_steps: int
) -> tuple[Callable[..., Any], optax.GradientTransformation]:
    """Returns (learning rate schedule, optimizer) of config.optimizer."""
    options: Any = config.optimizer  # a mapping
    return make_optimizer(total_steps, **options)


def configure_model(fields: Any, tokenizer: Tokenizer) -> ModelConfig:
    """Returns the ModelConfig of config.model, with the tokenizer's vocabulary size where it is 0.

    Raises:
        InputError: the tokenizer has more ids than the vocabulary.
    """
    config = read_model_config(fields)
    size = config.text.vocab_size or tokenizer.vocab_size
    if tokenizer.vocab_size > size:
        raise InputError(
            f"config.model.text.vocab_size = {size}: must be at least {tokenizer.vocab_size}, the "
            "tokenizer's number of ids, or 0 for that number"
        )
    return dataclasses.replace(config, text=dataclasses.replace(config.text, vocab_size=size))
