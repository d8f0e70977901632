"""Trains a model: the loop, the pure training step, and the setup from a config."""

import contextlib
import dataclasses
import functools
import itertools
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import Mesh

from xclip_jax import checkpoint, distributed, provenance, sharding
from xclip_jax.checkpoint import Checkpoints
from xclip_jax.cli import InputError
from xclip_jax.config import RunConfig
from xclip_jax.data.builder import Dataset
from xclip_jax.data.pipeline import (
    FOUR_THREADS,
    Readers,
    TrainingPairs,
    steps_per_epoch,
    training_batches,
)
from xclip_jax.data.readers import choose_readers, count_cores
from xclip_jax.data.text import load_tokenizer
from xclip_jax.distributed import print_once
from xclip_jax.evaluate import check_frames, check_queries, evaluate_split
from xclip_jax.fitting import Settings, fit_step
from xclip_jax.inference import copy_to_local_devices, note_compute_dtype
from xclip_jax.initialization import how_to_convert, start_from_clip
from xclip_jax.loss import LOSS_SCALES, Batch, LossOptions, loss_and_grad
from xclip_jax.metrics import retrieval_metrics
from xclip_jax.models import ModelConfig, XClip, read_model_config
from xclip_jax.monitor import Monitor
from xclip_jax.optimizer import make_optimizer, store_params, trainable
from xclip_jax.retriever import Retriever
from xclip_jax.workdir import claim_workdir, lock_workdir

PyTree = Any


@struct.dataclass
class TrainState:
    """The content of a checkpoint. Random numbers of a step depend on the seed and its number."""

    step: Any
    params: PyTree  # CLIP's matrices in config.model.param_dtype, all else float32
    opt_state: PyTree
    ema: PyTree = None  # moving average of the parameters, float32, or None

    def to_dict(self) -> dict[str, PyTree]:
        """Returns the fields to save: all except an average that there is none of."""
        fields = {"step": self.step, "params": self.params, "opt_state": self.opt_state}
        return fields if self.ema is None else fields | {"ema": self.ema}

    def evaluated_params(self) -> PyTree:
        """Returns the float32 parameters to evaluate and export, on every local device."""
        params = self.params if self.ema is None else self.ema
        return copy_to_local_devices(optax.tree.cast(params, jnp.float32))


def train(config: RunConfig, workdir: str | Path) -> None:
    """Trains, or resumes training, and writes the selected weights to `workdir`/model.

    Raises InputError if the config does not fit the data, the devices or the work directory, or the
    loss became NaN or infinite.
    """
    workdir = Path(workdir)
    setup = Setup(config)
    claim_workdir(workdir, config, setup.dataset)
    try:
        with lock_workdir(workdir):
            _train(setup, workdir)
    except OSError as error:  # a full disk names no file
        raise InputError(f"work directory {workdir} cannot be written: {error}") from None


def _train(setup: "Setup", workdir: Path) -> None:
    config, model, mesh, total = setup.config, setup.model, setup.mesh, setup.total_steps
    state = setup.init()
    size = sum(x.size for x in jax.tree.leaves(state.params))
    print_once(
        f"{size / 1e6:.2f} M parameters, {len(setup.pairs)} pairs, {total} steps of "
        f"{config.train.batch_size} pairs on {mesh.size} x {jax.devices()[0].device_kind}"
    )
    note_compute_dtype(model.config)
    if mesh.size > 1:
        print_once(sharding.summarize_split(state.params, mesh))
    manager = checkpoint.open_checkpoints(workdir / "checkpoints")
    if manager.latest_step() is not None:
        step, fields = checkpoint.restore_checkpoint(manager, state.to_dict())
        state = TrainState(**fields)
        print_once(f"resuming from step {step} of {total}")
    else:
        if config.init.clip:
            params, rows = start_from_clip(state.params, model.config, config.init.clip)
            for name, size, source in rows:
                print_once(f"  {name:22}{size / 1e6:9.2f} M  {source}")
            # Copies, because the step donates its buffers and two parameters may share an array.
            copies = jax.tree.map(functools.partial(jnp.array, copy=True), params)
            state = setup.init(copies)
        if not total:
            checkpoint.save_checkpoint(manager, 0, state.to_dict())
    start = int(state.step)
    if start < total or not total:
        provenance.record_training(workdir, start, parameters=size, total_steps=total)
    state = _run_steps(setup, state, manager, workdir)
    if start < total:
        provenance.complete_record(workdir)
    step, fields = checkpoint.restore_checkpoint(manager, state.to_dict(), best=True)
    params = TrainState(**fields).evaluated_params()
    manager.close()
    selected_on = setup.val_split if config.train.select != "last" else None
    extra = {"step": step, "selected_on": selected_on or "last step"}
    folder = workdir / "model"
    checkpoint.save_model(folder, model.config, params, tokenizer=setup.tokenizer, extra=extra)
    distributed.wait_for_all("model directory")


def _run_steps(
    setup: "Setup", state: TrainState, manager: Checkpoints, workdir: Path
) -> TrainState:
    """Runs the remaining steps, with evaluations and checkpoints at the config's intervals."""
    config, start, total = setup.config, int(state.step), setup.total_steps
    eval_every = config.train.eval_every or setup.epoch_steps
    take_step = setup.compile_step() if start < total else setup.step
    must_stop = distributed.watch_for_preemption()
    readers = setup.choose_readers(total - start)
    with (
        contextlib.closing(setup.batches(start, readers)) as batches,
        Monitor(config, workdir, setup.schedule, range(start, total)) as monitor,
    ):
        placed = (_place(batch, setup.mesh) for batch in itertools.islice(batches, total - start))
        step, following = start, next(placed, None)
        while following is not None:
            step, (batch, truncated) = step + 1, following
            monitor.profile(step)
            state, metrics = take_step(state, batch)  # dispatched only
            # Copied to the devices while this step runs, and before it if the last one still does.
            following = next(placed, None)
            monitor.log_step(step, metrics, truncated)  # waits for the last one
            stop = must_stop(step) and step < total
            validate = step % eval_every == 0 or step == total
            if validate or stop or step % config.train.checkpoint_every == 0:
                monitor.flush()  # raises before a state with a NaN loss is saved
                score = None
                if validate and setup.val_split is not None:
                    params = state.evaluated_params()
                    retriever = Retriever({}, setup.model, params, setup.tokenizer)
                    result = evaluate_split(config, retriever, setup.dataset, setup.val_split)
                    by_way = retrieval_metrics(result.sim_TxV, result.text_video_T)
                    score = monitor.log_validation(step, setup.val_split, by_way)
                score = None if config.train.select == "last" else score
                checkpoint.save_checkpoint(manager, step, state.to_dict(), score)
            if stop:
                checkpoint.wait_for_writes(manager)
                print_once(f"preempted: saved step {step} of {total}; the same command resumes")
                distributed.shutdown()
                sys.exit(distributed.PREEMPTED)
    return state


def _place(batch: dict[str, np.ndarray], mesh: Mesh) -> tuple[dict[str, jax.Array], int]:
    """Puts a batch on the devices, returns it and the number of truncated captions."""
    truncated = int(batch.pop("truncated").sum())
    return sharding.shard_batch(batch, mesh), truncated


def compile_training(
    model: XClip,
    optimizer: optax.GradientTransformation,
    config: RunConfig,
    mesh: Mesh,
    *,
    micro_batch: int | None = None,
) -> tuple[Any, Any]:
    """Returns two jitted functions: () -> initial state, (state, batch) -> (state, metrics).

    The initial state depends only on the seed, or has the float32 parameters passed to its
    function, whose `eval_shape` returns its shapes and shardings. The training step donates its
    state. Its `batch` is one of training_batches: the loss compares all pairs, even if they are
    split over devices. `micro_batch` replaces the config's; an automatic one is the whole batch.
    """
    decay = config.train.ema

    def init(params: PyTree = None) -> TrainState:
        params = checkpoint.init_params(model, config.seed) if params is None else params
        stored = store_params(params, config.model.param_dtype)
        ema = jax.tree.map(jnp.copy, params) if decay else None  # buffers of their own
        return TrainState(jnp.zeros((), jnp.int32), stored, optimizer.init(stored), ema)

    options = LossOptions(
        kind=config.loss.kind,
        each_granularity=config.loss.each_granularity,
        cdcr=config.loss.cdcr,
        same_video=config.loss.same_video,
        scale=config.loss.scale or LOSS_SCALES[config.model.preset],
        micro_batch=fixed_micro_batch(config) if micro_batch is None else micro_batch,
        block_cells=config.loss.block_cells,
        mesh=mesh,
    )

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        float32 = optax.tree.cast(state.params, jnp.float32)
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        (loss, accuracy), gradients = loss_and_grad(model, float32, batch, options, key)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        params = clamp_logit_scale(params, model.config.max_scale)
        # In float16, 1 - decay times a small weight would round to 0.
        new = optax.tree.cast(params, jnp.float32)
        ema = optax.incremental_update(new, state.ema, 1 - decay) if decay else None
        metrics = {
            "loss": loss,
            "accuracy": accuracy,
            "gradient_norm": optax.global_norm(trainable(gradients, config.optimizer)),
            "logit_scale": jnp.exp(params["clip"]["logit_scale"]),
        }
        if model.config.tau_learned:
            metrics["tau"] = jnp.exp(params["log_tau"])
        if model.config.logit_bias:
            metrics["logit_bias"] = params["logit_bias"]
        return TrainState(state.step + 1, params, opt_state, ema), metrics

    states = sharding.state_shardings(jax.eval_shape(init), mesh)
    outputs = states, sharding.replicated(mesh)
    jitted_step = jax.jit(train_step, donate_argnums=0, out_shardings=outputs)
    return jax.jit(init, out_shardings=states), jitted_step


def trace_with(
    model: XClip, optimizer: optax.GradientTransformation, config: RunConfig, mesh: Mesh
) -> Callable[[Settings], Any]:
    """Returns a function from settings to the traced training step with them."""
    init, _ = compile_training(model, optimizer, config, mesh)
    inputs = init.eval_shape(), batch_shapes(config, mesh)
    on_cpu = mesh.devices.flat[0].platform == "cpu"

    def trace(settings: Settings) -> Any:
        # In a program for a TPU that is compiled on CPU, layers are not unrolled as for the CPU.
        remat = settings.remat if on_cpu or settings.remat != "none" else "auto"
        variant = XClip(dataclasses.replace(model.config, remat=remat))
        micro_batch = settings.micro_batch
        _, step = compile_training(variant, optimizer, config, mesh, micro_batch=micro_batch)
        return step.trace(*inputs)

    return trace


def batch_shapes(config: RunConfig, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes and shardings of a batch, see `training_batches`."""
    size, m = config.train.batch_size, config.model
    side, words, frames = m.vision.image_size, (size, m.max_words), (size, m.max_frames)
    types = {
        "ids": (words, jnp.int32),
        "text_mask": (words, jnp.bool_),
        "frames": ((*frames, side, side, 3), jnp.uint8),
        "frame_mask": (frames, jnp.bool_),
        "video": ((size,), jnp.int32),
    }
    placed = sharding.over_batch(mesh)
    return {k: jax.ShapeDtypeStruct(*shape, sharding=placed) for k, shape in types.items()}


def clamp_logit_scale(params: PyTree, limit: float) -> PyTree:
    """Limits exp(logit_scale), to 100 in CLIP (Radford et al., Sec. 2.5), 0: no limit."""
    scale = jnp.minimum(params["clip"]["logit_scale"], math.log(limit or math.inf))
    return {**params, "clip": {**params["clip"], "logit_scale": scale}}


class Setup:
    """The objects that training needs besides its state, built from a config.

    `val_split` is the split evaluated during training, None if the data set has none. Raises
    InputError if the config does not fit the data or the devices.
    """

    def __init__(self, config: RunConfig) -> None:
        data, clip = config.data, config.init.clip
        self.config = config
        self.mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
        check_batch_sizes(config, self.mesh)
        self.dataset = Dataset(data.path, data.dataset, data.variant)
        on_test = config.train.select == "test"
        split = data.test_split if on_test else data.val_split
        self.val_split = split if split in self.dataset.captions_per_clip else None
        if on_test and not self.val_split:
            raise InputError(f"config.train.select = 'test': {data.path} has no split {split!r}")
        self.pairs = TrainingPairs(self.dataset, data.train_split, data.captions, data.max_videos)
        folder = (checkpoint.model_folder(clip) if clip else Path(data.path)) / "tokenizer"
        if clip and not folder.is_dir():
            advice = how_to_convert(clip, config.model.vision.patch_size)
            has_model = (folder.parent / "model.json").is_file()
            lacks = f"no tokenizer in {folder}" if has_model else "no model there"
            raise InputError(f"config.init.clip = {clip}: {lacks}; {advice}")
        self.tokenizer = load_tokenizer(folder, config.model.max_words)
        self.model = XClip(configure_model(config, self.tokenizer.vocab_size))
        check_frames(self.dataset, self.model.config)
        check_queries(config)
        self.epoch_steps = steps_per_epoch(self.pairs, config.train.batch_size)
        self.total_steps = config.train.epochs * self.epoch_steps
        steps = max(1, self.total_steps)
        self.schedule, self.optimizer = make_optimizer(config.optimizer, steps)
        self.init, self.step = compile_training(self.model, self.optimizer, config, self.mesh)

    def compile_step(self) -> Callable[..., Any]:
        """Returns the training step with the settings that fit the devices, and prints these."""
        config = self.config
        if config.model.remat != "auto" and fixed_micro_batch(config) == config.train.micro_batch:
            return self.step
        trace = trace_with(self.model, self.optimizer, config, self.mesh)
        chosen = fit_step(trace, self.model.config, config, self.mesh)
        print_once(f"{chosen.settings}: {chosen.memory}")
        return chosen.compiled

    def batches(
        self, start_step: int, readers: Readers = FOUR_THREADS
    ) -> grain.DatasetIterator[dict[str, np.ndarray]]:
        """Returns endless batches of this process, see training_batches."""
        process = jax.process_index(), jax.process_count()
        options = {"seed": self.config.seed, "start_step": start_step, "process": process}
        return self._open_batches(readers, self.config.train.batch_size, **options)

    def choose_readers(self, steps: int) -> Readers:
        """Returns the readers of the batches of `steps` steps."""
        size = self.config.train.batch_size // jax.process_count()
        clip_bytes = self.model.config.max_frames * self.dataset.format.image_size**2 * 3
        limits = {"steps": steps, "cores": count_cores()}
        return choose_readers(self._open_batches, size, clip_bytes, **limits)

    def _open_batches(self, readers: Readers, size: int, **options: Any) -> Any:
        shapes = size, self.model.config.max_frames, self.dataset.format
        # Without options, for a measurement: clips that an earlier one has not read.
        options = {"readers": readers, "seed": 1000 * readers.workers + readers.threads} | options
        return training_batches(self.pairs, self.tokenizer, *shapes, **options)


def check_batch_sizes(config: RunConfig, mesh: Mesh) -> None:
    """Raises InputError, with valid sizes, if batch or micro-batch cannot be split evenly."""
    size, micro, devices = config.train.batch_size, fixed_micro_batch(config), mesh.size
    multiple = f"must be a multiple of the {devices} devices"
    if size % devices:
        below = size // devices * devices
        nearest = " or ".join(str(n) for n in (below, below + devices) if n)
        raise InputError(f"config.train.batch_size = {size}: {multiple}, for example {nearest}")
    if micro and (micro % devices or size % micro):
        sizes = ", ".join(str(n) for n in range(devices, size + 1, devices) if size % n == 0)
        divides = f"{multiple} that divides batch_size = {size}: {sizes}"
        raise InputError(f"config.train.micro_batch = {micro}: {divides}")


def fixed_micro_batch(config: RunConfig) -> int:
    """Returns config.train.micro_batch, or 0 if it is automatic."""
    micro_batch = config.train.micro_batch
    return micro_batch if isinstance(micro_batch, int) else 0


def configure_model(run: RunConfig, num_tokens: int) -> ModelConfig:
    """Returns the ModelConfig of a run, whose vocabulary must hold `num_tokens` ids."""
    config = read_model_config(run.model)
    config = dataclasses.replace(config, logit_bias=run.loss.kind == "sigmoid")
    size = config.text.vocab_size or num_tokens
    if num_tokens > size:
        needed = f"at least {num_tokens}, the tokenizer's number of ids, or 0 for that number"
        raise InputError(f"config.model.text.vocab_size = {size}: must be {needed}")
    return dataclasses.replace(config, text=dataclasses.replace(config.text, vocab_size=size))
