"""A sheet for text, boxes and images, laid out in pixels, origin at the top left.

No text is ever parsed as mathematics: captions are untrusted, and `$` is just a dollar.
"""

import contextlib
import unicodedata
import warnings

from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

INK, MUTED, LINE, PAPER = "#1c2330", "#6b7484", "#e3e6eb", "#ffffff"
GREEN, AMBER, BLUE, ORANGE = "#15803d", "#b45309", "#3452c7", "#d9730d"
UNITS_PER_INCH, DOTS_PER_INCH = 100, 170
# Names on common systems; DejaVu, which comes with matplotlib, has no CJK. Colour emoji fonts are
# bitmaps that matplotlib cannot draw.
FALLBACK_FONTS = ("Noto Sans CJK SC", "Noto Sans CJK JP", "Hiragino Sans", "Microsoft YaHei")


@contextlib.contextmanager
def boxes_for_missing_glyphs():
    """A character that no font has is drawn as an empty box, without a warning for each."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Gg]lyph.*")
        yield


def printable(text):
    """One line of characters that can be drawn: no control, joiner or surrogate code points."""
    text = text.encode("utf-8", "replace").decode("utf-8")
    drawable = (" " if unicodedata.category(c) in ("Cc", "Zl", "Zp") else c for c in text)
    hidden = ("Cf", "Co", "Cs", "Cn")
    kept = (c for c in drawable if unicodedata.category(c) not in hidden and not is_selector(c))
    return " ".join("".join(kept).split())


def is_selector(character):
    """Whether it asks for the emoji or text form of the character before it."""
    return 0xFE00 <= ord(character) <= 0xFE0F  # asks for the emoji or text form of the one before


class Canvas:
    """A sheet of `width` x `height` pixels (y down) that text, boxes and images are put on."""

    def __init__(self, width, height):
        size = (width / UNITS_PER_INCH, height / UNITS_PER_INCH)
        self.figure = Figure(size, dpi=UNITS_PER_INCH, facecolor=PAPER)
        self.renderer = FigureCanvasAgg(self.figure).get_renderer()
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, width), ylim=(height, 0), autoscale_on=False)
        self.axes.axis("off")
        self.layer = 0  # what is drawn later lies above
        installed = set(font_manager.get_font_names())
        self.family = ["DejaVu Sans", *(name for name in FALLBACK_FONTS if name in installed)]

    def above(self):
        self.layer += 1
        return self.layer

    def text(self, x, y, text, size=13, color=INK, align="left", weight="normal"):
        style = {"fontsize": size * 72 / UNITS_PER_INCH, "color": color, "family": self.family}
        place = {"ha": align, "va": "center", "fontweight": weight, "parse_math": False}
        place["zorder"] = self.above()
        return self.axes.text(x, y, text, **style, **place)

    def width(self, text, size, weight="normal"):
        artist = self.text(0, 0, text, size=size, weight=weight)
        width = artist.get_window_extent(self.renderer).width
        artist.remove()
        return width

    def wrap(self, text, width, lines, size=13, weight="normal"):
        """At most `lines` lines that fit `width`; longer words are broken, the rest is cut (…)."""
        words, result = printable(text)[:1000].split(), []
        while words and len(result) < lines:
            line = words.pop(0)
            if self.width(line, size, weight) > width:  # one word, or a script without spaces
                fits = self.longest_prefix(line, width, size, weight)
                words.insert(0, line[fits:])
                line = line[:fits]
            else:
                while words and self.width(f"{line} {words[0]}", size, weight) <= width:
                    line = f"{line} {words.pop(0)}"
            result.append(line)
        if words:
            fits = self.longest_prefix(result[-1] + "…", width, size, weight, keep="…")
            result[-1] = result[-1][:fits].rstrip(" ,.;:") + "…"
        return result or ["(empty)"]

    def longest_prefix(self, text, width, size, weight, keep=""):
        """How many characters of `text`, followed by `keep`, fit: at least one."""
        low, high = 1, len(text)
        while low < high:
            middle = (low + high + 1) // 2
            fits = self.width(text[:middle] + keep, size, weight) <= width
            low, high = (middle, high) if fits else (low, middle - 1)
        return low

    def paragraph(self, x, y, text, width, lines, size=13, weight="normal"):
        """Draws up to `lines` lines, centred at the height y."""
        wrapped = self.wrap(text, width, lines, size, weight)
        for k, line in enumerate(wrapped):
            middle = y + (k - (len(wrapped) - 1) / 2) * size * 1.35
            self.text(x, middle, line, size, weight=weight)

    def box(self, x, y, width, height, fill=PAPER, edge=LINE, radius=8, linewidth=1.0):
        style = {"boxstyle": f"round,pad=0,rounding_size={radius}", "mutation_aspect": 1}
        style |= {"facecolor": fill, "edgecolor": edge, "linewidth": linewidth * 0.72}
        style["zorder"] = self.above()
        self.axes.add_patch(FancyBboxPatch((x, y), width, height, **style))

    def bar(self, x, y, width, height, color):
        style = {"facecolor": color, "linewidth": 0, "zorder": self.above()}
        self.axes.add_patch(Rectangle((x, y), width, height, **style))

    def image(self, pixels, x, y, width, height, **options):
        extent = (x, x + width, y + height, y)
        self.axes.imshow(pixels, extent=extent, aspect="auto", zorder=self.above(), **options)

    def save(self, path):
        self.figure.savefig(path, dpi=DOTS_PER_INCH)
