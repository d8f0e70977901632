"""What a command says when its input is at fault: one clear line, a non-zero exit, no traceback."""

import contextlib
import os
import sys
import threading
import traceback

from absl import flags
from tqdm import tqdm


class InputError(ValueError):
    """The user's input is at fault; the message names what, where and what is allowed."""


@contextlib.contextmanager
def one_line_errors():
    """Turns an InputError, or an OSError such as a missing folder, into one line and exit 1."""
    try:
        yield
    except (InputError, OSError) as error:
        sys.exit("error: " + " ".join(str(error).split()))
    except KeyboardInterrupt:
        sys.exit("interrupted")


def run_command(command):
    """Runs a command line; one that fails ends at once, without the interpreter's teardown.

    There the threads of XLA and Orbax, cut short, would crash or print tracebacks of their own.
    """
    try:
        command()
    except SystemExit as stop:
        if stop.code in (None, 0):
            raise
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
        _end(stop.code if isinstance(stop.code, int) else 1)
    except Exception:  # a defect; other processes of the program must not wait for this one
        traceback.print_exc()
        _end(1)


def _end(status):
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def parse_flags(argv):
    """absl's parsing, with one line for a mistake, and success for a call for help."""
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        lines = str(error).strip().splitlines()
        if "Traceback (most recent call last):" in lines:  # of a config file that raised
            lines = [lines[0].split("Error whilst")[0], lines[-1].split("InputError: ")[-1]]
        sys.exit("error: " + " ".join(" ".join(lines).split()))
    except (AttributeError, KeyError, TypeError) as error:
        field = " ".join(str(error.args[0] if error.args else error).split()).strip("\"'")
        field = field.partition(" Other fields present:")[0]
        sys.exit(f"error: --config has no field {field}: see xclip_jax/config.py for all of them")
    except SystemExit:
        sys.exit(0 if any(arg.lstrip("-").startswith("help") for arg in argv[1:]) else 1)


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
