"""An index for tests of the server and the page, which returns its segments for every query."""

import contextlib
import dataclasses
import io
import os
import socket
import threading
from pathlib import Path

import numpy as np
import uvicorn
from PIL import Image

from xclip_jax.cli import InputError
from xclip_jax.search import serve
from xclip_jax.search.index import Index
from xclip_jax.search.indexing import BusyError, IndexingSummary
from xclip_jax.search.results import Answer, Film, HeatMap, Hit, Match

CONTENT = bytes(range(256)) * 40
SECRET = "a secret of the server"
SEARCHED = 12340


def jpeg(color):
    buffer = io.BytesIO()
    Image.new("RGB", (64, 48), color).save(buffer, "JPEG")
    return buffer.getvalue()


@contextlib.contextmanager
def serving(index, **options):
    """Serves an index from a thread, and yields the address (host, port)."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(serve.make_app(index, **options), log_level="critical")
        config.timeout_graceful_shutdown = 1
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield listener.getsockname()[:2]
        finally:
            server.should_exit = True
            thread.join()


def segment(number):
    """Returns the id of a segment, whose numbers start at 1."""
    return f"{number:016x}"


def make_hit(number, path, start, end, second):
    """Returns a moment that covers its segment, of which the last ones match weakly."""
    said = Match("speech", 3.25, start, end, f"we say word {number}")
    return Hit(
        rank=number,
        score=30.0 - number,
        id=segment(number),
        path=str(path),
        start=start,
        end=end,
        second=second,
        segment_start=start,
        segment_end=end,
        duration=max(end, 60.0),
        weak=number > 30,
        matches=(Match("picture", 30.0 - number, start, end), *([said] if number % 2 else [])),
    )


class FakeIndex(Index):
    """An index that returns its segments for every query, in order.

    With `dedupe`, each hit of an even number is folded into the one before it.

    While `busy` is True, it refuses videos as an index to which another process is adding.

    Args:
        segments: (path, start, end, best second) of each.
        sources: what it was made from.
    """

    location, model_name, num_files, num_segments = "videos.index", "tiny", 2, 0
    sources, examples = ("picture",), ()

    def __init__(self, segments, sources=("picture", "speech", "text")):
        self.hits = {segment(n): make_hit(n, *fields) for n, fields in enumerate(segments, 1)}
        self.num_segments, self.refreshed, self.queries = len(segments), threading.Event(), []
        self.sources, self.examples = sources, ["a dog in the snow", "two people talk"]
        self.added, self.busy, self.may_add = [], False, threading.Event()
        self.may_add.set()

    def answer(self, k, *query, offset=0, dedupe=False):
        """Returns hits and remembers the query."""
        self.queries.append(query)
        hits = list(self.hits.values())
        if dedupe:
            pairs = [hits[n : n + 2] for n in range(0, len(hits), 2)]
            hits = [dataclasses.replace(hit, duplicates=tuple(rest)) for hit, *rest in pairs]
            hits = [dataclasses.replace(hit, rank=rank) for rank, hit in enumerate(hits, 1)]
        hits = hits[offset : offset + k]
        return Answer(hits, {"encode": 0.012, "search": 0.003}, SEARCHED, "a note")

    def query(
        self,
        text,
        k=10,
        *,
        offset=0,
        sources=None,
        dedupe=False,
        merge=True,
        exhaustive=False,
        path=None,
        start=None,
        end=None,
    ):
        if not text:
            raise InputError("the query is empty")
        if text == "break":
            raise RuntimeError(SECRET)
        for source in sources or ():
            if source not in self.sources:
                raise InputError(f"sources: the index has no {source}")
        answer = self.answer(k, text, path, start, end, offset=offset, dedupe=dedupe)
        if not sources:
            return answer
        hits = [
            dataclasses.replace(hit, matches=tuple(m for m in hit.matches if m.source in sources))
            for hit in answer
        ]
        return dataclasses.replace(answer, hits=[hit for hit in hits if hit.matches])

    def similar(self, file, k=10, *, offset=0, dedupe=False, path=None, start=None, end=None):
        try:
            Image.open(file).load()
        except OSError as error:
            raise InputError(f"{file}: cannot be read as an image") from error
        return self.answer(k, file, path, offset=offset, dedupe=dedupe)

    def like(self, segment_id, k=10, *, offset=0, dedupe=False, path=None, start=None, end=None):
        return self.answer(k, segment_id, path, start, end, offset=offset, dedupe=dedupe)

    def heat_map(self, segment_id, text):
        if text == "no attention":
            raise InputError("no heat map")
        hit, words = self.hits[segment_id], text.split()
        times = np.linspace(hit.segment_start, hit.segment_end - 0.5, 6)
        words_Wx6 = np.random.default_rng(1).uniform(-0.1, 0.4, (len(words), 6))
        sentence = 0.35 - 0.02 * np.abs(times - hit.second)
        return HeatMap(words, times.tolist(), words_Wx6, sentence.tolist())

    def find_file(self, segment_id):
        path = self.hits[segment_id].path
        try:
            with open(path, "rb"):
                return path
        except FileNotFoundError:
            raise OSError(f"{os.path.basename(path)} is no longer on disk") from None
        except OSError as error:
            raise OSError(f"{os.path.basename(path)} cannot be read: {error}") from None

    def films(self, newest):
        films = {}
        for hit in self.hits.values():
            mtime = 1.7e9 - len(films)
            films.setdefault(hit.path, Film(hit.id, hit.path, hit.duration, mtime))
        return list(films.values())[:newest]

    def add(self, videos, prune=False, *, ocr=False, speech=None):
        """Remembers the videos once `may_add` is set.

        Those that contain "bad" are unreadable.
        """
        assert self.may_add.wait(30)
        if self.busy:
            raise BusyError("another process is adding to videos.index")
        self.added += videos
        contents = {path: Path(path).read_bytes()[:100] for path in videos}
        if any(b"break" in content for content in contents.values()):
            raise RuntimeError(SECRET)
        bad = {path: "cannot be decoded" for path, content in contents.items() if b"bad" in content}
        return IndexingSummary(files=1, unreadable=bad)

    def thumbnail(self, segment_id):
        return jpeg("red")

    def segment(self, segment_id):
        return dataclasses.replace(self.hits[segment_id], rank=0, score=None, matches=())

    def refresh(self):
        self.refreshed.set()
        return False
