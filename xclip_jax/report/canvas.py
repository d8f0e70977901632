"""A drawing sheet for text, boxes and images, in pixels with the origin at the top left."""

import bisect
import contextlib
import unicodedata
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from matplotlib.text import Text

INK, MUTED, LINE = "#1c2330", "#6b7484", "#e3e6eb"
GREEN, AMBER, BLUE = "#15803d", "#b45309", "#3452c7"
COLORS = (BLUE, "#d9730d", GREEN, MUTED, AMBER)  # of lines in a chart
UNITS_PER_INCH, DOTS_PER_INCH = 100, 170
# DejaVu, the font of matplotlib, has no CJK. These names are common on Linux, macOS and Windows.
# Colour emoji fonts are bitmaps that matplotlib cannot draw.
FALLBACK_FONTS = ("Noto Sans CJK SC", "Noto Sans CJK JP", "Hiragino Sans", "Microsoft YaHei")
STYLE = Path(__file__).with_name("templates") / "pictures.mplstyle"


@contextlib.contextmanager
def drawing_style() -> Iterator[None]:
    """Sets the style of pictures. Characters without a glyph become boxes, without a warning."""
    installed = set(font_manager.get_font_names())
    fonts = ["DejaVu Sans", *(name for name in FALLBACK_FONTS if name in installed)]
    with matplotlib.rc_context({"font.family": fonts}, STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Gg]lyph.*")
        yield


class Canvas:
    """A sheet of `width` x `height` pixels, y down, to be used within `drawing_style`.

    `axes` draws any other matplotlib artist, `figure` saves the sheet. `style` of the methods:
    arguments of the artist.
    """

    def __init__(self, width: float, height: float) -> None:
        self.figure = Figure((width / UNITS_PER_INCH, height / UNITS_PER_INCH))
        FigureCanvasAgg(self.figure)  # measures text
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, width), ylim=(height, 0), autoscale_on=False)
        self.axes.axis("off")

    def text(
        self, x: float, y: float, text: str, size: float = 13, color: str = INK, **style: Any
    ) -> Text:
        """Draws one line, vertically centred at y."""
        points = size * 72 / UNITS_PER_INCH
        return self.axes.text(x, y, text, va="center", color=color, fontsize=points, **style)

    def paragraph(
        self, x: float, y: float, text: str, width: float, lines: int = 1, **style: Any
    ) -> None:
        """Draws 1 to `lines` lines that fit `width`, the last ending in … where text was cut.

        They are vertically centred at y.
        """

        def cut(line: str, ending: str = "") -> str:  # to at least one character
            def measure(length: int) -> float:
                artist = self.text(0, 0, line[:length] + ending, **style)
                dots = artist.get_window_extent().width
                artist.remove()
                return dots * UNITS_PER_INCH / DOTS_PER_INCH

            return line[: max(1, bisect.bisect(range(1, len(line) + 1), width, key=measure))]

        # Control characters, joiners and variation selectors cannot be drawn.
        hidden = {c for c in text if unicodedata.category(c)[0] == "C" or "\ufe00" <= c <= "\ufe0f"}
        shown = "".join(c for c in text if c.isspace() or c not in hidden)
        rest, result = " ".join(shown.split())[:1000] or "(empty)", []
        while rest and len(result) < lines:
            line = cut(rest)
            is_inside_word = rest[len(line) :][:1].strip()
            if is_inside_word and " " in line:  # a script without spaces is broken anywhere
                line = line.rpartition(" ")[0]
            result.append(line.rstrip())
            rest = rest[len(line) :].lstrip()
        if rest:
            result[-1] = cut(result[-1], "…").rstrip(" ,.;:") + "…"
        height = style.get("size", 13) * 1.35
        for k, line in enumerate(result):
            self.text(x, y + (k - (len(result) - 1) / 2) * height, line, **style)

    def box(self, x: float, y: float, w: float, h: float, radius: float, **style: Any) -> None:
        """Draws a rectangle with rounded corners, below lines and text."""
        style = {"facecolor": "white", "edgecolor": LINE, "linewidth": 0.72, "zorder": 0} | style
        shape = f"round,pad=0,rounding_size={radius}"
        self.axes.add_patch(FancyBboxPatch((x, y), w, h, boxstyle=shape, **style))

    def image(self, pixels: Any, x: float, y: float, width: float, height: float) -> None:
        """Draws an image stretched to a rectangle, below lines and text."""
        extent = (x, x + width, y + height, y)
        self.axes.imshow(pixels, aspect="auto", extent=extent, interpolation="lanczos")
