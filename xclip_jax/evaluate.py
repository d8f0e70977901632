"""Evaluates a model: encodes a split, compares texts with videos, writes metrics and report."""

import dataclasses
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from tqdm import tqdm

from xclip_jax import inference, metrics
from xclip_jax.checkpoint import plain_fields
from xclip_jax.cli import InputError, progress
from xclip_jax.config import RunConfig
from xclip_jax.data.builder import Dataset
from xclip_jax.data.pipeline import TrainingPairs, choose_frames, evaluation_batches, load_frames
from xclip_jax.data.text import Tokenizer
from xclip_jax.distributed import gather_objects, is_first_process
from xclip_jax.models import ModelConfig, XClip
from xclip_jax.monitor import read_metrics
from xclip_jax.paper import paper_results
from xclip_jax.report import WordFrameAttention, format_table, write_report
from xclip_jax.retriever import Retriever, load
from xclip_jax.similarity import AnyArray, TextFeatures, VideoFeatures

Tree = TypeVar("Tree")
RANKS_FILE = "ranks.npz"
Results = dict[str, Any]  # content of results.json
Counts = Mapping[str, metrics.RankCounts]  # by direction


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The features and similarities of a split: T texts, V videos.

    Attributes:
        text_video_T: index of each text's video.
        truncated: number of texts longer than max_words.
    """

    clips: Sequence[Mapping[str, Any]]
    captions: list[str]
    text_video_T: Int[np.ndarray, " T"]
    clip_names: list[str]
    text: TextFeatures
    video: VideoFeatures
    sim_TxV: Float[np.ndarray, "T V"]
    truncated: int


def evaluate(config: RunConfig, workdir: str | Path) -> Results:
    """Evaluates the model of a work directory, prints the results and writes the report.

    Returns:
        The content of results.json.

    Raises:
        InputError: there is no model yet, or it does not fit the data.
    """
    workdir = Path(workdir)
    retriever = load(workdir / "model")
    retriever.params = inference.copy_to_local_devices(retriever.params)
    dataset = Dataset(config.data.path, config.data.dataset, config.data.variant)
    check_image_size(dataset, retriever.model.config)
    split, selected_on, note = config.data.test_split, retriever.config.get("selected_on"), None
    if split == "test" and split not in dataset.captions_per_clip:
        split = config.data.train_split
        note = f"evaluated on the {split} split, clips it was trained on: there is no test split"
    elif split == selected_on:
        note = f"the weights were selected on the {split} split itself, which increases the numbers"
    evaluation = evaluate_split(config, retriever, dataset, split)
    if not np.isfinite(evaluation.sim_TxV).all():
        raise InputError(f"{workdir / 'model'} computes similarities that are NaN or infinite")
    counts = _count_ranks(config, retriever, dataset, evaluation)
    tables = {
        option: {way: metrics.summarize(*both) for way, both in by_way.items()}
        for option, by_way in counts.items()
    }
    vision, name, variant = retriever.model.config.vision, dataset.name, dataset.variant
    results = {
        "step": retriever.config["step"],
        "split": split,
        **_describe_protocol(dataset, split, evaluation),
        "selected_on": selected_on,
        **tables.pop(""),
        "normalized": tables,
        "eval": plain_fields(config.eval),
        "paper": paper_results(name, variant, vision) if split == "test" else {},
        "truncated_captions": evaluation.truncated,
        **({"note": note} if note else {}),
    }
    if is_first_process():
        index = _write_report(config, workdir, retriever, evaluation, results)
        _write_results(workdir, results, counts, evaluation)
        print(f"\n{format_table(results)}")
        if evaluation.truncated:
            count = f"{evaluation.truncated:,} of {len(evaluation.captions):,} texts"
            print(f"{count} truncated to model.max_words = {config.model.max_words} tokens")
        print(f"\nreport: {index}")
    return results


def evaluate_split(
    config: RunConfig, retriever: Retriever, dataset: Dataset, split: str
) -> Evaluation:
    """Encodes every caption and video of a split once and compares all with all.

    Each process encodes a part of the clips and compares a part of the texts.
    """
    clips, size = dataset.clips(split), config.eval.batch_size
    model, params, tokenizer = retriever.model, retriever.params, retriever.get_tokenizer()
    part = _own_part(len(clips))
    names, captions = [], []  # of each clip

    def encode(bar: tqdm) -> Iterator[VideoFeatures]:
        batches = evaluation_batches(clips, size, model.config.max_frames, dataset.image_size, part)
        for frames, masks, batch_captions, batch_names in batches:
            yield inference.encode_videos(model, params, frames, masks, size)
            captions.extend(batch_captions)
            names.extend(batch_names)
            bar.update(len(frames))

    count = part.stop - part.start
    with progress(count, f"encoding {split} videos", "video") as bar:
        video = inference.concatenate_features(encode(bar), count)
    ids_TxW, mask_TxW = tokenizer(list(itertools.chain(*captions)))
    text = inference.encode_texts(model, params, ids_TxW, mask_TxW, size)
    text, video = _join_processes((text, video))
    names, captions = (list(itertools.chain(*gather_objects(x))) for x in (names, captions))
    part = _own_part(len(text.mask))
    own_text = jax.tree.map(lambda x: x[part], text)
    sim_TxV = _compare(config, retriever, own_text, video, "comparing")
    flat = list(itertools.chain(*captions))
    return Evaluation(
        clips=clips,
        captions=flat,
        text_video_T=np.repeat(np.arange(len(names)), [len(texts) for texts in captions]),
        clip_names=names,
        text=text,
        video=video,
        sim_TxV=_join_processes(sim_TxV),
        truncated=sum(map(tokenizer.is_truncated, flat)),
    )


def _compare(
    config: RunConfig, retriever: Retriever, text: TextFeatures, video: VideoFeatures, task: str
) -> Float[np.ndarray, "T V"]:
    """Returns the logits of all pairs, with a progress bar."""
    model, params, cells = retriever.model, retriever.params, config.eval.block_cells
    block = "{} x {}".format(*inference.plan_blocks(model, text, video, cells))
    count = len(text.mask) * len(video.mask)
    with progress(count, f"{task} blocks of {block}", "pair") as bar:
        options = {"block_cells": cells, "bar": bar}
        return inference.similarity_in_blocks(model, params, text, video, **options)


def _own_part(total: int) -> slice:
    """Returns this process's part of `total` rows."""
    index, count = jax.process_index(), jax.process_count()
    if total < count:
        raise InputError(
            f"{total} clips or texts to evaluate: must be at least {count}, the number of processes"
        )
    return slice(total * index // count, total * (index + 1) // count)


def _join_processes(tree: Tree) -> Tree:
    """Concatenates arrays over all processes."""
    if jax.process_count() == 1:
        return tree
    return jax.tree.map(lambda *parts: np.concatenate(parts), *gather_objects(tree))


def _describe_protocol(dataset: Dataset, split: str, evaluation: Evaluation) -> dict[str, Any]:
    """Returns the fields of results.json that describe the evaluation protocol.

    `protocol` is "paragraph" (the captions of a video joined), "many captions" (each alone; video
    to text takes the best-scoring caption of each candidate video) or "single caption".
    `expected_videos` is the paper's number for a benchmark, else that of the annotations.
    """
    num_texts, num_videos = len(evaluation.captions), len(evaluation.clip_names)
    many = "many captions" if num_texts > num_videos else "single caption"
    expected = dataset.expected.get(split, num_videos)
    return {
        "dataset": f"{dataset.name} {dataset.variant}".strip(),
        "protocol": "paragraph" if dataset.paragraphs else many,
        "num_texts": num_texts,
        "num_videos": num_videos,
        "expected_videos": expected,
        "missing_videos": max(0, expected - num_videos),
        "max_seconds": dataset.max_seconds,
    }


def _count_ranks(
    config: RunConfig, retriever: Retriever, dataset: Dataset, evaluation: Evaluation
) -> dict[str, Counts]:
    """Returns the rank counts by test-time option: "" (none) and the enabled normalisations."""
    sim_TxV, text_video_T = evaluation.sim_TxV, evaluation.text_video_T
    counts: dict[str, Counts] = {"": metrics.retrieval_counts(sim_TxV, text_video_T)}
    if config.eval.dual_softmax:
        by_video = metrics.best_caption_scores(metrics.dual_softmax(sim_TxV.T).T, text_video_T)
        counts["dual softmax"] = {
            "text_to_video": metrics.rank_counts(metrics.dual_softmax(sim_TxV), text_video_T),
            "video_to_text": metrics.rank_counts(by_video, np.arange(len(by_video))),
        }
    if config.eval.qb_norm:
        model, params = retriever.model, retriever.params
        pairs = TrainingPairs(dataset, config.data.train_split, "all")
        drawn = np.random.default_rng(0).permutation(len(pairs))[: config.eval.qb_norm]
        records = (pairs[int(index)] for index in drawn)
        captions = [record["captions"][caption].decode() for record, _, caption in records]
        inputs = retriever.get_tokenizer()(captions)
        bank = inference.encode_texts(model, params, *inputs, config.eval.batch_size)
        bank_BxV = _compare(config, retriever, bank, evaluation.video, "comparing with the bank:")
        is_scaled = model.config.has_granularities
        scale = float(np.exp(params["clip"]["logit_scale"])) if is_scaled else 1.0
        normalized_TxV = metrics.qb_norm(sim_TxV / scale, bank_BxV / scale)
        # Video to text would need a bank of videos.
        ranks = {"text_to_video": metrics.rank_counts(normalized_TxV, text_video_T)}
        counts[f"QB-Norm ({len(captions):,} captions)"] = ranks
    return counts


def _write_results(
    workdir: Path, results: Results, counts: Mapping[str, Counts], evaluation: Evaluation
) -> None:
    """Writes results.json and the counts of every query, which confidence intervals need.

    Keys of the second file: "DIRECTION" and "OPTION/DIRECTION": 2 x Q integers, see `rank_counts`;
    "text_video": T integers, the index of each text's video.
    """
    arrays = {
        f"{option}/{way}".strip("/"): np.stack(both)
        for option, by_way in counts.items()
        for way, both in by_way.items()
    }
    partial = workdir / "ranks.part.npz"
    np.savez(partial, allow_pickle=False, text_video=evaluation.text_video_T, **arrays)
    os.replace(partial, workdir / RANKS_FILE)
    partial = workdir / "results.json.part"
    partial.write_text(json.dumps(results, indent=2) + "\n")
    os.replace(partial, workdir / "results.json")


def check_image_size(dataset: Dataset, model_config: ModelConfig) -> None:
    """Raises InputError if the data set's frames do not have the model's image size."""
    side = model_config.vision.image_size
    if dataset.image_size != side:
        raise InputError(
            f"config.model.vision.image_size = {side}: must be {dataset.image_size}, the size of "
            f"the frames in {dataset.path} (or prepare the data again with --image_size={side})"
        )


def _write_report(
    config: RunConfig, workdir: Path, retriever: Retriever, evaluation: Evaluation, results: Results
) -> Path:
    model, c = retriever.model, retriever.model.config
    clips, text_video_T = evaluation.clips, evaluation.text_video_T

    def read_frames(video: int) -> UInt8[np.ndarray, "F S S 3"]:
        frames, mask_F = load_frames(clips[video], c.max_frames, c.vision.image_size)
        return frames[mask_F]

    def attend(text: int) -> WordFrameAttention:
        """Returns AOSM's weights of a caption and its video."""
        video = int(text_video_T[text])
        one_text = inference.slice_rows(evaluation.text, text)
        one_video = inference.slice_rows(evaluation.video, video)
        weights_1xWxF = inference.apply_model(
            retriever.params, one_text, one_video, model=model, method="word_frame_attention"
        )
        times = np.asarray(clips[video]["times"])
        caption, mask_W = evaluation.captions[text], np.asarray(one_text.mask[0])
        words, words_W = list_words(model, retriever.get_tokenizer(), caption, mask_W)
        return WordFrameAttention(
            words=words,
            weights_WxF=np.asarray(weights_1xWxF)[0, words_W][:, one_video.mask[0]],
            times=times[choose_frames(len(times), c.max_frames)].tolist(),
            caption=caption,
            frames_FxSxSx3=read_frames(video),
            clip=evaluation.clip_names[video],
        )

    count = 0
    if c.has_granularities and "frame_word" in c.granularities:
        count = min(config.report.attention_pairs, len(text_video_T))
    texts = np.linspace(0, len(text_video_T) - 1, count).astype(int)
    return write_report(
        workdir / "report",
        results,
        evaluation.sim_TxV,
        captions=evaluation.captions,
        text_video_T=text_video_T,
        clip_names=evaluation.clip_names,
        load_frames=read_frames,
        attentions=[attend(text) for text in texts.tolist()],
        curves=read_metrics(workdir),
    )


def list_words(
    model: XClip, tokenizer: Tokenizer, caption: str, mask_W: Bool[AnyArray, " W"]
) -> tuple[list[str], Bool[np.ndarray, " W"]]:
    """Returns (tokens, mask) of the real tokens that AOSM treats as words."""
    words_W = np.asarray(model.aosm_words(mask_W[None])[0]) & np.asarray(mask_W)
    tokens = ["start", *tokenizer.tokens(caption)[: mask_W.sum() - 2], "end"]
    return [token for token, is_word in zip(tokens, words_W, strict=False) if is_word], words_W
