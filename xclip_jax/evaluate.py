"""Evaluates a model: encodes a split, compares texts with videos, writes metrics and report."""

import dataclasses
import itertools
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jaxtyping import Float, Int, UInt8
from tqdm import tqdm

from xclip_jax import inference, metrics, provenance
from xclip_jax.cli import InputError, atomic_file, progress, write_atomically
from xclip_jax.config import RunConfig
from xclip_jax.data.annotations import read_queries
from xclip_jax.data.builder import Dataset
from xclip_jax.data.pipeline import TrainingPairs, choose_frames, evaluation_batches, load_frames
from xclip_jax.data.preprocess import frame_format
from xclip_jax.distributed import gather_objects, is_first_process
from xclip_jax.models import ModelConfig
from xclip_jax.monitor import flatten_metrics, read_metrics
from xclip_jax.paper import paper_results
from xclip_jax.report import DIRECTIONS, format_table, list_pictures, write_report
from xclip_jax.report.figures import WordFrameAttention
from xclip_jax.retriever import Retriever, load
from xclip_jax.similarity import TextFeatures, VideoFeatures
from xclip_jax.trackers import open_trackers
from xclip_jax.workdir import current_settings, default_settings, plain_fields

Tree = TypeVar("Tree")
BankCosines = tuple[Float[np.ndarray, "T V"], Float[np.ndarray, "B V"]]
RANKS_FILE = "ranks.npz"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The features and similarities of a split: T texts, V videos."""

    config: RunConfig
    retriever: Retriever
    clips: Sequence[Mapping[str, Any]]  # V records, see data.builder
    clip_names: list[str]
    captions: list[str]
    text_video_T: Int[np.ndarray, " T"]  # index of each text's video
    text: TextFeatures
    video: VideoFeatures
    sim_TxV: Float[np.ndarray, "T V"]
    parts: dict[str, Float[np.ndarray, "T V"]]  # of each granularity, if kept


def evaluate(config: RunConfig, workdir: str | Path) -> dict[str, Any]:
    """Evaluates the model of a work directory and returns the content of results.json.

    The first process prints the results and writes them with the report. Raises InputError if there
    is no model yet, or it does not fit the data.
    """
    workdir, start = Path(workdir), time.perf_counter()
    retriever = load(workdir / "model")
    retriever.params = inference.copy_to_local_devices(retriever.params)
    vision, tokenizer = retriever.model.config.vision, retriever.get_tokenizer()
    dataset = Dataset(config.data.path, config.data.dataset, config.data.variant)
    check_frames(dataset, retriever.model.config)
    split, selected_on, note = config.data.test_split, retriever.config.get("selected_on"), {}
    if split == "test" and split not in dataset.captions_per_clip:
        split = config.data.train_split
        note["note"] = f"evaluated on the {split} split, clips it was trained on: no test split"
    elif split == selected_on:
        note["note"] = f"weights were selected on the {split} split itself: numbers are too high"
    evaluation = evaluate_split(config, retriever, dataset, split, granular=True)
    if not np.isfinite(evaluation.sim_TxV).all():
        raise InputError(f"{workdir / 'model'} computes similarities that are NaN or infinite")
    counts = _count_ranks(evaluation, dataset)
    tables = {}
    for option, by_way in counts.items():
        tables[option] = {way: metrics.summarize(*both) for way, both in by_way.items()}
    num_texts, num_videos = len(evaluation.captions), len(evaluation.clip_names)
    many = "many captions" if num_texts > num_videos else "single caption"
    expected = dataset.expected.get(split, num_videos)
    results = {
        "name": config.name,
        "step": retriever.config["step"],
        "split": split,
        "dataset": f"{dataset.name} {dataset.variant}".strip(),
        # paragraph: the captions of a video joined; many captions: each alone, and video to text
        # takes the best-scoring caption of each candidate video
        "protocol": "paragraph" if dataset.paragraphs else many,
        "num_texts": num_texts,
        "num_videos": num_videos,
        "expected_videos": expected,  # the paper's number for a benchmark
        "missing_videos": max(0, expected - num_videos),
        "max_seconds": dataset.max_seconds,
        "selected_on": selected_on,
        **tables.pop(""),
        "queries": _evaluate_queries(evaluation),
        "granularities": {
            name: metrics.retrieval_metrics(part_TxV, evaluation.text_video_T)
            for name, part_TxV in evaluation.parts.items()
            if len(evaluation.parts) > 1
        },
        "normalized": tables,
        "eval": plain_fields(config.eval),
        "paper": paper_results(dataset.name, dataset.variant, vision) if split == "test" else {},
        "truncated_captions": sum(map(tokenizer.is_truncated, evaluation.captions)),
        **note,
        "provenance": provenance.describe_results(workdir, retriever.params, start),
    }
    if is_first_process():
        _write(evaluation, workdir, results, counts)
    return results


def evaluate_split(
    config: RunConfig, retriever: Retriever, dataset: Dataset, split: str, *, granular: bool = False
) -> Evaluation:
    """Encodes every caption and video of a split once and compares all with all.

    `granular`: keep the similarities of each granularity, too.

    Each process encodes a part of the clips and compares their captions with all videos. Raises
    InputError if there are fewer clips than processes.
    """
    clips, size = dataset.clips(split), config.eval.batch_size
    index, processes = jax.process_index(), jax.process_count()
    if len(clips) < processes:
        raise InputError(f"{len(clips)} clips to evaluate: must be at least one per process")
    start, end = (len(clips) * i // processes for i in (index, index + 1))
    names, captions = [], []  # of each clip

    def encode(bar: tqdm) -> Iterator[VideoFeatures]:
        frames = retriever.model.config.max_frames, dataset.format
        batches = evaluation_batches(clips, size, *frames, slice(start, end))
        for frames, masks, batch_captions, batch_names in batches:
            yield retriever.encode("encode_video", (frames, masks), size)
            captions.extend(batch_captions)
            names.extend(batch_names)
            bar.update(len(frames))

    with progress(end - start, f"encoding {split} videos", "video") as bar:
        video = inference.concatenate_features(encode(bar), end - start)
    text = retriever.encode_text(list(itertools.chain(*captions)), size)
    video = _join_processes(video)
    with progress(len(text.mask) * len(video.mask), "comparing", "pair") as bar:
        compare = retriever.similarities if granular else retriever.similarity
        sims = compare(text, video, block_cells=config.eval.block_cells, bar=bar)
    parts = sims if isinstance(sims, dict) else {"all": sims}
    sim_TxV = parts.pop("all")
    text, sim_TxV, parts = _join_processes((text, sim_TxV, parts))
    names, captions = (list(itertools.chain(*gather_objects(x))) for x in (names, captions))
    return Evaluation(
        config=config,
        retriever=retriever,
        clips=clips,
        clip_names=names,
        captions=list(itertools.chain(*captions)),
        text_video_T=np.repeat(np.arange(len(names)), [len(texts) for texts in captions]),
        text=text,
        video=video,
        sim_TxV=sim_TxV,
        parts=parts,
    )


def _join_processes(tree: Tree) -> Tree:
    """Concatenates arrays over all processes."""
    parts = gather_objects(tree)
    return tree if len(parts) == 1 else jax.tree.map(lambda *xs: np.concatenate(xs), *parts)


def _count_ranks(e: Evaluation, dataset: Dataset) -> dict[str, dict[str, metrics.RankCounts]]:
    """Returns {test-time option, or "" for the plain logits: {direction: counts}}."""
    config, sim_TxV, text_video_T = e.config, e.sim_TxV, e.text_video_T
    counts = {"": metrics.retrieval_counts(sim_TxV, text_video_T)}
    if config.eval.dual_softmax:
        by_video = metrics.best_caption_scores(metrics.dual_softmax(sim_TxV.T).T, text_video_T)
        counts["dual softmax"] = {
            "text_to_video": metrics.rank_counts(metrics.dual_softmax(sim_TxV), text_video_T),
            "video_to_text": metrics.rank_counts(by_video, np.arange(len(by_video))),
        }
    banks = {
        "QB-Norm": (config.eval.qb_norm, metrics.qb_norm),
        "hubness bias": (config.eval.hubness_bias, metrics.subtract_hubness_bias),
    }
    sizes = {size for size, _ in banks.values() if size}
    compared = {size: _compare_with_bank(e, dataset, size) for size in sizes}
    for name, (size, normalize) in banks.items():
        if size:
            similarities_TxV, bank_BxV = compared[size]
            normalized_TxV = normalize(similarities_TxV, bank_BxV)
            # Video to text would need a bank of videos.
            ranks = {"text_to_video": metrics.rank_counts(normalized_TxV, text_video_T)}
            counts[f"{name} ({len(bank_BxV):,} captions)"] = ranks
    return counts


def _evaluate_queries(e: Evaluation) -> dict[str, Any]:
    """Returns the recalls of the sentences in config.eval.queries, or {} if it is not set."""
    config = e.config
    if not config.eval.queries:
        return {}
    path = check_queries(config)
    try:
        texts, relevant_QxV = read_queries(path, e.clip_names)
    except InputError as error:
        raise InputError(f"{error}; or set config.eval.queries to ''") from None
    text = e.retriever.encode_text(texts, config.eval.batch_size)
    sim_QxV = e.retriever.similarity(text, e.video, block_cells=config.eval.block_cells)

    def summarize(scores_QxV: Float[np.ndarray, "Q V"]) -> dict[str, float]:
        recalls = {k: metrics.recall_of_any(scores_QxV, relevant_QxV, k) for k in (1, 5, 10)}
        return {f"R@{k}": float(recall_Q.mean()) for k, recall_Q in recalls.items()}

    return {
        "name": path.stem.replace("_", " "),
        "num_texts": len(texts),
        "mean_right_videos": float(relevant_QxV.sum(1).mean()),
        "text_to_video": summarize(sim_QxV),
        "chance": summarize(np.zeros_like(sim_QxV)),
    }


def check_queries(config: RunConfig) -> Path:
    """Returns the path of config.eval.queries, or raises InputError if it is set and no file."""
    path = Path(config.data.path) / config.eval.queries
    if config.eval.queries and not path.is_file():
        problem = f"config.eval.queries = {config.eval.queries!r}: no file {path}"
        raise InputError(f"{problem}; set it to '' to evaluate without queries")
    return path


def _compare_with_bank(e: Evaluation, dataset: Dataset, size: int) -> BankCosines:
    """Returns the similarities of the T texts and of B training captions with the V videos.

    The captions are `size` random ones, the same in every call, or all if there are fewer.
    """
    pairs = TrainingPairs(dataset, e.config.data.train_split, "all")
    drawn = np.random.default_rng(0).permutation(len(pairs))[:size]
    records = (pairs[int(index)] for index in drawn)
    captions = [record["captions"][caption].decode() for record, _, caption in records]
    bank = e.retriever.encode_text(captions, e.config.eval.batch_size)
    with progress(len(captions) * len(e.video.mask), "comparing with the bank", "pair") as bar:
        cells = e.config.eval.block_cells
        bank_BxV = e.retriever.similarity(bank, e.video, block_cells=cells, bar=bar)
    return e.sim_TxV / e.retriever.scale, bank_BxV / e.retriever.scale


def _write(e: Evaluation, workdir: Path, results: dict[str, Any], counts: dict[str, Any]) -> None:
    """Writes the report, results.json and the ranks of all queries, and prints the results."""
    c = e.retriever.model.config

    def read_frames(video: int) -> UInt8[np.ndarray, "F S S 3"]:
        frames, mask_F = load_frames(e.clips[video], c.max_frames, frame_format(c))
        return frames[mask_F]

    def attend(text: int) -> WordFrameAttention:
        """Returns AOSM's weights of a caption and its video."""
        video = int(e.text_video_T[text])
        pair = inference.slice_rows(e.text, text), inference.slice_rows(e.video, video)
        words, weights_WxF = e.retriever.attention(e.captions[text], *pair)
        times = np.asarray(e.clips[video]["times"])
        chosen = choose_frames(len(times), c.max_frames, spread=c.preprocess.spread)
        return WordFrameAttention(
            words=words,
            weights_WxF=weights_WxF,
            times=times[chosen].tolist(),
            caption=e.captions[text],
            frames_FxSxSx3=read_frames(video),
            clip=e.clip_names[video],
        )

    is_attending = c.has_granularities and "frame_word" in c.granularities
    is_attending = is_attending and c.aggregation == "attention"
    count = min(e.config.report.attention_pairs, len(e.captions)) if is_attending else 0
    texts = np.linspace(0, len(e.captions) - 1, count).astype(int)
    index = write_report(
        workdir / "report",
        results,
        e.sim_TxV,
        captions=e.captions,
        text_video_T=e.text_video_T,
        clip_names=e.clip_names,
        load_frames=read_frames,
        attentions=[attend(text) for text in texts.tolist()],
        curves=read_metrics(workdir),
        settings=current_settings(workdir, e.config),
        defaults=default_settings(),
    )
    # For confidence intervals: by "DIRECTION" or "OPTION/DIRECTION" 2 x Q integers, see
    # `rank_counts`, and the index of each text's video.
    arrays = {"text_video": e.text_video_T}
    for option, by_way in counts.items():
        arrays |= {f"{option}/{way}".strip("/"): np.stack(both) for way, both in by_way.items()}
    with atomic_file(workdir / RANKS_FILE) as partial, partial.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)
    write_atomically(workdir / "results.json", json.dumps(results, indent=2) + "\n")
    with open_trackers(e.config, workdir) as trackers:
        scalars = flatten_metrics(results["split"], {way: results[way] for way in DIRECTIONS})
        for tracker in trackers:
            tracker.log_results(results["step"], scalars, list_pictures(index.parent))
    print(f"\n{format_table(results)}")
    if truncated := results["truncated_captions"]:
        limit = f"model.max_words = {e.config.model.max_words} tokens"
        print(f"{truncated:,} of {len(e.captions):,} texts truncated to {limit}")
    print(f"\nreport: {index}")


def check_frames(dataset: Dataset, model_config: ModelConfig) -> None:
    """Raises InputError if the data set's frames do not have the model's format."""
    format, spread = frame_format(model_config), dataset.format.spread
    if dataset.format == format or (
        # Of more frames than the model takes, a part is used.
        spread > format.spread > 0 and dataset.format._replace(spread=format.spread) == format
    ):
        return
    options = zip(format._fields, format.key, strict=False)
    flags = " ".join(f"--{name}={value}" for name, value in options)
    advice = f"prepare the data again with {flags}"
    if dataset.format == format._replace(image_size=dataset.image_size):
        needed = f"{dataset.image_size}, the size of the frames in {dataset.path}"
        field = f"config.model.vision.image_size = {format.image_size}"
        raise InputError(f"{field}: must be {needed} (or {advice})")
    names = ["vision.image_size", "preprocess.resize", "preprocess.interpolation", "max_frames"]
    needed, actual = list(format), list(dataset.format)
    if 0 in (spread, format.spread):  # else both are numbers of frames
        names[-1] = "preprocess.spread"
        needed[-1], actual[-1] = format.spread > 0, spread > 0
    triples = zip(names, needed, actual, strict=True)
    wrong = [triple for triple in triples if triple[1] != triple[2]]
    fields = ", ".join(f"config.model.{name} = {needed!r}" for name, needed, _ in wrong)
    values = ", ".join(repr(actual) for *_, actual in wrong)
    problem = f"the frames in {dataset.path} were made with {values}"
    raise InputError(f"{fields}: {problem}: {advice}")
