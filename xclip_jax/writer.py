"""metrics.jsonl, one JSON object a line, and TensorBoard files."""

import json
import os
from pathlib import Path

from tensorboardX import SummaryWriter

FILE = "metrics.jsonl"


class Writer:
    """Appends scalars by step; a resumed run first drops what lies after its checkpoint."""

    def __init__(self, workdir, tensorboard, after_step):
        path = Path(workdir) / FILE
        kept = [line for line in read_metrics(workdir) if line["step"] <= after_step]
        partial = path.with_suffix(".part")
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(partial, path)
        self._file = path.open("a")
        self._board = (
            SummaryWriter(str(workdir), purge_step=after_step + 1, write_to_disk=True)
            if tensorboard
            else None
        )

    def write(self, step, scalars):
        """Writes one line: step and scalars, a dict of name -> number."""
        self._file.write(json.dumps({"step": step, **scalars}) + "\n")
        self._file.flush()
        if self._board:
            for name, value in scalars.items():
                self._board.add_scalar(name, value, step)

    def close(self):
        """Writes out what is buffered."""
        self._file.close()
        if self._board:
            self._board.close()


def read_metrics(workdir):
    """The lines of metrics.jsonl as dicts; a last line cut by a kill is left out."""
    path = Path(workdir) / FILE
    lines = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines
