"""Exports an index as an application of Vespa, which ranks by the same three stages.

An expression is a product of tensors with named dimensions: `frame` and `word` have only the cells
that take part, which replaces the masks. Not run: no Vespa was available. The tests evaluate the
written expressions with NumPy.
"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from xclip_jax.checkpoint import partial_folder
from xclip_jax.cli import InputError, PathLike, check_local, progress
from xclip_jax.inference import apply_model
from xclip_jax.retriever import Retriever
from xclip_jax.search.index import Index
from xclip_jax.search.querying import check_sentence
from xclip_jax.similarity import GRANULARITIES

_COLUMNS = ("id", "path", "start", "end", "count", "bias")
_QUERY = "select * from segment where true"  # scores every segment in the first phase
# Learned matrices of attention weights: {constant: its dimension}; see AggregationMatrices.
_WEIGHTS = {"video_word": "word", "frame_sentence": "frame"}
_WEIGHTS |= {f"frame_word_{side}s{n}": side for side in ("word", "frame") for n in ("", "_2")}


def export_application(index: Index, folder: PathLike) -> None:
    """Writes an application package, a feed of all segments and a README to a new folder.

    The folder gets `application/`, `feed.jsonl` and `README.md`, all or nothing. The widths of the
    phases are the index's `candidates` and `rerank`.

    Raises InputError if the folder is not empty, the index is, or its model has other similarities
    than the four granularities of X-CLIP fused by AOSM and their mean.
    """
    folder = check_local("--output", folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"--output={folder}: must be a new or empty folder")
    if not len(index):
        raise InputError(f"the index {index.location} is empty")
    retriever = index.retriever
    check_model(retriever)
    folder = Path(os.path.abspath(folder))
    partial = partial_folder(folder)
    _write_application(retriever, index, partial)
    bar = progress(len(index), "writing", "segment")
    with (partial / "feed.jsonl").open("w", encoding="utf-8") as file, bar:
        for document in _make_documents(index):
            file.write(json.dumps(document, ensure_ascii=False) + "\n")
            bar.update()
    os.replace(partial, folder)


def check_model(retriever: Retriever) -> None:
    """Raises InputError if the expressions cannot compute a model's similarity."""
    config = retriever.model.config
    expected: dict[str, Any] = {"head": "xclip", "fusion": "mean", "aggregation": "attention"}
    expected["granularities"] = GRANULARITIES
    for name, value in expected.items():
        if (actual := getattr(config, name)) != value:
            problem = f"--format=vespa: the model has model.{name} = {actual!r}"
            raise InputError(f"{problem}, and only {value!r} can be exported")


def make_query(
    retriever: Retriever, text: str, *, hits: int = 10, yql: str = _QUERY
) -> dict[str, Any]:
    """Returns the JSON body of a request to Vespa's query API.

    Args:
        retriever: the model of the index.
        text: the sentence.
        hits: number of results.
        yql: query that matches the segments to rank; default: all.

    Raises InputError if the text is empty, or the model has no tokenizer or other similarities.
    """
    check_model(retriever)
    model = retriever.model
    features = retriever.encode_text([check_sentence(text)])
    sentence_D, words_WxD = np.asarray(features.sentence)[0], np.asarray(features.words)[0]
    places = np.flatnonzero(np.asarray(model.aosm_words(features.mask))[0])
    tensors = {"sentence": sentence_D, "words": words_WxD}
    if matrices := _read_matrices(retriever):
        tensors["sentence_for_video"] = sentence_D @ matrices["video_sentence"]
        tensors["words_for_frames"] = words_WxD @ matrices["frame_word"]
    body: dict[str, Any] = {"yql": yql, "ranking.profile": "xclip", "hits": hits}
    for name, tensor in tensors.items():
        values = tensor.astype(float)
        blocks = values.tolist() if values.ndim == 1 else _to_blocks(values, places)
        body[f"input.query({name})"] = blocks
    return body


def _to_blocks(words_WxD: np.ndarray, places: np.ndarray) -> dict[str, list[float]]:
    """Returns {position: vector} of the words that take part."""
    return {str(place): words_WxD[place].tolist() for place in places}


def _read_matrices(retriever: Retriever) -> dict[str, np.ndarray]:
    """Returns the learned matrices by name, {} if the model has none."""
    matrices = apply_model(retriever.params, model=retriever.model, method="matrices")
    return {name: np.asarray(matrix) for name, matrix in matrices.items()}


def make_functions(
    tau: np.float32, *, scale: np.float32, offset: np.float32, has_matrices: bool
) -> dict[str, str]:
    """Returns {function: Vespa expression} of a model's score, which is `model_score`.

    Args:
        tau: temperature of AOSM.
        scale, offset: factor and addend from similarities to logits.
        has_matrices: True for the PyTorch release's learned matrices, see `make_query`.
    """
    sentence = "sentence_for_video" if has_matrices else "sentence"
    words = "words_for_frames" if has_matrices else "words"
    functions = {
        "video_sentence": f"reduce(query({sentence}) * attribute(video), sum)",  # Eq. 3
        "scores_video_word": "reduce(query(words) * attribute(video), sum, x)",  # Eq. 4
        "scores_frame_sentence": "reduce(query(sentence) * attribute(frames), sum, x)",  # Eq. 5
        "scores_frame_word": f"reduce(query({words}) * attribute(frames), sum, x)",  # Eq. 6
    }

    def attend(name: str, scores: str, matrix: str) -> None:
        """Adds AOSM along one dimension (Eq. 7, 8)."""
        along = _WEIGHTS[matrix]
        functions[f"exp_{name}"] = f"exp(({scores} - reduce({scores}, max, {along})) / {tau})"
        weighted = f"reduce(exp_{name} * {scores}, sum, {along})"
        if has_matrices:
            mixed = f"exp_{name} * constant(weights_{matrix})"
            mixed += f" * rename({scores}, {along}, to_{along})"
            weighted = f"reduce({mixed}, sum, {along}, to_{along})"
        functions[name] = f"{weighted} / reduce(exp_{name}, sum, {along})"

    attend("video_word", "scores_video_word", "video_word")
    attend("frame_sentence", "scores_frame_sentence", "frame_sentence")
    attend("by_word", "scores_frame_word", "frame_word_frames")  # Eq. 9
    attend("over_words", "by_word", "frame_word_words_2")  # Eq. 11
    attend("by_frame", "scores_frame_word", "frame_word_words")  # Eq. 10
    attend("over_frames", "by_frame", "frame_word_frames_2")  # Eq. 12
    functions["frame_word"] = "(over_words + over_frames) / 2"  # Eq. 13
    mean = f"({' + '.join(GRANULARITIES)}) / {len(GRANULARITIES)}"  # Eq. 14
    functions["model_score"] = f"{scale} * {mean} + {offset}"
    return functions


def _write_application(retriever: Retriever, index: Index, folder: Path) -> None:
    """Writes the application package and the README."""
    dim, scale = retriever.model.config.embed_dim, np.float32(retriever.scale)
    matrices, params = _read_matrices(retriever), retriever.params
    tau = np.float32(apply_model(params, model=retriever.model, method="tau"))
    offset = np.float32(params["logit_bias"] if retriever.model.config.logit_bias else 0)
    inputs = {"sentence": f"tensor<float>(x[{dim}])", "words": f"tensor<float>(word{{}},x[{dim}])"}
    if matrices:
        inputs |= {"sentence_for_video": inputs["sentence"], "words_for_frames": inputs["words"]}
    # Prefixed: without it, a constant would have the name of a function.
    names = {f"weights_{name}": _WEIGHTS[name] for name in _WEIGHTS if name in matrices}
    values = {
        "constants": {name: f"tensor<float>({d}{{}},to_{d}{{}})" for name, d in names.items()},
        "inputs": inputs,
        "functions": make_functions(tau, scale=scale, offset=offset, has_matrices=bool(matrices)),
        "phases": {
            "first": "video_sentence - attribute(bias)",
            "second": "(video_sentence + video_word) / 2 - attribute(bias)",
            "global": f"model_score - {scale} * attribute(bias)",
        },
        "dim": dim,
        "candidates": max(index.candidates, index.rerank),
        "rerank": index.rerank,
        "segments": f"{len(index):,}",
        "model": index.model_name,
    }
    application = folder / "application"
    (application / "schemas").mkdir(parents=True)
    for template, path in (
        ("vespa_segment.sd", application / "schemas/segment.sd"),
        ("vespa_services.xml", application / "services.xml"),
        ("vespa_README.md", folder / "README.md"),
    ):
        path.write_text(_render(template, values), "utf-8")
    for name, along in names.items():
        path = application / "constants" / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        cells = [
            {"address": {along: str(row), f"to_{along}": str(column)}, "value": float(value)}
            for (row, column), value in np.ndenumerate(matrices[name.removeprefix("weights_")])
        ]
        path.write_text(json.dumps({"cells": cells}), "utf-8")


def _render(template: str, values: Mapping[str, Any]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("xclip_jax.search"),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)


def _make_documents(index: Index) -> Iterator[dict[str, Any]]:
    """Yields the put operations of all segments in Vespa's JSON format."""
    padding_competes = index.retriever.model.config.padding == "competes"
    for table in index.tables():
        names = [name for name in _COLUMNS if name in table.column_names]
        vectors = [np.stack(table[name].to_numpy()) for name in ("video", "frames")]
        for row, video_D, frames in zip(table.select(names).to_pylist(), *vectors, strict=True):
            frames_FxD = frames.reshape(-1, len(video_D))
            frames_FxD = frames_FxD if padding_competes else frames_FxD[: row["count"]]
            fields = {"path": row["path"], "start": row["start"], "end": row["end"]}
            fields["bias"] = row.get("bias", 0.0)
            fields["video"] = {"values": _to_hex(video_D)}
            fields["frames"] = {str(n): _to_hex(frame_D) for n, frame_D in enumerate(frames_FxD)}
            yield {"put": f"id:xclip:segment::{row['id']}", "fields": fields}


def _to_hex(vector: np.ndarray) -> str:
    """Returns numbers as Vespa's hex dump: float32, most significant byte first."""
    return vector.astype(">f4").tobytes().hex().upper()
