"""A clip as a row of its frames."""

import numpy as np
from PIL import Image

STRIP_FRAMES = 6
FRAME_SIDE, FRAME_GAP = 112, 4  # pixels of one frame of a strip


def evenly_spaced(count, limit):
    """At most `limit` of the indices 0 .. count - 1, first and last included."""
    return np.unique(np.linspace(0, count - 1, min(count, limit)).round().astype(int))


def strip_width(frames=STRIP_FRAMES):
    """Pixels of a strip of so many frames."""
    return frames * (FRAME_SIDE + FRAME_GAP) - FRAME_GAP


def make_strip(frames_FxSxSx3, limit=STRIP_FRAMES):
    """A row of up to `limit` frames, uint8 RGBA of height FRAME_SIDE; the gaps are transparent."""
    frames = np.asarray(frames_FxSxSx3)
    shown = evenly_spaced(len(frames), limit)
    strip = np.zeros((FRAME_SIDE, strip_width(len(shown)), 4), np.uint8)
    for k, index in enumerate(shown):
        left = k * (FRAME_SIDE + FRAME_GAP)
        strip[:, left : left + FRAME_SIDE, :3] = resize(frames[index], FRAME_SIDE)
        strip[:, left : left + FRAME_SIDE, 3] = 255
    return strip


def resize(frame_SxSx3, side):
    """A uint8 frame at another size: side x side x 3."""
    image = Image.fromarray(np.ascontiguousarray(frame_SxSx3, np.uint8))
    return np.asarray(image.resize((side, side), Image.Resampling.BICUBIC))
