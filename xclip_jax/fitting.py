"""Chooses recomputation and micro-batches of the training step by the memory they take.

The compiler states the memory of a step before it runs. The first of `candidates`, in order of
work, that fits the devices is chosen, and remembered for the next start.
"""

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

import xclip_jax
from xclip_jax.cli import InputError, first_line, write_atomically
from xclip_jax.config import RunConfig
from xclip_jax.convert.cache import cache_folder
from xclip_jax.distributed import gather_objects, is_first_process
from xclip_jax.models import ModelConfig
from xclip_jax.workdir import plain_fields

REMATS = ("none", "dots", "layers")  # values of model.remat in order of work
FEW_PAIRS = 8  # pairs of a micro-batch on a device, below which a device is poorly used
MARGIN = 0.95  # part of the memory that the step may take: batches ahead and fragments need some
# Limits of the memory of a container, of both versions of cgroups.
CGROUPS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


class Settings(NamedTuple):
    """Settings that change the memory and the time of a step, not its result."""

    remat: str
    micro_batch: int  # 0: the whole batch

    def __str__(self) -> str:
        return f"model.remat={self.remat}, train.micro_batch={self.micro_batch}"

    @property
    def flags(self) -> str:
        """Arguments of the command line."""
        return f"--config.model.remat={self.remat} --config.train.micro_batch={self.micro_batch}"


class Attempt(NamedTuple):
    """A compilation of the step."""

    settings: Settings
    traced: Any
    compiled: Any  # None if the compiler found that it does not fit
    fits: bool
    memory: str  # what it takes, or the compiler's error

    def check(self) -> None:
        """Raises InputError if the step does not fit."""
        if not self.fits:
            problem = f"the training step does not fit with {self.settings}: {self.memory}"
            advice = "automatic ones (auto), or with more devices and --config.mesh.fsdp"
            raise InputError(f"{problem}; try {advice}")


def candidates(
    size: int, devices: int, remat: str = "auto", micro_batch: int | str | None = None
) -> list[Settings]:
    """Returns the settings to try for batches of `size` pairs, from the least work on.

    Micro-batches are divisors of the batch, each at most half of the one before. They encode twice:
    the whole batch comes first, with any recomputation, and micro-batches of few pairs come last.

    Args:
        size: pairs of a batch.
        devices: number of devices over which they are split.
        remat, micro_batch: the config's values, of which only automatic ones are varied.
    """
    halves = [size]
    for n in range(size // 2, 0, -1):
        if size % n == 0 and n % devices == 0 and 2 * n <= halves[-1]:
            halves.append(n)
    large = [n for n in halves[1:] if n >= FEW_PAIRS * devices]
    settings = [Settings(name, n) for n in (0, *large) for name in REMATS]
    settings.sort(key=lambda s: (s.micro_batch > 0, REMATS.index(s.remat)))
    settings += [Settings("layers", n) for n in halves[1:] if n not in large]
    if isinstance(micro_batch, int):
        settings = [Settings(name, micro_batch) for name in REMATS]
    if remat != "auto":
        settings = [s._replace(remat=remat) for s in settings]
    return list(dict.fromkeys(settings))


def try_settings(
    trace: Callable[[Settings], Any], settings: Iterable[Settings], size: int, available: float
) -> Iterator[Attempt]:
    """Yields compilations of a step of `size` pairs until one takes at most the `available` bytes.

    Settings are skipped if they do not fit even if all temporary memory shrinks with the
    micro-batch. The program, and so its memory, is the same in all processes.
    """
    known: dict[str, tuple[int, int, int]] = {}  # by remat: pairs, held and temporary bytes
    for chosen in settings:
        pairs = chosen.micro_batch or size
        larger, held, temporary = known.get(chosen.remat, (0, 0, 0))
        if pairs < larger and held + temporary * pairs / larger > available:
            continue
        traced = trace(chosen)
        try:
            compiled = traced.lower().compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            yield Attempt(chosen, traced, None, fits=False, memory=f"{first_line(error):.300}")
            continue
        held, peak = held_bytes(compiled), peak_bytes(compiled)
        known[chosen.remat] = pairs, held, peak - held
        fits, of_all = peak <= available, f" of {available / 2**30:.2f} GiB"
        memory = f"{peak / 2**30:.2f} GiB a device" + of_all * math.isfinite(available)
        yield Attempt(chosen, traced, compiled, fits, memory)
        if fits:
            return


def fit_step(
    trace: Callable[[Settings], Any], model: ModelConfig, config: RunConfig, mesh: Mesh
) -> Attempt:
    """Returns the compiled step of the first candidate that fits, which the next start tries first.

    Raises InputError if none does.
    """
    available = min(gather_objects(device_memory(mesh)))
    size = config.train.batch_size
    settings = candidates(size, mesh.size, config.model.remat, config.train.micro_batch)
    file = _choice_file(model, config, mesh, available)
    known = gather_objects(_read_choice(file))[0]
    if known in settings:
        settings = list(dict.fromkeys([known, *settings]))
    *failed, last = try_settings(trace, settings, size, available)
    last.check()
    if failed and is_first_process():
        with contextlib.suppress(OSError):  # the next start then tries them again
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, json.dumps(last.settings._asdict()))
    return last


def _choice_file(model: ModelConfig, config: RunConfig, mesh: Mesh, available: float) -> Path:
    """Returns the file of the choice, named by a digest of all that the memory depends on."""
    train = config.train.batch_size, config.train.micro_batch, config.train.ema
    sections = plain_fields(config.loss), plain_fields(config.optimizer)
    step = model, model.compute_dtype, sections, train
    devices = mesh.devices.flat[0].device_kind, sorted(mesh.shape.items()), f"{available:.2g}"
    content = repr((step, devices, jax.__version__, xclip_jax.__version__))
    digest = hashlib.blake2b(content.encode(), digest_size=8).hexdigest()
    return cache_folder() / "steps" / f"{digest}.json"


def _read_choice(file: Path) -> Settings | None:
    """Returns the settings chosen at an earlier start, or None."""
    try:
        return Settings(**json.loads(file.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def held_bytes(compiled: Any) -> int:
    """Returns the bytes of state and batch on a device."""
    memory = compiled.memory_analysis()
    sizes = memory.argument_size_in_bytes + memory.output_size_in_bytes
    return sizes - memory.alias_size_in_bytes


def peak_bytes(compiled: Any) -> int:
    """Returns the bytes of state, batch and temporary arrays on a device."""
    return held_bytes(compiled) + compiled.memory_analysis().temp_size_in_bytes


def device_memory(mesh: Mesh) -> float:
    """Returns the bytes of memory of a device that a step may take, infinite if unknown.

    That is MARGIN of the memory of this machine, or of the container, per device on CPU; of what
    JAX may allocate on an accelerator.
    """
    index = jax.process_index()
    local = [d for d in mesh.devices.flat if d.process_index == index]
    device: Any = (local or list(mesh.devices.flat))[0]
    if device.platform == "cpu":
        sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
        for path in CGROUPS:
            with contextlib.suppress(OSError, ValueError):  # "max": no limit
                sizes.append(int(Path(path).read_text()))
        return MARGIN * min(sizes) / jax.local_device_count()
    try:
        return MARGIN * device.memory_stats()["bytes_limit"]
    except (AttributeError, KeyError, TypeError, jax.errors.JaxRuntimeError):
        return math.inf  # of a topology, for which the compiler counts
