"""Released annotation files read strictly: what is wrong with one is said in one clear line."""

import csv
import functools
import io
import json
import pickle
from pathlib import Path

from xclip_jax.cli import InputError


class Folder:
    """The folder that holds a benchmark's annotation files.

    Raises:
        InputError: it is none, or one of `names` is missing; the message says where to get them.
    """

    def __init__(self, path, names, download):
        self.path = Path(path)
        wanted = f"it must hold {', '.join(names)}; {download}"
        if not self.path.is_dir():
            what = "is a file" if self.path.is_file() else "is no folder"
            raise InputError(f"{path} {what}: {wanted}")
        missing = [name for name in names if not (self.path / name).is_file()]
        if missing:
            raise InputError(f"{path} has no {', '.join(missing)}: {wanted}")

    def json(self, name, kind):
        """(path, content) of a JSON file whose outermost value is a `kind`: dict or list."""
        path = self.path / name
        return path, checked(parse_json(_text(path), path), kind, path)

    def lines(self, name):
        """The lines of a text file that are not blank; only their ends are cut off."""
        lines = (line.removesuffix("\r") for line in _text(self.path / name).split("\n"))
        return [line for line in lines if line.strip()]

    def ids(self, name):
        """The ids of a list, one a line."""
        path = self.path / name
        ids = [line.strip() for line in self.lines(name)]
        for number, line in enumerate(ids, 1):
            if len(line.split()) > 1 or line[0] in "{[":
                raise InputError(f"{path}, line {number}: must be one id, not {line[:60]!r}")
        return ids

    def csv(self, name, columns):
        """(path, rows as dicts) of a CSV file with a header that has these columns."""
        path = self.path / name
        reader = csv.DictReader(io.StringIO(_text(path), newline=""), strict=True)
        rows = []
        try:
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                if not all(isinstance(row.get(column), str) for column in columns):
                    raise InputError(f"{where}: has no {' or '.join(columns)}")
                if None in row:
                    raise InputError(f"{where}: more values than columns; quote a text with commas")
                rows.append(row)
        except csv.Error as error:
            raise InputError(f"{path}, line {reader.line_num}: not valid CSV: {error}") from None
        if not rows:
            raise InputError(f"{path}: holds no rows below a header with {', '.join(columns)}")
        return path, rows

    def plain_pickle(self, name):
        """(path, content) of a pickle of dicts, lists, strings and numbers; runs nothing in it."""
        path = self.path / name
        try:
            with path.open("rb") as file:
                return path, _PlainUnpickler(file, encoding="utf-8").load()
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        except Exception as error:  # a damaged pickle fails in any way
            raise InputError(f"{path}: not a whole pickle ({type(error).__name__})") from None


class _PlainUnpickler(pickle.Unpickler):
    """Refuses every pickle that names a class or function, so that there is nothing to call."""

    def find_class(self, module, name):
        raise InputError(f"asks for {module}.{name}: only plain data is read from it")

    def persistent_load(self, _):
        raise InputError("asks for an object outside it: only plain data is read")


def parse_json(text, where):
    """What a JSON text holds; an object with the same key twice is an error, not a loss."""
    try:
        return json.loads(text, object_pairs_hook=functools.partial(_unique, where))
    except json.JSONDecodeError as error:
        raise InputError(f"{where}, line {error.lineno}: not valid JSON: {error.msg}") from None
    except RecursionError:
        raise InputError(f"{where}: nested too deeply") from None
    except InputError:
        raise
    except ValueError as error:  # a number of thousands of digits
        raise InputError(f"{where}: not valid JSON: {error}") from None


def _unique(where, pairs):
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"{where}: {twice!r} is there twice in one object")
    return found


def checked(value, kind, where):
    """`value` if it is of type `kind`, else an InputError: a file of something else."""
    if not isinstance(value, kind) or isinstance(value, bool):
        wanted = getattr(kind, "__name__", str(kind))
        raise InputError(f"{where}: must be {wanted}, is {type(value).__name__}: another file?")
    return value


def fields(item, where, **kinds):
    """The values of a dict's fields, each of the type asked for."""
    checked(item, dict, where)
    for name, kind in kinds.items():
        if name not in item:
            raise InputError(f"{where}: has no {name!r}: another file?")
        checked(item[name], kind, f"{where}, {name!r}")
    return [item[name] for name in kinds]


def is_segment(times, last):
    """Whether `times` is [start, end], in order, from 0 to `last`."""
    numbers = isinstance(times, list) and len(times) == 2
    numbers = numbers and all(isinstance(t, int | float) for t in times)
    return numbers and 0 <= times[0] <= times[1] <= last


def _text(path):
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text") from None
