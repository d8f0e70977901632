"""A small random Whisper model in CTranslate2's format, and sound for it."""

import json
from fractions import Fraction

import av
import numpy as np
import tokenizers

WIDTH, LETTERS = 16, " abcdefghijklmnopqrstuvwxyz.,!?'"
SPECIAL = ["<|endoftext|>", "<|startoftranscript|>", "<|translate|>", "<|transcribe|>"]
SPECIAL += ["<|startoflm|>", "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>"]
STAMPS = [f"<|{0.02 * k:.2f}|>" for k in range(1501)]


def fill(spec, rng):
    """Sets the missing weights of a layer and of those inside it."""
    from ctranslate2 import specs

    for name, value in list(vars(spec).items()):
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, specs.common_spec.LayerNormSpec):
                part.gamma, part.beta = np.ones(WIDTH, np.float32), np.zeros(WIDTH, np.float32)
            elif isinstance(part, specs.attention_spec.MultiHeadAttentionSpec):
                sizes = [3, 1] if len(part.linear) == 2 else [1, 2, 1]
                for linear, size in zip(part.linear, sizes, strict=True):
                    set_linear(linear, size * WIDTH, WIDTH, rng)
                fill(part, rng)
            elif isinstance(part, specs.transformer_spec.FeedForwardSpec):
                set_linear(part.linear_0, 4 * WIDTH, WIDTH, rng)
                set_linear(part.linear_1, WIDTH, 4 * WIDTH, rng)
                fill(part, rng)
            elif isinstance(part, specs.model_spec.LayerSpec) and name == "layer":
                fill(part, rng)


def set_linear(linear, rows, columns, rng):
    linear.weight = rng.normal(0, 0.3, (rows, columns)).astype(np.float32)
    linear.bias = np.zeros(rows, np.float32)


def write_whisper(folder, seed=0):
    """Writes a random model of English, with one layer, and its tokenizer of letters."""
    from ctranslate2 import specs

    rng = np.random.default_rng(seed)
    vocabulary = [*LETTERS, *SPECIAL, *STAMPS]
    spec = specs.WhisperSpec(1, 2, 1, 2)
    for module in (spec.encoder, spec.decoder):
        fill(module, rng)
    for number, channels in ((1, 80), (2, WIDTH)):
        conv = getattr(spec.encoder, f"conv{number}")
        conv.weight = rng.normal(0, 0.1, (WIDTH, channels, 3)).astype(np.float32)
        conv.bias = np.zeros(WIDTH, np.float32)
    spec.encoder.position_encodings.encodings = rng.normal(0, 1, (1500, WIDTH)).astype(np.float32)
    spec.decoder.position_encodings.encodings = rng.normal(0, 1, (448, WIDTH)).astype(np.float32)
    table = rng.normal(0, 1, (len(vocabulary), WIDTH)).astype(np.float32)
    spec.decoder.embeddings.weight = spec.decoder.projection.weight = table
    spec.register_vocabulary(vocabulary)
    spec.config.suppress_ids = spec.config.suppress_ids_begin = spec.config.lang_ids = []
    spec.config.alignment_heads = [(0, 0)]
    spec.validate()
    folder.mkdir()
    spec.save(str(folder))
    ids = {token: index for index, token in enumerate(vocabulary)}
    model = tokenizers.models.WordLevel(ids, unk_token=" ")
    tokenizer = tokenizers.Tokenizer(model)
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    tokenizer.pre_tokenizer, tokenizer.decoder = split, tokenizers.decoders.Fuse()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "preprocessor_config.json").write_text(json.dumps({"feature_size": 80}))
    return folder


def beeps(seconds, rate=16_000, loud=()):
    """Returns silence with tones in the intervals `loud`, float32 in [-1, 1]."""
    times = np.arange(round(seconds * rate)) / rate
    is_loud = np.any([(times >= start) & (times < end) for start, end in loud], 0) * np.ones(1)
    return (0.5 * np.sin(2 * np.pi * 440 * times) * is_loud).astype(np.float32)


def write_film(path, samples, *, rate=16_000, sound_start=0.0, video_start=0.0, codec="aac"):
    """Writes a film of grey frames, one a second, without sound if `samples` is None."""
    ms, length = Fraction(1, 1000), 5 if samples is None else int(len(samples) / rate) + 1
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=25, options={"preset": "ultrafast"})
        video.width, video.height, video.pix_fmt = 32, 32, "yuv420p"
        video.codec_context.time_base = ms
        sound = None if samples is None else container.add_stream(codec, rate=rate, layout="mono")
        for second in range(length):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 99, np.uint8), format="rgb24")
            frame.pts, frame.time_base = round(1000 * (video_start + second)), ms
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        for start in range(0, 0 if samples is None else len(samples), 1024):
            block = samples[None, start : start + 1024]
            kind = sound.codec_context.format.name
            block = block if kind == "fltp" else (block * 32767).astype(np.int16)
            frame = av.AudioFrame.from_ndarray(block, format=kind, layout="mono")
            frame.sample_rate, frame.time_base = rate, Fraction(1, rate)
            frame.pts = round(sound_start * rate) + start
            container.mux(sound.encode(frame))
        if sound:
            container.mux(sound.encode(None))
    return path
