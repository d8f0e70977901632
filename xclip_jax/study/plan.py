"""From studies to runs: each a work directory of xclip_jax.main, shared by all studies."""

import dataclasses
import functools
import hashlib
import json
import re
import zipfile
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from xclip_jax.checkpoint import check_same_run, is_below
from xclip_jax.cli import InputError
from xclip_jax.config import field_value, validate
from xclip_jax.data.builder import Dataset
from xclip_jax.evaluate import RANKS_FILE
from xclip_jax.models import resolve

RESULTS = "results.json"
FAILED = "failed.txt"  # in a work directory: why its last try failed
LONGEST_NAME = 150  # of a folder


@dataclasses.dataclass
class Run:
    """One training of one variant with one seed.

    Attributes:
        name: of the first study, variant and seed that it is of.
        config_file: as on the command line.
        workdir: its work directory.
        config: its config, complete.
        fields: {field: value} of its command line.
        evaluation: {field of config.eval: value} that its results must have been made with.
    """

    name: str
    config_file: str
    workdir: Path
    config: ConfigDict
    fields: dict
    evaluation: dict = dataclasses.field(default_factory=dict)

    @property
    def arguments(self):
        """What follows `python -m xclip_jax.main`."""
        fields = {**self.fields, **{f"eval.{k}": v for k, v in self.evaluation.items()}}
        given = [f"--config.{field}={value}" for field, value in fields.items()]
        return [f"--config={self.config_file}", f"--workdir={self.workdir}", *given]

    def check(self):
        """Raises InputError if the work directory belongs to a run of another config."""
        try:
            json.loads((self.workdir / "config.json").read_text())
        except (OSError, ValueError):
            return  # not begun; or damaged, which the run itself will say
        try:
            check_same_run(self.workdir, self.config, _dataset(self.config.data.path))
        except InputError as error:
            raise InputError(str(error).replace("--workdir", "--output")) from None

    def results(self):
        """What ranks.npz holds; None where the run is not finished, or its files are damaged."""
        try:
            told = json.loads((self.workdir / RESULTS).read_text())["eval"]
            with np.load(self.workdir / RANKS_FILE) as file:
                ranks = dict(file)
        except (OSError, ValueError, EOFError, KeyError, TypeError, zipfile.BadZipFile):
            return None
        same = all(told.get(name) == value for name, value in self.evaluation.items())
        return ranks if same else None

    def failure(self):
        """Why the last try failed; None if it did not."""
        path = self.workdir / FAILED
        return path.read_text() if path.is_file() else None


_dataset = functools.cache(Dataset)


def plan(studies, config_file, base, given, seeds, output):
    """The runs of studies: {(study, variant): [Run of each seed]}.

    Variants that train the same thing share their runs, whatever study they are of.

    Args:
        studies: {name: Study}.
        config_file: on the command line, with the words after its colon.
        base: the config that it and `given` make.
        given: {field: value} of its overrides, which every run repeats.
        seeds: how many.
        output: folder of all.

    Raises:
        InputError: a variant changes a field that there is not, or to a value of another type, or
            two want other test-time options of the same run.
    """
    by_folder, planned = {}, {}
    for study_name, study in studies.items():
        for name, variant in study.variants.items():
            where = f"--study={study_name}, variant {name!r}"
            fields = _effective(base, variant.overrides, where)
            training = {k: v for k, v in fields.items() if not is_below(k, "eval")}
            evaluation = {
                k.removeprefix("eval."): fields[k] for k in fields.keys() - training.keys()
            }
            folder = output / "runs" / slug(training)
            runs = []
            for seed in range(base.seed, base.seed + seeds):
                together = {**given, **training, "seed": seed}
                config = _changed(base, together, where)
                told = f"{study_name}: {name}, seed {seed}"
                run = Run(told, config_file, folder / f"seed{seed}", config, together)
                runs.append(by_folder.setdefault(run.workdir, run))
                _merge(runs[-1].evaluation, evaluation, where)
            planned[study_name, name] = runs
    return planned


def _merge(evaluation, wanted, where):
    for name, value in wanted.items():
        if evaluation.setdefault(name, value) != value:
            raise InputError(
                f"{where}: config.eval.{name} = {value!r}, but {evaluation[name]!r} in another "
                "variant of the same training: give one of them another --output"
            )


def _changed(config, overrides, where):
    """A copy of a config with other values in some fields, as its types have them."""
    config = ConfigDict(config.to_dict(), convert_dict=True).lock()
    for field, value in overrides.items():
        group, _, name = field.rpartition(".")
        try:
            parent = field_value(config, group) if group else config
            if isinstance(parent[name], ConfigDict):
                raise TypeError(f"a group of fields: write {field}.NAME")
            setattr(parent, name, value)
        except (AttributeError, KeyError, TypeError) as error:
            reason = " ".join(str(error.args[0] if error.args else error).split())
            raise InputError(f"{where}: config.{field} = {value!r}: {reason}") from None
    return config


def _effective(base, overrides, where):
    """Those overrides that change anything: one that repeats the base's value is left out.

    A config that is not valid keeps all: its run will say why.
    """
    if "seed" in overrides:
        raise InputError(f"{where}: seeds are set by --seeds and --config.seed")
    changed = _changed(base, overrides, where)
    kept = {field: field_value(changed, field) for field in overrides}
    try:
        validate(changed)
    except InputError:
        return kept
    for field in overrides:
        without = {other: value for other, value in kept.items() if other != field}
        if _meaning(_changed(base, kept, where)) == _meaning(_changed(base, without, where)):
            kept = without
    return kept


def _meaning(config):
    """A config with what the preset and the head say filled in."""
    plain = json.loads(config.to_json())
    return {**plain, "model": resolve(plain["model"])}


def slug(overrides):
    """A folder's name for overrides: base, model.tau=0.1; other overrides have another one."""
    texts = {k: "+".join(v) if isinstance(v, tuple) else str(v) for k, v in overrides.items()}
    exact = ",".join(f"{field}={texts[field]}" for field in sorted(texts)) or "base"
    name = re.sub(r"[^\w.+=,-]+", "_", exact)
    if name == exact and len(name) <= LONGEST_NAME:
        return name
    return f"{name[:LONGEST_NAME]}~{hashlib.sha256(exact.encode()).hexdigest()[:8]}"
