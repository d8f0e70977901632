"""Parsing of a command line that takes --config: a mistake is answered with one line."""

import sys

from absl import flags


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
