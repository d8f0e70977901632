"""What a command says when its input is at fault: one clear line, a non-zero exit, no traceback."""

import contextlib
import os
import sys
import traceback


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
