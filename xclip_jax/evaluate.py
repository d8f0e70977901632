"""Evaluation: encode everything once, block-wise similarity, metrics both ways, the report."""

import dataclasses
import functools
import json
import os
from pathlib import Path

import jax
import numpy as np

from xclip_jax.checkpoint import load_model
from xclip_jax.cli import InputError, progress
from xclip_jax.data.builder import Dataset
from xclip_jax.data.pipeline import TrainingPairs, choose_frames, evaluation_batches, load_frames
from xclip_jax.distributed import gather_objects, is_first_process
from xclip_jax.inference import (
    apply_model,
    block_plan,
    concatenate_features,
    encode_texts,
    encode_videos,
    on_local_devices,
    similarity_in_blocks,
    slice_rows,
)
from xclip_jax.metrics import (
    dual_softmax,
    qb_norm,
    rank_counts,
    retrieval_counts,
    retrieval_metrics,
    summarize,
    video_to_text_counts,
)
from xclip_jax.monitor import read_metrics
from xclip_jax.paper import paper_results
from xclip_jax.report import WordFrameAttention, format_table, write_report
from xclip_jax.similarity import TextFeatures, VideoFeatures

RANKS_FILE = "ranks.npz"


@dataclasses.dataclass
class Evaluation:
    """A split, encoded and compared: T texts, V videos.

    `text_video`: T ints, each text's video. `truncated`: how many texts were cut.
    """

    captions: list[str]
    text_video: np.ndarray
    clip_names: list[str]
    text: TextFeatures
    video: VideoFeatures
    sim_TxV: np.ndarray
    truncated: int

    @property
    def metrics(self):
        """See xclip_jax.metrics.retrieval_metrics."""
        return retrieval_metrics(self.sim_TxV, self.text_video)


def evaluate_split(config, model, params, dataset, split, tokenizer):
    """Encodes every caption and video of a split once and compares all with all.

    Each process encodes a share of the clips and compares a share of the texts.
    """
    clips = dataset.clips(split)
    first, end = _share_of(len(clips))
    captions, counts, names = [], [], []
    size = config.eval.batch_size

    def encoded(bar):
        part = slice(first, end)
        batches = evaluation_batches(clips, size, model.config.max_frames, dataset.image_size, part)
        for frames, masks, batch_captions, batch_names in batches:
            yield encode_videos(model, params, frames, masks, size)
            captions.extend(caption for several in batch_captions for caption in several)
            counts.extend(map(len, batch_captions))
            names.extend(batch_names)
            bar.update(len(frames))

    with progress(end - first, f"encoding {split} videos", "video") as bar:
        video = concatenate_features(encoded(bar), end - first)
    text = encode_texts(model, params, *tokenizer(captions), size)
    video, text, captions, counts, names = _joined(video, text, captions, counts, names)
    sim_TxV = _compare(config, model, params, text, video)
    truncated = sum(map(tokenizer.truncated, captions))
    text_video = np.repeat(np.arange(len(names)), counts)
    return Evaluation(captions, text_video, names, text, video, sim_TxV, truncated)


def _compare(config, model, params, text, video):
    """T x V logits; each process compares some of the texts."""
    first, end = _share_of(len(text.mask))
    texts = slice_rows(text, first, end - first)
    block = "{} x {}".format(*block_plan(model, texts, video, config.eval.block_cells))
    with progress((end - first) * len(video.mask), f"comparing, {block} at a time", "pair") as bar:
        part = similarity_in_blocks(model, params, texts, video, config.eval.block_cells, bar)
    return _joined(part)[0]


def _share_of(total):
    """(first, end) of this process's share of `total` things, at least as many as processes."""
    number, count = jax.process_index(), jax.process_count()
    if total < count:
        raise InputError(f"{total} clips or texts to evaluate are too few for {count} processes")
    return total * number // count, total * (number + 1) // count


def _joined(*parts):
    """Lists and arrays, each joined over all processes."""
    if jax.process_count() == 1:
        return parts

    def join(*shares):
        if isinstance(shares[0], list):
            return [item for items in shares for item in items]
        return jax.tree.map(lambda *x: np.concatenate(x), *shares)

    return tuple(join(*shares) for shares in zip(*gather_objects(parts), strict=True))


def evaluate(config, workdir):
    """Evaluates the model of a work directory; writes and prints results.json and the report.

    Raises:
        InputError: there is no model yet, or it does not fit the data.
    """
    workdir = Path(workdir)
    described, model, params, tokenizer = load_model(workdir / "model")
    params = on_local_devices(params)
    dataset = Dataset(config.data.path, config.data.dataset, config.data.variant)
    check_image_size(dataset, model.config)
    split = config.data.test_split
    on_training = split == "test" and split not in dataset.captions_per_clip
    if on_training:
        split = config.data.train_split
    found = evaluate_split(config, model, params, dataset, split, tokenizer)
    if not np.isfinite(found.sim_TxV).all():
        raise InputError(f"{workdir / 'model'} gives similarities that are NaN or infinite")
    counts = retrieval_counts(found.sim_TxV, found.text_video)
    normalized = _normalized(config, model, params, dataset, found, tokenizer)
    results = {
        "step": described["step"],
        "split": split,
        **protocol(dataset, split, found),
        "selected_on": described.get("selected_on"),
        **_summarized(counts),
        "normalized": {option: _summarized(both) for option, both in normalized.items()},
        "eval": json.loads(config.eval.to_json()),
        "paper": (
            paper_results(dataset.name, dataset.variant, model.config.vision)
            if split == "test"
            else {}
        ),
        "truncated_captions": found.truncated,
    }
    if on_training:
        results["note"] = (
            f"evaluated on the {split} split, the clips it was trained on: "
            f"the data set has no {config.data.test_split} split"
        )
    elif split == results["selected_on"]:
        results["note"] = (
            f"the weights are those with the best results on the {split} split itself: "
            "these numbers are higher than on videos never used"
        )
    if not is_first_process():
        return results
    clips = dataset.clips(split)
    index = _write_report(config, workdir, found, results, clips, tokenizer, model, params)
    _write_ranks(workdir / RANKS_FILE, {"": counts, **normalized}, found.text_video)
    partial = workdir / "results.json.part"
    partial.write_text(json.dumps(results, indent=2) + "\n")
    os.replace(partial, workdir / "results.json")
    print(f"\n{format_table(results)}")
    if found.truncated:
        whole = f"of {len(found.captions):,} texts {found.truncated:,}"
        print(f"{whole} cut to model.max_words = {model.config.max_words} tokens")
    print(f"\nreport: {index}")
    return results


def _summarized(counts):
    return {way: summarize(*both) for way, both in counts.items()}


def _write_ranks(path, counts, text_video):
    """ranks.npz: 2 x Q integers at "DIRECTION" and "OPTION/DIRECTION", see `rank_counts`.

    By them intervals can be had: how many gallery items are better than each query's right one, and
    how many others are equal to it. T integers at "text_video": each text's video.
    """
    partial = path.with_name(f"{path.stem}.part.npz")
    flat = {
        f"{option}/{way}".strip("/"): both
        for option, d in counts.items()
        for way, both in d.items()
    }
    np.savez(
        partial,
        text_video=text_video,
        **{name: np.stack(both) for name, both in flat.items()},
    )
    os.replace(partial, path)


def protocol(dataset, split, found):
    """What the numbers of an Evaluation mean, as fields of results.json.

    `protocol` is "paragraph" (all captions of a video joined), "many captions" (each alone, text to
    video; the best-scoring one of each candidate, video to text) or "single caption".
    `expected_videos` is the paper's number for a benchmark, that of the annotations otherwise.
    """
    num_texts, num_videos = len(found.captions), len(found.clip_names)
    name = "paragraph" if dataset.paragraphs else "many captions"
    return {
        "dataset": f"{dataset.name} {dataset.variant}".strip(),
        "protocol": name if dataset.paragraphs or num_texts > num_videos else "single caption",
        "num_texts": num_texts,
        "num_videos": num_videos,
        "expected_videos": dataset.expected.get(split, num_videos),
        "missing_videos": max(0, dataset.expected.get(split, num_videos) - num_videos),
        "max_seconds": dataset.max_seconds,
    }


def _normalized(config, model, params, dataset, found, tokenizer):
    """{name: counts by direction} of the test-time options that are on."""
    sim_TxV, text_video = found.sim_TxV, found.text_video
    results = {}
    if config.eval.dual_softmax:
        results["dual softmax"] = {
            "text_to_video": rank_counts(dual_softmax(sim_TxV), text_video),
            "video_to_text": video_to_text_counts(dual_softmax(sim_TxV.T).T, text_video),
        }
    if config.eval.qb_norm:
        ids, mask = tokenizer(_querybank(dataset, config.data.train_split, config.eval.qb_norm))
        bank = encode_texts(model, params, ids, mask, config.eval.batch_size)
        with progress(len(ids) * len(found.clip_names), "comparing with the bank", "pair") as bar:
            block = config.eval.block_cells
            bank_BxV = similarity_in_blocks(model, params, bank, found.video, block, bar)
        scaled = model.config.has_granularities
        scale = float(np.exp(params["clip"]["logit_scale"])) if scaled else 1.0
        normalised_TxV = qb_norm(sim_TxV / scale, bank_BxV / scale)
        # The bank holds no videos to normalise the other way by.
        found_first = {"text_to_video": rank_counts(normalised_TxV, text_video)}
        results[f"QB-Norm ({len(ids):,} captions)"] = found_first
    return results


def _querybank(dataset, split, size):
    """At most `size` captions of a split, drawn at random; the same ones every time."""
    pairs = TrainingPairs(dataset, split, "all")
    drawn = np.random.default_rng(0).permutation(len(pairs))[:size]
    items = (pairs[int(index)] for index in drawn)
    return [record["captions"][caption].decode() for record, _, caption in items]


def check_image_size(dataset, model_config):
    """Raises InputError if the data set's frames are not of the model's size."""
    side = model_config.vision.image_size
    if dataset.image_size != side:
        raise InputError(
            f"config.model.vision.image_size = {side}: must be {dataset.image_size}, the size of "
            f"the frames in {dataset.path} (or prepare the data again with --image_size={side})"
        )


def _write_report(config, workdir, found, results, clips, tokenizer, model, params):
    c = model.config

    def frames_of(video):
        frames, mask = load_frames(clips[video], c.max_frames, c.vision.image_size)
        return frames[mask]

    pairs = []
    if c.has_granularities and "frame_word" in c.granularities:
        count = min(config.report.attention_pairs, len(found.captions))
        for text in np.linspace(0, len(found.captions) - 1, count).astype(int):
            attention = functools.partial(_attention, found, text, clips[found.text_video[text]])
            pairs.append(attention(tokenizer, model, params, frames_of))
    return write_report(
        workdir / "report",
        results,
        found.sim_TxV,
        captions=found.captions,
        text_video_T=found.text_video,
        clip_names=found.clip_names,
        load_frames=frames_of,
        attentions=pairs,
        curves=read_metrics(workdir),
    )


def _attention(found, text, record, tokenizer, model, params, frames_of):
    """What AOSM looks at in one caption and its video."""
    video = found.text_video[text]
    one_text, one_video = slice_rows(found.text, text, 1), slice_rows(found.video, video, 1)
    weights_WxF = apply_model(
        params, one_text, one_video, model=model, method="word_frame_attention"
    )[0]
    words, words_W = words_of(model, tokenizer, found.captions[text], one_text.mask[0])
    times = np.asarray(record["times"])
    return WordFrameAttention(
        words=words,
        weights_WxF=np.asarray(weights_WxF)[words_W][:, one_video.mask[0]],
        times=times[choose_frames(len(times), model.config.max_frames)].tolist(),
        caption=found.captions[text],
        frames_FxSxSx3=frames_of(video),
        clip=found.clip_names[video],
    )


def words_of(model, tokenizer, caption, mask_W):
    """(tokens, mask W) of what counts as a word in a caption; padding never does here."""
    words_W = np.asarray(model.aosm_words(mask_W[None])[0]) & mask_W
    tokens = ["start", *tokenizer.tokens(caption)[: mask_W.sum() - 2], "end"]
    return [token for token, shown in zip(tokens, words_W, strict=False) if shown], words_W
