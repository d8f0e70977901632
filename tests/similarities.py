"""Similarities and their gradients by the package, and by float64 loops over the equations."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from xclip_jax.similarity import GRANULARITIES, TextFeatures, VideoFeatures, granular_similarity

TEXT_LENGTHS = (6, 3, 5)  # tokens, start and end included: 4, 1 and 3 words
VIDEO_LENGTHS = (4, 1, 3, 2)  # frames
OPTIONS = ("granularities", "aggregation", "tau")
_compiled = jax.jit(granular_similarity, static_argnames=OPTIONS)


def similarities(text, video, granularities=GRANULARITIES, aggregation="attention", tau=0.05):
    """Returns granular_similarity, compiled, as NumPy arrays."""
    options = dict(zip(OPTIONS, (granularities, aggregation, tau), strict=True))
    found = _compiled(text, video, **options)
    return {name: np.asarray(found[name]) for name in found}


def unit(rng, *shape):
    x = rng.normal(size=shape)
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def features(seed, texts=TEXT_LENGTHS, videos=VIDEO_LENGTHS, words=6, frames=4, dim=6):
    """Returns normalised features of these lengths, with padding other than 0."""
    rng = np.random.default_rng(seed)
    text_mask = np.arange(words) < np.array(texts)[:, None]
    video_mask = np.arange(frames) < np.array(videos)[:, None]
    text = [unit(rng, len(texts), dim), unit(rng, len(texts), words, dim), text_mask]
    video = [unit(rng, len(videos), dim), unit(rng, len(videos), frames, dim), video_mask]
    weights = (rng.normal(size=mask.shape).astype(np.float32) for mask in (text_mask, video_mask))
    return TextFeatures(*text, next(weights)), VideoFeatures(*video, next(weights))


def loop_attention(scores, tau):
    """Returns Eq. 7 and 8 of a list of numbers."""
    peak = max(scores)
    weights = [math.exp((s - peak) / tau) for s in scores]
    return sum(w * s for w, s in zip(weights, scores, strict=True)) / sum(weights)


def loop_operation(scores, name, tau):
    if name == "attention":
        return loop_attention(scores, tau)
    return max(scores) if name == "max" else sum(scores) / len(scores)


def loop_weighted(scores, logits):
    exps = [math.exp(logit) for logit in logits]
    return sum(e * s for e, s in zip(exps, scores, strict=True)) / sum(exps)


def loop_matrix(rows, aggregation, tau, word_logits=None, frame_logits=None):
    """Returns Eq. 9-13 of one matrix: a list of words, each a list of its scores with frames."""
    maxima = [max(row) for row in rows], [max(column) for column in zip(*rows, strict=True)]
    if aggregation == "maxsim":
        return sum(maxima[0]) / len(rows)
    if aggregation == "weighted":
        logits = word_logits, frame_logits
        return sum(map(loop_weighted, maxima, logits)) / 2
    outer, inner = (aggregation.split("-") * 2)[:2]
    over_words = loop_operation([loop_operation(row, inner, tau) for row in rows], outer, tau)
    columns = [list(column) for column in zip(*rows, strict=True)]
    over_frames = loop_operation([loop_operation(c, inner, tau) for c in columns], outer, tau)
    return (over_words + over_frames) / 2


def loop_similarities(text, video, text_lengths, video_lengths, aggregation, tau):
    """Returns Eq. 3-13 pair by pair. Words are the tokens between the first and the last."""

    def reduce(scores, logits, of_maxsim):
        if aggregation == "weighted":
            return loop_weighted(scores, logits)
        name = of_maxsim if aggregation == "maxsim" else aggregation.split("-")[0]
        return loop_operation(scores, name, tau)

    found = {name: np.zeros((len(text_lengths), len(video_lengths))) for name in GRANULARITIES}

    def dot(a, b):
        return sum(float(x) * float(y) for x, y in zip(a, b, strict=True))

    for t, length in enumerate(text_lengths):
        words = [text.words[t][k] for k in range(1, length - 1)]
        for v, count in enumerate(video_lengths):
            frames = [video.frames[v][k] for k in range(count)]
            sentence, clip = text.sentence[t], video.video[v]
            found["video_sentence"][t, v] = dot(sentence, clip)
            logits = text.weights[t][1 : length - 1].tolist(), video.weights[v][:count].tolist()
            scores = [dot(w, clip) for w in words]
            found["video_word"][t, v] = reduce(scores, logits[0], "mean")
            scores = [dot(sentence, f) for f in frames]
            found["frame_sentence"][t, v] = reduce(scores, logits[1], "max")
            scores = [[dot(w, f) for f in frames] for w in words]
            found["frame_word"][t, v] = loop_matrix(scores, aggregation, tau, *logits)
    return found


@functools.partial(jax.jit, static_argnums=(2, 3))
def _gradients(floats, masks, aggregation, tau):

    def total(floats):
        word_logits, frame_logits = floats["word_logits"], floats["frame_logits"]
        text = TextFeatures(floats["sentence"], floats["words"], masks[0], word_logits)
        video = VideoFeatures(floats["video"], floats["frames"], masks[1], frame_logits)
        found = granular_similarity(text, video, aggregation=aggregation, tau=tau)
        weights = {name: (k + 1.0) for k, name in enumerate(GRANULARITIES)}
        return sum(jnp.sum(weights[name] * jnp.sin(3 * found[name])) for name in found)

    return jax.value_and_grad(total)(floats)


def gradient_inputs(text, video):
    """Yields the arrays of features that have a gradient, by name."""
    yield from (("sentence", text.sentence), ("words", text.words))
    yield from (("video", video.video), ("frames", video.frames))
    yield from (("word_logits", text.weights), ("frame_logits", video.weights))


def gradients_of(text, video, aggregation, tau=0.05):
    """Returns a sum over the similarities and its gradients by the arrays of features."""
    floats = dict(gradient_inputs(text, video))
    return _gradients(floats, (text.mask, video.mask), aggregation, tau)
