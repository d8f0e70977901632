"""Progress bars: live on a terminal, a line now and then in a log file."""

import sys
import threading

from tqdm import tqdm

tqdm.set_lock(threading.RLock())  # its own is a semaphore, which a process that is killed leaks
_silent = False


def silence():
    """No more bars in this process: another one speaks for all."""
    global _silent
    _silent = True


def progress(total, desc, unit, initial=0):
    """A tqdm bar with rate and time left over `total` things; bytes ("B") as kB, MB, ..."""
    every = 0.2 if sys.stderr.isatty() else 30
    return tqdm(
        total=total,
        desc=desc,
        unit=unit,
        unit_scale=unit == "B",
        disable=_silent,
        initial=initial,
        mininterval=every,
        maxinterval=2 * every,
        dynamic_ncols=True,
    )
