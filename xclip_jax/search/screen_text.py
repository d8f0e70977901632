"""Reads the text that is written in the pictures of a film, by https://rapidai.github.io/RapidOCRDocs.

The package (extra `ocr`) contains the weights of its models; nothing is downloaded.
"""

import dataclasses
import difflib
import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from PIL import Image

from xclip_jax.cli import InputError, PathLike
from xclip_jax.data.container import exact_seconds
from xclip_jax.data.video import Picture, VideoReader
from xclip_jax.search.lines import MAX_LINES, Line, fill_lengths, make_line
from xclip_jax.search.words import normalize

MIN_CONFIDENCE = 0.8  # of a row; rendered text has 0.95 and more, patterns that are none 0.5 to 0.8
MIN_INTERVAL = 0.1  # seconds
LONGEST = 1280  # pixels of the longer side of what is read
_SHORTEST = 736  # smaller pictures are enlarged to it, as far as LONGEST allows
_NARROWEST = 32
_MAX_BLOCKS = 100  # of a frame
_CELL = 8  # pixels: frames are compared by the mean brightness of such squares
_SAME_BRIGHTNESS = 6  # largest difference, of 255, at which a frame is not read again
_SAME_TEXT = 0.85  # similarity of two readings of the same text
_NUMBERS = re.compile(r"\d+")


class Box(NamedTuple):
    """A row of text in a frame, or a part of a row. Coordinates are pixels."""

    left: float
    top: float
    right: float
    bottom: float
    text: str
    confidence: float

    @property
    def height(self) -> float:
        """Height of the row."""
        return self.bottom - self.top


class Block(NamedTuple):
    """Rows of text that belong together."""

    text: str
    confidence: float  # of the worst row


@dataclasses.dataclass(eq=False)
class _Shown:
    """A text on the screen, from the sample that shows it first."""

    block: Block
    start: float
    end: float = 0.0

    def continues(self, block: Block) -> bool:
        """Returns True if the block is the same text, perhaps with letters read differently."""
        ours, theirs = normalize(self.block.text), normalize(block.text)
        if ours == theirs or _NUMBERS.findall(ours) != _NUMBERS.findall(theirs):
            return ours == theirs
        matcher = difflib.SequenceMatcher(None, ours, theirs, autojunk=False)
        quick = min(matcher.real_quick_ratio(), matcher.quick_ratio())
        return quick >= _SAME_TEXT and matcher.ratio() >= _SAME_TEXT


def read_screen_text(path: PathLike, *, interval: float = 2.0, threads: int = 1) -> list[Line]:
    """Reads the text in a film's pictures, one every `interval` seconds.

    Rows that stand together are one line. A line lasts from the first picture that shows it to the
    next one that does not. Lines are sorted by their start, those of a picture in reading order.
    `threads` are those of the models. Pictures that equal the one read before are not read again.
    Raises VideoError if no frame can be read, InputError if the extra `ocr` is not installed.
    """
    if not interval >= MIN_INTERVAL:
        raise InputError(f"interval={interval}: must be at least {MIN_INTERVAL} seconds")
    engine = load_engine(threads)
    reader = VideoReader(path, interval=exact_seconds(interval))
    texts: list[_Shown] = []  # in the order in which they appear
    shown: list[_Shown] = []
    before, cells = None, np.zeros((0, 0), np.int16)
    second = 0.0
    for second, picture in reader:
        if picture is before:
            continue
        before, image = picture, _scale(picture)
        new_cells = np.asarray(image.convert("L").reduce(_CELL), np.int16)
        if not _is_same(cells, new_cells):
            cells = new_cells
            now = _follow(shown, group_boxes(read_boxes(engine, image)), second)
            texts += [text for text in now if text.start == second]
            shown = now
        if len(texts) > MAX_LINES:
            break
    for text in shown:
        text.end = min(second + interval, max(reader.end, second))
    lines = (make_line(text.start, text.end, text.block.text) for text in texts)
    return fill_lengths(filter(None, lines))[:MAX_LINES]


@functools.lru_cache(maxsize=1)
def load_engine(threads: int = 1) -> Any:
    """Loads the models that are in the package `rapidocr`, once a process.

    Raises InputError if the package or a model is missing: it would be downloaded.
    """
    try:
        import onnxruntime  # noqa: F401  (rapidocr does not require it)
        import rapidocr
    except ImportError as error:
        advice = "run pip install -e '.[ocr]'"
        raise InputError(f"reading text requires rapidocr: {advice} ({error})") from None
    folder = Path(rapidocr.__file__).parent / "models"
    models = {name: sorted(folder.glob(f"*_{name.lower()}_*.onnx")) for name in ("Det", "Rec")}
    missing = [name for name, files in models.items() if len(files) != 1]
    if missing:
        found = ", ".join(sorted(file.name for file in folder.glob("*.onnx"))) or "none"
        raise InputError(
            f"rapidocr: one model of each kind is expected in {folder}, found {found}: "
            "run pip install --force-reinstall rapidocr"
        )
    runtime = "EngineConfig.onnxruntime"
    settings = {
        "Global.log_level": "critical",  # it would warn of every picture without text
        "Global.use_cls": False,  # text upside down
        "Global.text_score": MIN_CONFIDENCE,
        "Det.limit_type": "max",
        "Det.limit_side_len": LONGEST,  # by default, narrow pictures are enlarged without limit
        f"{runtime}.intra_op_num_threads": threads,
        f"{runtime}.inter_op_num_threads": 1,
    }
    settings |= {f"{name}.model_path": str(files[0]) for name, files in models.items()}
    return rapidocr.RapidOCR(params=settings)


def read_boxes(engine: Any, image: Image.Image) -> list[Box]:
    """Reads the rows of text in a picture, with at least MIN_CONFIDENCE.

    Rows of one character are left out: edges and poles are read as 一, I or 1. So are pictures that
    are less than 32 pixels wide or high.
    """
    if min(image.size) < _NARROWEST:
        return []
    result = engine(np.ascontiguousarray(np.asarray(image)[..., ::-1]))  # blue first
    if result.boxes is None or result.txts is None:
        return []
    corners_Nx4x2: Float[np.ndarray, "N 4 2"] = np.asarray(result.boxes, float).reshape(-1, 4, 2)
    boxes = []
    for corners_4x2, text, score in zip(corners_Nx4x2, result.txts, result.scores, strict=True):
        (left, top), (right, bottom) = corners_4x2.min(0).tolist(), corners_4x2.max(0).tolist()
        if score >= MIN_CONFIDENCE and len(normalize(text).strip()) > 1:
            boxes.append(Box(left, top, right, bottom, text, score))
    return boxes


def group_boxes(boxes: Sequence[Box]) -> list[Block]:
    """Returns blocks of adjacent boxes in reading order: from the top, rows from the left."""
    groups: list[list[Box]] = []
    for box in sorted(boxes, key=lambda box: (box.top, box.left))[: 4 * _MAX_BLOCKS]:
        joined = [box]
        near = [group for group in groups if any(_are_adjacent(one, box) for one in group)]
        for group in near:
            joined = group + joined
        groups = [group for group in groups if group not in near] + [joined]
    groups.sort(key=lambda group: (min(b.top for b in group), min(b.left for b in group)))
    return [_to_block(group) for group in groups[:_MAX_BLOCKS]]


def _are_adjacent(a: Box, b: Box) -> bool:
    """Returns True for neighbours in a row, or of similar height in two rows below each other."""
    height = min(a.height, b.height)
    if max(a.height, b.height) > 1.6 * height:
        return False
    gap_x = max(a.left, b.left) - min(a.right, b.right)
    gap_y = max(a.top, b.top) - min(a.bottom, b.bottom)
    is_row = gap_y < -height / 2 and gap_x < 1.5 * height
    width = min(a.right - a.left, b.right - b.left)
    return is_row or (gap_y < 0.8 * height and gap_x < -0.3 * width)


def _to_block(boxes: list[Box]) -> Block:
    """Joins the boxes of a block, row by row."""
    rows: list[list[Box]] = []
    for box in sorted(boxes, key=lambda box: box.top + box.bottom):
        if rows and box.top + box.height / 2 < rows[-1][0].bottom - rows[-1][0].height / 5:
            rows[-1].append(box)
        else:
            rows.append([box])
    ordered = [box for row in rows for box in sorted(row, key=lambda box: box.left)]
    return Block(" ".join(box.text for box in ordered), min(box.confidence for box in boxes))


def _follow(shown: list[_Shown], blocks: list[Block], second: float) -> list[_Shown]:
    """Returns the texts shown at `second`, in reading order, and ends the other ones."""
    rest, now = list(shown), []
    for block in blocks:
        text = next((one for one in rest if one.continues(block)), None)
        if text is None:
            text = _Shown(block, second)
        else:
            rest.remove(text)
            text.block = max(text.block, block, key=lambda one: one.confidence)
        now.append(text)
    for text in rest:
        text.end = second
    return now


def _scale(picture: Picture) -> Image.Image:
    """Returns the picture with square pixels, at most LONGEST wide and high."""
    image = picture.image
    width, height = float(image.width * picture.pixel_aspect), float(image.height)
    scale = min(LONGEST / max(width, height), max(1.0, _SHORTEST / min(width, height)))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)


def _is_same(cells: Int[np.ndarray, "H W"], others: Int[np.ndarray, "H2 W2"]) -> bool:
    """Returns True if no square of the frame has changed its brightness."""
    is_equal_size = cells.shape == others.shape
    return is_equal_size and bool(np.abs(cells - others).max(initial=0) <= _SAME_BRIGHTNESS)
