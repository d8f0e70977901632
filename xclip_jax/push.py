"""Writes a model to the Hugging Face hub, with a model card.

    python -m xclip_jax.push --model=runs/demo --repo=USER/NAME --private

The repository is created if it does not exist; a later push replaces the model in one commit.
`xclip_jax.load("USER/NAME")` loads it. Needs a token with the right to write, from `hf auth login`
or in the variable HF_TOKEN.
"""

import contextlib
import logging
import re
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    EvalResult,
    HfApi,
    ModelCard,
    ModelCardData,
    get_token,
)

from xclip_jax.checkpoint import MODEL_FILES, load_model, model_folder
from xclip_jax.cli import (
    CommandParser,
    InputError,
    PathLike,
    one_line_errors,
    read_json,
    run_command,
)
from xclip_jax.convert.importing import describe
from xclip_jax.convert.reading import HUB_ID, explain
from xclip_jax.report import DIRECTIONS, METRICS, list_facts, list_provenance, render
from xclip_jax.workdir import read_settings

CARD = "README.md"
OWN_CARD = "Written by xclip_jax push"  # in a card that may be replaced
_METRIC_TYPES = {"MdR": "median_rank", "MnR": "mean_rank"}


def push_to_hub(
    directory: PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    license: str | None = None,
    token: str | None = None,
) -> str:
    """Writes a model directory to a repository of the Hugging Face hub and returns its address.

    A new commit replaces the model that the repository holds, if any, and its README.md, the model
    card, if it contains the line that marks cards of this function. Other files are kept.

    Args:
        directory: a model directory, or a work directory, of which the card states the results.
        repo_id: USER/NAME or ORGANIZATION/NAME; the repository is created if it does not exist.
        private: visibility of a new repository (default: that of the account).
        license: identifier of the licence in the card, such as "mit" (default: none is stated).
        token: a token with the right to write (default: HF_TOKEN, or that of `hf auth login`).

    Raises:
        InputError: there is no model, it is corrupted, or the hub refuses it or is not reached.
    """
    if not re.fullmatch(HUB_ID, repo_id):
        raise InputError(f"{repo_id!r:.99}: must be USER/NAME, as the hub names repositories")
    if not (token or get_token()):
        raise InputError("no token of the hub: run `hf auth login` or set HF_TOKEN")
    folder, api = model_folder(directory).absolute(), HfApi(token=token)
    card = str(make_card(folder, repo_id, license=license))
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        found = api.model_info(repo_id)
        remote = {file.rfilename for file in found.siblings or []}
        if CARD in remote:
            path = api.hf_hub_download(repo_id, CARD, revision=found.sha)
            if OWN_CARD not in Path(path).read_text("utf-8"):
                logging.warning("README.md of %s was written by others and is kept", repo_id)
                card = ""
        files: dict[str, Any] = {CARD: card.encode()} if card else {}
        files |= {path.relative_to(folder).as_posix(): path for path in list_files(folder)}
        stale = [name for name in remote - files.keys() if _is_of_model(name)]
        operations = [CommitOperationAdd(name, content) for name, content in files.items()]
        operations += [CommitOperationDelete(name) for name in sorted(stale)]
        message = "Upload a model of xclip_jax"
        # A push in between is not undone: then parent_commit is not the newest any more.
        api.create_commit(repo_id, operations, commit_message=message, parent_commit=found.sha)
    except Exception as error:  # many types, from no network to no rights
        raise InputError(f"{repo_id} cannot be written on the hub: {explain(error)}") from None
    return f"{api.endpoint}/{repo_id}"


def list_files(folder: Path) -> list[Path]:
    """Returns the files of a model directory, without hidden and partial ones."""
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*"))}
    return [path for name, path in paths.items() if path.is_file() and _is_of_model(name)]


def _is_of_model(name: str) -> bool:
    is_partial = name.endswith(".part") or any(part.startswith(".") for part in name.split("/"))
    return not is_partial and any(fnmatch(name, pattern) for pattern in MODEL_FILES)


def make_card(folder: Path, repo_id: str, *, license: str | None = None) -> ModelCard:
    """Returns the model card of a model directory, with results and training of its run if known.

    Raises InputError if there is no model, it is corrupted, or the results are of other weights.
    """
    described, model, params, tokenizer = load_model(folder)
    config, results, settings = model.config, {}, {}
    with contextlib.suppress(FileNotFoundError):  # no work directory, or not evaluated yet
        if folder.name == "model":
            results = _read_results(folder.parent, described.get("step"))
            settings = read_settings(folder.parent)
    data_name, is_demo = results.get("dataset", ""), settings.get("data.rendered")
    if data_name == "captions":
        data_name = "xclip_jax's demo, moving shapes" if is_demo else "own captions"
    base = described.get("base_model") or _find_base(settings.get("init.clip"))
    data = ModelCardData(
        library_name="xclip_jax",
        pipeline_tag="feature-extraction",  # the hub has no task for retrieval
        tags=["video-text-retrieval", "video-retrieval", "x-clip", "jax", "flax"],
        license=license,
        base_model=base,
        model_name=repo_id.split("/")[1],
        eval_results=_list_results(results, data_name) if results else None,
    )
    text = render(
        "model_card.md",
        own_card=OWN_CARD,
        repo_id=repo_id,
        license=license,
        base=base,
        config=config,
        parts=describe(config, params, tokenizer),
        results=results,
        facts=list_facts(results) if results else [],
        training=_describe_training(results, settings, data_name) if settings else {},
        metrics=METRICS,
        directions=DIRECTIONS,
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{text}")


def _read_results(workdir: Path, step: int | None) -> dict[str, Any]:
    """Returns results.json of a work directory, or raises InputError if it is of another step.

    Raises FileNotFoundError if there is none.
    """
    path = workdir / "results.json"
    results = read_json(path)
    if results["step"] != step:
        advice = "evaluate the model with --config.mode=eval first"
        raise InputError(f"{path} is of step {results['step']}, the model of step {step}: {advice}")
    return results


def _find_base(encoders: str | None) -> str | None:
    """Returns the hub id that the encoders of a training came from, if the model records it."""
    if not encoders or not (file := model_folder(encoders) / "model.json").is_file():
        return None
    return read_json(file).get("base_model")


def _list_results(results: dict[str, Any], data_name: str) -> list[EvalResult]:
    """Returns the entries of the card's `model-index`, recalls in percent."""
    return [
        EvalResult(
            task_type=f"{way.replace('_', '-')}-retrieval",
            task_name=f"{name} retrieval",
            dataset_type=results["dataset"].split()[0],
            dataset_name=data_name,
            dataset_split=results["split"],
            dataset_args={"texts": results["num_texts"], "videos": results["num_videos"]},
            metric_type=_METRIC_TYPES.get(metric, f"recall_at_{metric[2:]}"),
            metric_name=metric,
            metric_value=round(results[way][metric], 2),
        )
        for way, name in DIRECTIONS.items()
        for metric in METRICS
    ]


def _describe_training(
    results: dict[str, Any], settings: dict[str, Any], data_name: str
) -> dict[str, str]:
    """Returns labelled texts on the training, without commands, which may name private folders."""
    start = "converted encoders" if settings["init.clip"] else "random"
    epochs = settings["train.epochs"]
    passes = f"{epochs} epoch{'s' * (epochs != 1)}"
    length = f"{passes} in batches of {settings['train.batch_size']} pairs"
    rows = {"data": data_name, "initial weights": start, "length": length}
    provenance = list_provenance(results.get("provenance", {}))
    hidden = ("command", "parameters", "evaluated")
    return rows | {name: text for name, text in provenance if not name.startswith(hidden)}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = CommandParser(prog="python -m xclip_jax.push", description=__doc__)
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="model directory or work directory")
    add("--repo", required=True, metavar="USER/NAME", help="repository on the hub")
    add("--private", action="store_true", help="make a new repository private")
    add("--license", help="identifier of the licence to state, for example mit or cc-by-4.0")
    options = parser.parse_args(argv)
    with one_line_errors():
        private = options.private or None
        address = push_to_hub(options.model, options.repo, private=private, license=options.license)
        print(f"model: {address}")


if __name__ == "__main__":
    run_command(main)
