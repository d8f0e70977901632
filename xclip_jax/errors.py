"""What a command says when its input is at fault: one clear line, a non-zero exit, no traceback."""

import contextlib
import sys


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
