"""Reader of the .wandb files of Weights & Biases, a log of protocol buffers as LevelDB's.

A file is a header of 7 bytes, then blocks of 32 KiB of chunks: CRC (4 bytes), length (2), kind (1),
data. Kinds: 1 a whole record, 2 the first chunk of one, 3 a middle one, 4 the last.
"""

import json
import struct

BLOCK, HEADER = 1 << 15, 7


def read_records(path):
    """Yields the records of a file."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, parts = path.read_bytes(), HEADER, []
    assert data[:4] == b":W&B"
    while position + HEADER <= len(data):
        if BLOCK - position % BLOCK < HEADER:  # padding
            position += BLOCK - position % BLOCK
            continue
        length, kind = struct.unpack_from("<HB", data, position + 4)
        position += HEADER + length
        parts.append(data[position - length : position])
        if kind in (1, 4):
            yield Record.FromString(b"".join(parts))
            parts = []


def read_run(folder):
    """Returns (run id, {setting: value}, history rows, {name: final value}) of offline runs."""
    names, settings, history, summary = set(), {}, [], {}
    for path in sorted(folder.glob("offline-run-*/run-*.wandb")):
        for record in read_records(path):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                names.add(record.run.run_id)
            if kind in ("run", "config"):
                config = record.run.config if kind == "run" else record.config
                settings |= plain(config.update)
            if kind == "history":
                row = plain(record.history.item)
                history.append({k: v for k, v in row.items() if not k.startswith("_")})
            if kind == "summary":
                summary |= plain(record.summary.update)
    (name,) = names
    return name, settings, history, summary


def plain(items):
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
