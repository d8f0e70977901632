"""Training: one pure step, jitted over the mesh, and the loop around it."""

import functools
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from flax import struct

from xclip_jax import sharding
from xclip_jax.checkpoint import Checkpoints
from xclip_jax.data.builder import Dataset
from xclip_jax.data.pipeline import TrainingPairs, steps_per_epoch, training_batches
from xclip_jax.data.text import load_tokenizer
from xclip_jax.errors import InputError
from xclip_jax.evaluate import check_image_size, evaluate_split
from xclip_jax.initialization import how_to_convert, start_from_clip
from xclip_jax.losses import contrastive_loss
from xclip_jax.model_directory import init_params, model_folder, save_model
from xclip_jax.models import build_model, resolve
from xclip_jax.monitor import Monitor
from xclip_jax.optimizer import make_optimizer
from xclip_jax.workdir import claim_workdir

LOSS_SCALES = {"paper": 1.0, "official": 0.5}  # of Eq. 17, by preset


@struct.dataclass
class TrainState:
    """What a checkpoint holds. There is no random state: a step depends on its number alone."""

    step: jax.Array
    params: dict
    opt_state: optax.OptState


def train_step(state, batch, model, optimizer, same_video, loss_scale=1.0):
    """One update. Pure: (state, batch) -> (state, metrics).

    Args:
        batch: see data/pipeline.py; its leading axes may be split over devices, the contrast is
            over the whole batch all the same.
        same_video: "negative" or "ignore", see losses.py.
        loss_scale: see losses.py.
    """

    def loss_fn(params):
        inputs = (batch["ids"], batch["text_mask"], batch["frames"], batch["frame_mask"])
        sim_BxB = model.apply({"params": params}, *inputs)
        video_B = batch["video"] if same_video == "ignore" else None
        return contrastive_loss(sim_BxB, video_B, loss_scale), sim_BxB

    (loss, sim_BxB), gradients = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = clamp_logit_scale(optax.apply_updates(state.params, updates))
    metrics = {
        "loss": loss,
        # The share of texts whose best video in the batch is theirs, in whichever of its pairs.
        "accuracy": jnp.mean(batch["video"][jnp.argmax(sim_BxB, 1)] == batch["video"]),
        "gradient_norm": optax.global_norm(gradients),
        "logit_scale": jnp.exp(params["clip"]["logit_scale"]),
    }
    return TrainState(state.step + 1, params, opt_state), metrics


def clamp_logit_scale(params):
    """Keeps exp(logit_scale) at most 100 (Radford et al., 2021, Sec. 2.5)."""
    scale = jnp.minimum(params["clip"]["logit_scale"], math.log(100))
    return {**params, "clip": {**params["clip"], "logit_scale": scale}}


def run(config, workdir):
    """Trains, or goes on training, and leaves the selected weights in `workdir`/model.

    Raises:
        InputError: the config does not fit the data, the devices or the work directory, or the loss
            stopped being finite.
    """
    workdir = Path(workdir)
    mesh = sharding.make_mesh(config.mesh.data)
    sharding.check_batch_size(config.train.batch_size, mesh)
    dataset = Dataset(config.data.path, config.data.dataset, config.data.variant)
    selected_on = validation_split(config, dataset)
    pairs = TrainingPairs(dataset, config.data.train_split, config.data.captions)
    tokenizer = load_tokenizer(_tokenizer_folder(config, dataset), config.model.max_words)
    architecture = resolve_architecture(config.model, tokenizer)
    check_image_size(dataset, architecture)
    epoch_steps = steps_per_epoch(pairs, config.train.batch_size)
    total_steps = config.train.epochs * epoch_steps
    claim_workdir(workdir, config, dataset)

    model = build_model(architecture)
    schedule, optimizer = _optimizer(config.optimizer, total_steps)
    state = init_state(model, architecture, optimizer, config.seed, mesh)
    print(
        f"{sum(x.size for x in jax.tree.leaves(state.params)) / 1e6:.2f} M parameters, "
        f"{len(pairs)} pairs, {total_steps} steps of {config.train.batch_size} pairs "
        f"on {mesh.size} x {jax.devices()[0].device_kind}"
    )
    checkpoints = Checkpoints(workdir / "checkpoints")
    restored = checkpoints.restore_newest(state)
    if restored:
        state = restored[1]
        print(f"resuming from step {restored[0]} of {total_steps}")
    elif config.init.clip:
        state = _start_from_clip(state, architecture, config.init.clip)

    batches = training_batches(
        pairs,
        tokenizer,
        config.train.batch_size,
        model.max_frames,
        dataset.image_size,
        config.seed,
        start_step=int(state.step),
        process=(jax.process_index(), jax.process_count()),
    )
    step_fn = compile_step(model, optimizer, config, mesh)
    validate = selected_on and functools.partial(
        _validate, config, model, dataset, tokenizer, selected_on
    )
    with Monitor(config, workdir, schedule, total_steps, int(state.step)) as monitor:
        _fit(config, state, step_fn, batches, mesh, checkpoints, validate, monitor, epoch_steps)
    best = checkpoints.best_step()
    params = checkpoints.restore(best, state).params
    checkpoints.close()
    chosen = "last step" if config.train.select == "last" or not selected_on else selected_on
    described = {**architecture, "step": best, "selected_on": chosen}
    save_model(workdir / "model", described, params, tokenizer)


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


def _start_from_clip(state, architecture, directory):
    """The state with CLIP's weights in it; prints a table of what came from where."""
    params, rows = start_from_clip(state.params, architecture, directory)
    for name, number, origin in rows:
        print(f"  {name:22}{number / 1e6:9.2f} M  {origin}")
    return state.replace(params=jax.tree.map(_like, params, state.params))


def _like(value, array):
    # A copy: the step gives up its buffers, and two parameters may come from one array.
    return jax.device_put(jnp.array(value, copy=True), array.sharding)


def compile_step(model, optimizer, config, mesh):
    """`train_step` jitted over the mesh; the state passed in is given up for the new one."""
    step = functools.partial(
        train_step,
        model=model,
        optimizer=optimizer,
        same_video=config.loss.same_video,
        loss_scale=config.loss.scale or LOSS_SCALES[config.model.preset],
    )
    return jax.jit(step, donate_argnums=0, out_shardings=sharding.replicated(mesh))


def _optimizer(o, total_steps):
    """(learning rate schedule, optimizer) of config.optimizer."""
    rates = o.lr, total_steps, o.encoder_lr / o.lr, o.weight_decay, o.warmup
    return make_optimizer(o.name, *rates, o.b1, o.b2, o.eps, o.clip_norm, o.freeze_layers)


def _fit(config, state, step_fn, batches, mesh, checkpoints, validate, monitor, epoch_steps):
    """Runs the steps that are left; evaluates and saves where the config says so."""
    eval_every = config.train.eval_every or epoch_steps
    total_steps = config.train.epochs * epoch_steps
    for step in range(int(state.step) + 1, total_steps + 1):
        batch = next(batches)
        truncated = batch.pop("truncated")
        state, metrics = step_fn(state, sharding.shard_batch(batch, mesh))
        monitor.step(step, metrics, int(truncated.sum()))
        last = step == total_steps
        if step % eval_every == 0 or last:
            monitor.flush()  # never save a state whose loss was not seen to be finite
            score = validate(state.params, monitor, step) if validate else None
            checkpoints.save(step, state, None if config.train.select == "last" else score)
        elif step % config.train.checkpoint_every == 0:
            monitor.flush()
            checkpoints.save(step, state)
    return state


def _validate(config, model, dataset, tokenizer, split, params, monitor, step):
    found = evaluate_split(config, model, params, dataset, split, tokenizer)
    return monitor.validation(step, split, found.metrics)


def init_state(model, architecture, optimizer, seed, mesh):
    """A fresh TrainState, the same for the same seed, laid out on the mesh."""

    def init():
        params = init_params(model, architecture, seed)
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))

    return jax.jit(init, out_shardings=sharding.replicated(mesh))()


def resolve_architecture(model_config, tokenizer):
    """config.model as a plain dict, with the vocabulary's size filled in where it is 0.

    Raises:
        InputError: the tokenizer has more ids than the vocabulary.
    """
    architecture = resolve(json.loads(model_config.to_json()))
    text = architecture["text"]
    text["vocab_size"] = text["vocab_size"] or tokenizer.vocab_size
    if tokenizer.vocab_size > text["vocab_size"]:
        raise InputError(
            f"config.model.text.vocab_size = {text['vocab_size']}: must be at least the "
            f"{tokenizer.vocab_size} ids of the tokenizer (or 0: its size)"
        )
    return architecture
