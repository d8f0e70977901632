"""What every annotation reader gives: clips, and what is odd about the files they come from."""

import collections
import dataclasses

SPLITS = ("train", "val", "test")
# What a finding is about. An id that is LOST is in a split's list and cannot become a clip.
LOST = "id without captions"
UNLISTED = "captions of an id in no list"
REPEATED = "repeated id"
TWO_SPLITS = "id in two splits"
BLANK = "empty caption"
SEGMENT = "odd segment"
_EVALUATION_FIRST = ("test", "val", "train")


@dataclasses.dataclass(frozen=True)
class Clip:
    """A video, or the part of it from `start` to `end` seconds, with its captions.

    `video` is a file's path below the videos' folder, or its id: the path or name without suffix.
    """

    video: str
    captions: tuple[str, ...]
    split: str = "train"
    start: float | None = None
    end: float | None = None

    @property
    def id(self):
        """The video, with the segment if it is one; unique in a data set."""
        if not self.start and self.end is None:
            return self.video
        # All digits: two segments an hour into a video may differ by milliseconds.
        start, end = (repr(s or 0).removesuffix(".0") for s in (self.start, self.end))
        return f"{self.video}[{start}-{'' if self.end is None else end}]"


@dataclasses.dataclass(frozen=True)
class Finding:
    """Something odd: what (see the names above), about which id, and details."""

    what: str
    id: str
    detail: str = ""


class Listing:
    """Clips in the order of the annotations; nothing odd about them is passed over in silence.

    Attributes:
        expected: {split: number of videos the paper has}; empty for one's own captions.
        paragraphs: whether all captions of a video are joined to one text.
    """

    def __init__(self, expected=None, paragraphs=False, clips=()):
        self.expected = expected or {}
        self.paragraphs = paragraphs
        self._notes, self._lost = [], {}
        self._clips = {clip.id: clip for clip in clips}

    @property
    def clips(self):
        """List of Clip, each with a caption."""
        return list(self._clips.values())

    @property
    def lost(self):
        """The findings about ids that cannot become clips; their detail is the split."""
        return list(self._lost.values())

    @property
    def findings(self):
        """List of Finding, of all that is odd."""
        return [*self._notes, *self.lost]

    def note(self, what, video, detail=""):
        """Records a finding."""
        self._notes.append(Finding(what, video, detail))

    def add(self, split, video, captions):
        """Adds a video that a list names, with its captions (or sentences of its paragraph).

        Said again, its new captions join the known ones. In two splits, it stays out of training.
        """
        texts = [tidy(caption) for caption in captions]
        if "" in texts:
            self.note(BLANK, video, f"{texts.count('')} in {split}")
        texts = [text for text in texts if text]
        if self.paragraphs and texts:
            texts = [" ".join(texts)]
        known = self._clips.get(video)
        if known and known.split != split:
            self.note(TWO_SPLITS, video, f"{known.split} and {split}")
            if _EVALUATION_FIRST.index(known.split) < _EVALUATION_FIRST.index(split):
                return
            known = None
        if known:
            self.note(REPEATED, video, split)
            texts = [*known.captions, *(text for text in texts if text not in known.captions)]
        if not texts:
            self._lost.setdefault(video, Finding(LOST, video, split))
            return
        if video in self._lost:
            before = self._lost.pop(video).detail
            if before == split:
                self.note(REPEATED, video, split)
            else:
                self.note(TWO_SPLITS, video, f"{before} and {split}")
        self._clips[video] = Clip(video, tuple(texts), split)

    def counts(self):
        """{split: number of clips}."""
        return collections.Counter(clip.split for clip in self._clips.values())


def tidy(text):
    """On one line, single spaces, without halves of surrogate pairs (which JSON may hold)."""
    return " ".join(text.encode(errors="ignore").decode().split())
