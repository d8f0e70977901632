"""Writes down what is said in a film, with https://github.com/SYSTRAN/faster-whisper.

The package (extra `asr`) runs Whisper models of any size on CPU and GPU, without PyTorch. Their
weights are files of CTranslate2 in a folder or on the Hugging Face hub.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xclip_jax.cli import InputError, PathLike, first_line
from xclip_jax.convert.reading import HUB_ID, explain
from xclip_jax.data.sound import read_sound
from xclip_jax.search.lines import MAX_LINES, Line, fill_lengths, make_line

FILES = ("model.bin", "config.json", "tokenizer.json")  # of a model; vocabulary.* as well
EXAMPLE = "hf download Systran/faster-whisper-small --local-dir models/whisper-small"


class Transcriber:
    """A speech recognition model.

    `engine` is an instance of faster_whisper.WhisperModel. Its language is detected in every piece
    of ten minutes, unless `language` (such as "en") is given. With `vad`, parts without speech are
    skipped by the Silero model that is in the package: on music and noise, Whisper may invent text.
    """

    def __init__(
        self,
        model: str,
        *,
        language: str | None = None,
        device: str = "auto",
        threads: int = 0,
        vad: bool = True,
    ) -> None:
        """Loads a model, which is downloaded once if `model` is a name on the hub.

        `model` is a folder, a size such as "small", or the id of a repository. `device` is "cpu",
        "cuda" or "auto". `threads` are those of the model on CPU, 0: four. Raises InputError if the
        extra `asr` or the model is missing, or the folder is not a faster-whisper model.
        """
        try:
            import faster_whisper
        except ImportError as error:
            advice = "run pip install -e '.[asr]'"
            raise InputError(f"speech requires faster-whisper: {advice} ({error})") from None
        folder = find_model(model)
        self.language, self.vad = language, vad
        try:
            self.engine: Any = faster_whisper.WhisperModel(
                folder, device=device, cpu_threads=threads, local_files_only=True
            )
        except Exception as error:  # the tokenizer's has no type of its own
            raise InputError(f"{model}: is not a readable model: {first_line(error)}") from None

    def transcribe(self, path: PathLike) -> list[Line]:
        """Returns the sentences that are said in a film, sorted by time, [] without sound.

        Raises VideoError if the film cannot be opened, or no frame or none of its sound can be
        decoded.
        """
        lines: list[Line] = []
        for start, samples in read_sound(path):
            for begin, end, text in self._transcribe_piece(samples):
                line = make_line(start + begin, start + end, text)
                lines += [line] if line else []
            if len(lines) > MAX_LINES:
                break
        return sorted(fill_lengths(lines))[:MAX_LINES]

    def _transcribe_piece(self, samples: Any) -> Iterator[tuple[float, float, str]]:
        """Yields (start, end, text) of the sentences in a piece of sound, in seconds."""
        length = len(samples) / self.engine.feature_extractor.sampling_rate
        options: dict[str, Any] = {"language": self.language, "vad_filter": self.vad}
        # Without the text before: one sentence would otherwise be repeated to the end of the piece.
        segments, _ = self.engine.transcribe(samples, condition_on_previous_text=False, **options)
        for segment in segments:
            if segment.start < length:  # the model sees 30 seconds, filled with silence
                yield segment.start, min(segment.end, length), segment.text


def find_model(model: str) -> str:
    """Returns the folder of a model, which is downloaded if `model` is a name on the hub.

    Raises InputError that says how to get it if it is missing, incomplete or cannot be downloaded.
    """
    import faster_whisper

    advice = f"pass the folder of a model, which you get by {EXAMPLE} (500 MB)"
    sizes = faster_whisper.available_models()
    if os.path.isdir(model):
        missing = [name for name in FILES if not Path(model, name).is_file()]
        missing += [] if any(Path(model).glob("vocabulary.*")) else ["vocabulary.json"]
        if missing:  # a tokenizer would be downloaded
            files = ", ".join(missing)
            raise InputError(
                f"{model}: is not a model of faster-whisper, without {files}: {advice}"
            )
        return model
    if model not in sizes and not re.fullmatch(HUB_ID, model):
        raise InputError(f"no folder {model!r}: {advice}, or one of the names {', '.join(sizes)}")
    try:
        return find_model(faster_whisper.download_model(model))
    except InputError:
        raise
    except Exception as error:  # of the network, of many types
        raise InputError(
            f"{model}: there is no such folder, and the hub has no such model or cannot be reached "
            f"({explain(error)}): on a machine with network, {advice}"
        ) from None
