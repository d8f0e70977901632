"""The picture of an answer: the best second of each hit (PNG)."""

import io
import os

import numpy as np
from PIL import Image

from xclip_jax.data.video import VideoError, still
from xclip_jax.report.canvas import BLUE, INK, MUTED, Canvas, ignore_missing_glyphs

COLUMNS, CARD, TALL, MARGIN = 4, 240, 150, 18  # of the grid; pixels of a picture; space around


@ignore_missing_glyphs()
def draw_grid(path, title, hits, thumbnail):
    """Saves the hits as a grid of pictures.

    Args:
        title: the query.
        hits: a list of Hit, at least one.
        thumbnail: segment id -> JPEG, for files that are gone.
    """
    columns = min(COLUMNS, len(hits))
    rows = -(-len(hits) // columns)
    width = max(2, columns) * (CARD + MARGIN) + MARGIN
    canvas = Canvas(width, 70 + rows * (TALL + 62))
    canvas.paragraph(MARGIN, 36, title, width - 2 * MARGIN, 2, size=17, weight="bold")
    for place, hit in enumerate(hits):
        x = MARGIN + place % columns * (CARD + MARGIN)
        y = 70 + place // columns * (TALL + 62)
        _draw_hit(canvas, x, y, hit, thumbnail)
    canvas.save(path)


def _draw_hit(canvas, x, y, hit, thumbnail):
    pixels = _pixels(hit, thumbnail)
    scale = min(CARD / pixels.shape[1], TALL / pixels.shape[0])
    wide, tall = pixels.shape[1] * scale, pixels.shape[0] * scale
    canvas.box(x, y, CARD, TALL, 4, facecolor="#11151d", edgecolor="#11151d")
    left, top = x + (CARD - wide) / 2, y + (TALL - tall) / 2
    canvas.image(pixels, left, top, wide, tall, interpolation="lanczos")
    minutes, seconds = divmod(int(hit.second), 60)
    canvas.text(x, y + TALL + 15, f"{hit.rank}", 13, BLUE, weight="bold")
    canvas.text(x + CARD, y + TALL + 15, f"{hit.score:.2f}", 13, INK, ha="right")
    canvas.text(x + 26, y + TALL + 15, f"{minutes}:{seconds:02}", 13, INK, weight="bold")
    name = canvas.wrap(os.path.basename(hit.path), CARD, 1, 11)[0]
    canvas.text(x, y + TALL + 34, name, 11, MUTED)


def _pixels(hit, thumbnail):
    """The picture at the best second; of a file that cannot be read any more, what was kept."""
    try:
        jpeg = still(hit.path, hit.second)
    except (VideoError, OSError):
        jpeg = thumbnail(hit.id)
    with Image.open(io.BytesIO(jpeg)) as image:
        return np.asarray(image.convert("RGB"))
