"""What a config stands for: data, tokenizer, architecture, optimizer, mesh, and how they fit."""

import dataclasses
import json
from collections.abc import Callable

import flax.linen as nn
import jax
import optax

from xclip_jax import sharding
from xclip_jax.data.builder import Dataset
from xclip_jax.data.pipeline import TrainingPairs, steps_per_epoch, training_batches
from xclip_jax.data.text import Tokenizer, load_tokenizer
from xclip_jax.errors import InputError
from xclip_jax.evaluate import check_image_size
from xclip_jax.initialization import how_to_convert
from xclip_jax.model_directory import model_folder
from xclip_jax.models import build_model, resolve
from xclip_jax.optimizer import make_optimizer


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
    architecture: dict
    model: nn.Module
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
    architecture = resolve_architecture(config.model, tokenizer)
    check_image_size(dataset, architecture)
    epoch_steps = steps_per_epoch(pairs, config.train.batch_size)
    total_steps = config.train.epochs * epoch_steps
    model = build_model(architecture)

    def batches(start_step):
        return training_batches(
            pairs,
            tokenizer,
            config.train.batch_size,
            model.max_frames,
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
        architecture,
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
