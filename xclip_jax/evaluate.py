"""Evaluates a model: encodes a split, compares texts with videos, writes metrics and report."""

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from tqdm import tqdm

from xclip_jax.checkpoint import plain_fields
from xclip_jax.cli import InputError, progress
from xclip_jax.config import RunConfig
from xclip_jax.data.builder import Dataset
from xclip_jax.data.pipeline import TrainingPairs, choose_frames, evaluation_batches, load_frames
from xclip_jax.data.text import Tokenizer
from xclip_jax.distributed import gather_objects, is_first_process
from xclip_jax.inference import (
    apply_model,
    concatenate_features,
    copy_to_local_devices,
    encode_texts,
    encode_videos,
    plan_blocks,
    similarity_in_blocks,
    slice_rows,
)
from xclip_jax.metrics import (
    RankCounts,
    dual_softmax,
    qb_norm,
    rank_counts,
    retrieval_counts,
    retrieval_metrics,
    summarize,
    video_to_text_counts,
)
from xclip_jax.models import ModelConfig, XClip
from xclip_jax.monitor import read_metrics
from xclip_jax.paper import paper_results
from xclip_jax.report import WordFrameAttention, format_table, write_report
from xclip_jax.retriever import Retriever, load
from xclip_jax.similarity import AnyArray, TextFeatures, VideoFeatures

RANKS_FILE = "ranks.npz"
Counts = Mapping[str, RankCounts]  # by direction


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The features and similarities of a split: T texts, V videos.

    Attributes:
        text_video_T: index of each text's video.
        truncated: number of texts longer than max_words.
    """

    captions: list[str]
    text_video_T: Int[np.ndarray, " T"]
    clip_names: list[str]
    text: TextFeatures
    video: VideoFeatures
    sim_TxV: Float[np.ndarray, "T V"]
    truncated: int

    @property
    def metrics(self) -> dict[str, dict[str, float]]:
        """Metrics by direction, see xclip_jax.metrics.retrieval_metrics."""
        return retrieval_metrics(self.sim_TxV, self.text_video_T)


def evaluate(config: RunConfig, workdir: str | Path) -> dict[str, Any]:
    """Evaluates the model of a work directory, prints the results and writes the report.

    Returns:
        The content of results.json.

    Raises:
        InputError: there is no model yet, or it does not fit the data.
    """
    workdir = Path(workdir)
    retriever = load(workdir / "model")
    saved, retriever.params = retriever.config, copy_to_local_devices(retriever.params)
    dataset = Dataset(config.data.path, config.data.dataset, config.data.variant)
    check_image_size(dataset, retriever.model.config)
    split, selected_on = config.data.test_split, saved.get("selected_on")
    note = None
    if split == "test" and split not in dataset.captions_per_clip:
        split = config.data.train_split
        note = (
            f"evaluated on the {split} split, the clips it was trained on: "
            f"the data set has no {config.data.test_split} split"
        )
    elif split == selected_on:
        note = (
            f"the weights were selected on the {split} split itself: "
            "these numbers are higher than on unseen videos"
        )
    evaluation = evaluate_split(config, retriever, dataset, split)
    if not np.isfinite(evaluation.sim_TxV).all():
        raise InputError(f"{workdir / 'model'} computes similarities that are NaN or infinite")
    counts = retrieval_counts(evaluation.sim_TxV, evaluation.text_video_T)
    normalized = _normalized_counts(config, retriever, dataset, evaluation)
    published = {}
    if split == "test":
        published = paper_results(dataset.name, dataset.variant, retriever.model.config.vision)
    results = {
        "step": saved["step"],
        "split": split,
        **_describe_protocol(dataset, split, evaluation),
        "selected_on": selected_on,
        **_summarize(counts),
        "normalized": {name: _summarize(by_way) for name, by_way in normalized.items()},
        "eval": plain_fields(config.eval),
        "paper": published,
        "truncated_captions": evaluation.truncated,
        **({"note": note} if note else {}),
    }
    if is_first_process():
        clips = dataset.clips(split)
        index = _write_report(config, workdir, retriever, evaluation, results, clips=clips)
        _write_ranks(workdir / RANKS_FILE, {"": counts, **normalized}, evaluation.text_video_T)
        partial = workdir / "results.json.part"
        partial.write_text(json.dumps(results, indent=2) + "\n")
        os.replace(partial, workdir / "results.json")
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
    start, end = _part_of(len(clips))
    captions, counts, names = [], [], []

    def encode(bar: tqdm) -> Iterator[VideoFeatures]:
        batches = evaluation_batches(
            clips, size, model.config.max_frames, dataset.image_size, slice(start, end)
        )
        for frames, masks, captions_of_clips, batch_names in batches:
            yield encode_videos(model, params, frames, masks, size)
            captions.extend(caption for texts in captions_of_clips for caption in texts)
            counts.extend(map(len, captions_of_clips))
            names.extend(batch_names)
            bar.update(len(frames))

    with progress(end - start, f"encoding {split} videos", "video") as bar:
        video = concatenate_features(encode(bar), end - start)
    text = encode_texts(model, params, *tokenizer(captions), size)
    video, text, captions, counts, names = _join_processes(video, text, captions, counts, names)
    return Evaluation(
        captions=captions,
        text_video_T=np.repeat(np.arange(len(names)), counts),
        clip_names=names,
        text=text,
        video=video,
        sim_TxV=_compare(config, retriever, text, video),
        truncated=sum(map(tokenizer.is_truncated, captions)),
    )


def _compare(
    config: RunConfig, retriever: Retriever, text: TextFeatures, video: VideoFeatures
) -> Float[np.ndarray, "T V"]:
    start, end = _part_of(len(text.mask))
    part, cells = slice_rows(text, start, end - start), config.eval.block_cells
    model = retriever.model
    block = "{} x {}".format(*plan_blocks(model, part, video, cells))
    with progress((end - start) * len(video.mask), f"comparing blocks of {block}", "pair") as bar:
        sim_TxV = similarity_in_blocks(
            model, retriever.params, part, video, block_cells=cells, bar=bar
        )
    return _join_processes(sim_TxV)[0]


def _part_of(total: int) -> tuple[int, int]:
    """Returns (start, end) of this process's part of `total` rows."""
    index, count = jax.process_index(), jax.process_count()
    if total < count:
        raise InputError(
            f"{total} clips or texts to evaluate: must be at least {count}, the number of processes"
        )
    return total * index // count, total * (index + 1) // count


def _join_processes(*values: Any) -> tuple[Any, ...]:
    """Concatenates lists and arrays over all processes."""
    if jax.process_count() == 1:
        return values

    def join(*parts: Any) -> Any:
        if isinstance(parts[0], list):
            return [item for part in parts for item in part]
        return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)

    return tuple(join(*parts) for parts in zip(*gather_objects(values), strict=True))


def _summarize(counts: Counts) -> dict[str, dict[str, float]]:
    return {way: summarize(*both) for way, both in counts.items()}


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


def _normalized_counts(
    config: RunConfig, retriever: Retriever, dataset: Dataset, evaluation: Evaluation
) -> dict[str, Counts]:
    """Returns {name: rank counts} of the enabled test-time normalisations."""
    sim_TxV, text_video_T = evaluation.sim_TxV, evaluation.text_video_T
    model, params = retriever.model, retriever.params
    results = {}
    if config.eval.dual_softmax:
        results["dual softmax"] = {
            "text_to_video": rank_counts(dual_softmax(sim_TxV), text_video_T),
            "video_to_text": video_to_text_counts(dual_softmax(sim_TxV.T).T, text_video_T),
        }
    if config.eval.qb_norm:
        captions = _draw_captions(dataset, config.data.train_split, config.eval.qb_norm)
        bank = encode_texts(
            model, params, *retriever.get_tokenizer()(captions), config.eval.batch_size
        )
        pairs, cells = len(captions) * len(evaluation.clip_names), config.eval.block_cells
        with progress(pairs, "comparing with the bank", "pair") as bar:
            bank_BxV = similarity_in_blocks(
                model, params, bank, evaluation.video, block_cells=cells, bar=bar
            )
        scale = (
            float(np.exp(params["clip"]["logit_scale"])) if model.config.has_granularities else 1.0
        )
        normalized_TxV = qb_norm(sim_TxV / scale, bank_BxV / scale)
        # Video to text would need a bank of videos.
        counts = {"text_to_video": rank_counts(normalized_TxV, text_video_T)}
        results[f"QB-Norm ({len(captions):,} captions)"] = counts
    return results


def _draw_captions(dataset: Dataset, split: str, size: int) -> list[str]:
    """Draws at most `size` captions of a split, always the same ones."""
    pairs = TrainingPairs(dataset, split, "all")
    indices = np.random.default_rng(0).permutation(len(pairs))[:size]
    items = (pairs[int(index)] for index in indices)
    return [record["captions"][caption].decode() for record, _, caption in items]


def _write_ranks(
    path: Path, counts: Mapping[str, Counts], text_video_T: Int[np.ndarray, " T"]
) -> None:
    """Writes the counts of every query, from which confidence intervals can be computed.

    Keys of the file: "DIRECTION" and "OPTION/DIRECTION": 2 x Q integers, see `rank_counts`;
    "text_video": T integers, the index of each text's video.
    """
    arrays = {
        f"{option}/{way}".strip("/"): np.stack(both)
        for option, by_way in counts.items()
        for way, both in by_way.items()
    }
    partial = path.with_name(f"{path.stem}.part.npz")
    np.savez(partial, allow_pickle=False, text_video=text_video_T, **arrays)
    os.replace(partial, path)


def check_image_size(dataset: Dataset, model_config: ModelConfig) -> None:
    """Raises InputError if the data set's frames do not have the model's image size."""
    side = model_config.vision.image_size
    if dataset.image_size != side:
        raise InputError(
            f"config.model.vision.image_size = {side}: must be {dataset.image_size}, the size of "
            f"the frames in {dataset.path} (or prepare the data again with --image_size={side})"
        )


def _write_report(
    config: RunConfig,
    workdir: Path,
    retriever: Retriever,
    evaluation: Evaluation,
    results: Mapping[str, Any],
    *,
    clips: Sequence[Mapping[str, Any]],
) -> Path:
    model, text_video_T = retriever.model, evaluation.text_video_T
    c = model.config

    def read_frames(video: int) -> UInt8[np.ndarray, "F S S 3"]:
        frames, mask_F = load_frames(clips[video], c.max_frames, c.vision.image_size)
        return frames[mask_F]

    def attend(text: int) -> WordFrameAttention:
        """Returns AOSM's weights of a caption and its video."""
        video = int(text_video_T[text])
        one_text, one_video = slice_rows(evaluation.text, text), slice_rows(evaluation.video, video)
        weights_1xWxF = apply_model(
            retriever.params, one_text, one_video, model=model, method="word_frame_attention"
        )
        caption, times = evaluation.captions[text], np.asarray(clips[video]["times"])
        mask_W = np.asarray(one_text.mask[0])
        words, words_W = list_words(model, retriever.get_tokenizer(), caption, mask_W)
        return WordFrameAttention(
            words=words,
            weights_WxF=np.asarray(weights_1xWxF)[0, words_W][:, one_video.mask[0]],
            times=times[choose_frames(len(times), c.max_frames)].tolist(),
            caption=caption,
            frames_FxSxSx3=read_frames(video),
            clip=evaluation.clip_names[video],
        )

    attentions = []
    if c.has_granularities and "frame_word" in c.granularities:
        count = min(config.report.attention_pairs, len(text_video_T))
        texts = np.linspace(0, len(text_video_T) - 1, count).astype(int)
        attentions = [attend(int(text)) for text in texts]
    return write_report(
        workdir / "report",
        results,
        evaluation.sim_TxV,
        captions=evaluation.captions,
        text_video_T=text_video_T,
        clip_names=evaluation.clip_names,
        load_frames=read_frames,
        attentions=attentions,
        curves=read_metrics(workdir),
    )


def list_words(
    model: XClip, tokenizer: Tokenizer, caption: str, mask_W: Bool[AnyArray, " W"]
) -> tuple[list[str], Bool[np.ndarray, " W"]]:
    """Returns (tokens, mask) of the real tokens that AOSM treats as words."""
    words_W = np.asarray(model.aosm_words(mask_W[None])[0]) & np.asarray(mask_W)
    tokens = ["start", *tokenizer.tokens(caption)[: mask_W.sum() - 2], "end"]
    return [token for token, is_word in zip(tokens, words_W, strict=False) if is_word], words_W
