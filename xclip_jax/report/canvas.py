"""A drawing sheet for text, boxes and images, in pixels with the origin at the top left.

Captions are untrusted, so text is not parsed as formulas: `$` is drawn as a dollar sign.
"""

import bisect
import contextlib
import unicodedata
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle
from matplotlib.text import Text

INK, MUTED, LINE, PAPER = "#1c2330", "#6b7484", "#e3e6eb", "#ffffff"
GREEN, AMBER, BLUE, ORANGE = "#15803d", "#b45309", "#3452c7", "#d9730d"
UNITS_PER_INCH, DOTS_PER_INCH = 100, 170
# DejaVu, the font of matplotlib, has no CJK. These names are common on Linux, macOS and Windows.
# Colour emoji fonts are bitmaps that matplotlib cannot draw.
FALLBACK_FONTS = ("Noto Sans CJK SC", "Noto Sans CJK JP", "Hiragino Sans", "Microsoft YaHei")
Pixels = int | float
CHART_STYLE: dict[Any, Any] = {  # settings of matplotlib
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": "#b8bfca",
    "axes.axisbelow": True,
    **{f"axes.spines.{side}": False for side in ("top", "right", "left")},
    **{f"{axis}tick.color": MUTED for axis in "xy"},
    **{f"{axis}tick.major.size": 0 for axis in "xy"},
    "grid.color": LINE,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "savefig.dpi": DOTS_PER_INCH,
}


@contextlib.contextmanager
def ignore_missing_glyphs() -> Iterator[None]:
    """Silences matplotlib's warnings about characters without a glyph, which it draws as boxes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Gg]lyph.*")
        yield


def printable(text: str) -> str:
    """Returns the text on one line, without control, joiner and variation selector code points."""
    text = text.encode("utf-8", "replace").decode("utf-8")  # surrogates cannot be drawn
    hidden = {c for c in text if unicodedata.category(c)[0] == "C" or 0xFE00 <= ord(c) <= 0xFE0F}
    return " ".join("".join(c for c in text if c.isspace() or c not in hidden).split())


class Canvas:
    """A sheet of `width` x `height` pixels, y down, where later drawings cover earlier ones.

    `style` of the methods: keyword arguments of the matplotlib artist.
    """

    def __init__(self, width: Pixels, height: Pixels) -> None:
        size = (width / UNITS_PER_INCH, height / UNITS_PER_INCH)
        self._figure = Figure(size, dpi=UNITS_PER_INCH, facecolor=PAPER)
        self._renderer = FigureCanvasAgg(self._figure).get_renderer()
        self._axes = self._figure.add_axes((0, 0, 1, 1))
        self._axes.set(xlim=(0, width), ylim=(height, 0), autoscale_on=False)
        self._axes.axis("off")
        installed = set(font_manager.get_font_names())
        self._family = ["DejaVu Sans", *(name for name in FALLBACK_FONTS if name in installed)]

    def text(
        self, x: Pixels, y: Pixels, text: str, size: Pixels = 13, color: str = INK, **style: Any
    ) -> Text:
        """Draws one line, vertically centred at y."""
        style |= {"va": "center", "color": color, "parse_math": False, "family": self._family}
        style |= {"fontsize": size * 72 / UNITS_PER_INCH, "zorder": 1}
        return self._axes.text(x, y, text, **style)

    def measure_width(self, text: str, size: Pixels, **style: Any) -> Pixels:
        """Returns the width of a line in pixels."""
        artist = self.text(0, 0, text, size, **style)
        width = artist.get_window_extent(self._renderer).width
        artist.remove()
        return width

    def wrap(
        self, text: str, width: Pixels, lines: int, size: Pixels = 13, **style: Any
    ) -> list[str]:
        """Returns 1 to `lines` lines that fit `width`, the last ending in … where text was cut."""

        def fitting_length(line: str, ending: str = "") -> int:  # at least 1
            def width_of(length: int) -> Pixels:
                return self.measure_width(line[:length] + ending, size, **style)

            return max(1, bisect.bisect_right(range(1, len(line) + 1), width, key=width_of))

        rest, result = printable(text)[:1000], []
        while rest and len(result) < lines:
            line = rest[: fitting_length(rest)]
            is_inside_word = rest[len(line) : len(line) + 1].strip()
            if is_inside_word and " " in line:  # a script without spaces is broken anywhere
                line = line.rpartition(" ")[0]
            result.append(line.rstrip())
            rest = rest[len(line) :].lstrip()
        if rest:
            last = result[-1][: fitting_length(result[-1], "…")]
            result[-1] = last.rstrip(" ,.;:") + "…"
        return result or ["(empty)"]

    def paragraph(
        self, x: Pixels, y: Pixels, text: str, width: Pixels, lines: int, **style: Any
    ) -> None:
        """Draws up to `lines` lines, vertically centred at y."""
        wrapped, height = self.wrap(text, width, lines, **style), style.get("size", 13) * 1.35
        for k, line in enumerate(wrapped):
            self.text(x, y + (k - (len(wrapped) - 1) / 2) * height, line, **style)

    def box(
        self, x: Pixels, y: Pixels, width: Pixels, height: Pixels, radius: Pixels, **style: Any
    ) -> None:
        """Draws a rectangle with rounded corners."""
        style = {"facecolor": PAPER, "edgecolor": LINE, "linewidth": 0.72} | style
        style |= {"boxstyle": f"round,pad=0,rounding_size={radius}", "zorder": 1}
        self._axes.add_patch(FancyBboxPatch((x, y), width, height, **style))

    def bar(self, x: Pixels, y: Pixels, width: Pixels, height: Pixels, color: str) -> None:
        """Draws a filled rectangle without an edge."""
        style = {"facecolor": color, "linewidth": 0, "zorder": 1}
        self._axes.add_patch(Rectangle((x, y), width, height, **style))

    def image(
        self, pixels: np.ndarray, x: Pixels, y: Pixels, width: Pixels, height: Pixels, **style: Any
    ) -> None:
        """Draws an image stretched to a rectangle."""
        style |= {"extent": (x, x + width, y + height, y), "zorder": 1}
        self._axes.imshow(pixels, aspect="auto", **style)

    def save(self, path: str | Path) -> None:
        """Writes the sheet as a PNG."""
        self._figure.savefig(path, dpi=DOTS_PER_INCH)
