"""Program that searches an index in one process and in parts on a Ray cluster.

    python tests/sharded_serving.py INDEX PARTS QUERIES VIDEO PATIENCE

Prints a JSON object. One part is killed, and then VIDEO is added to the index. The seconds in which
a part must answer are multiplied by PATIENCE.
"""

import contextlib
import dataclasses
import json
import os
import signal
import sys
import time
from pathlib import Path

from network import find_processes, start_loopback

SENTENCES = [f"{a} {b} {c}" for a in ("a red", "a blue", "and") for b in "abcde" for c in "fghij"]


def find_parts():
    """Returns the ids of the processes of this cluster that hold parts."""
    found = []
    for pid in find_processes():
        with contextlib.suppress(OSError):  # it has ended
            if b"ServeReplica" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found


def comparable(answer):
    return dataclasses.replace(answer, seconds={})


def main():
    start_loopback()
    from xclip_jax.search import Index
    from xclip_jax.search import sharded as sharding
    from xclip_jax.search.sharded import open_sharded

    location, count, num_queries, video = sys.argv[1], *map(int, sys.argv[2:4]), sys.argv[4]
    patience = float(sys.argv[5])
    sharding.ASK_SECONDS *= patience
    sharding.PING_SECONDS *= patience
    facts = {"equal": 0}
    with open_sharded(location, count) as sharded:
        one = Index.open(location)
        sharded.warm_up()
        facts["sizes"] = [n for _, (n, _) in sorted(sharded._sizes.items())]
        facts["films"] = sharded.films() == one.films()
        facts["files"] = [sharded.num_files, one.num_files]
        for number in range(num_queries):
            text, k = SENTENCES[number % len(SENTENCES)], 1 + number % 15
            options = {"dedupe": number % 3 == 0, "offset": number % 4, "start": number % 2 or None}
            answers = [index.query(text, k, **options) for index in (one, sharded)]
            facts["equal"] += comparable(answers[0]) == comparable(answers[1])
        best = one.query("a red dog").hits[0].id
        likes = [index.like(best) for index in (one, sharded)]
        facts["like"] = comparable(likes[0]) == comparable(likes[1])
        maps = [dataclasses.asdict(index.heat_map(best, "a red dog")) for index in (one, sharded)]
        facts["heat_map"] = str(maps[0]) == str(maps[1])
        facts["thumbnail"] = one.thumbnail(best) == sharded.thumbnail(best)
        facts["segment"] = one.segment(best) == sharded.segment(best)

        os.kill(find_parts()[0], signal.SIGKILL)
        killed, answered = time.monotonic(), time.monotonic()
        while True:
            answer = sharded.query("a red dog", 15)
            now = time.monotonic()
            facts.setdefault("first", [now - answered, answer.missing, answer.note])
            facts["slowest"] = max(facts.get("slowest", 0), now - answered)
            # A patient query may wait until the part is back.
            was_seen = facts["first"][1] or patience > 1
            if now - killed > 60 or (was_seen and not answer.missing):
                break
            time.sleep(0.1)
            answered = time.monotonic()
        facts["whole_after"] = now - killed
        facts["whole"] = comparable(answer) == comparable(one.query("a red dog", 15))

        Index.open(location).add(video)
        facts["refreshed"] = [sharded.refresh(), one.refresh(), sharded.refresh()]
        answers = [comparable(index.query("a red dog", 40)) for index in (one, sharded)]
        facts["added"] = answers[0] == answers[1]
        facts["segments"] = [one.num_segments, sharded.num_segments]
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
