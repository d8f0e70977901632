"""Checks the package's source against the rules of CONTRIBUTING.md that no linter covers.

    python tests/code_rules.py [PATH ...]

Prints one line for each violation, then counts. `code_rules_test.py` runs it on the package.
"""

import ast
import re
import sys
from pathlib import Path

MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_PACKAGE_LINES = 400, 60, 10_000
MAX_POSITIONAL = 5
ODD_FIRST_WORDS = re.compile(r"(What|Whether|Of|How|Likewise|Where|Who|Which|Why|When)\b")
PACKAGE = "xclip_jax"
ROOT = Path(__file__).parents[1]


def violations_of_file(path: Path) -> list[str]:
    """Returns "file:line: message" for every rule that a source file breaks."""
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source)
    found = []
    if source.count("\n") > MAX_FILE_LINES:
        found.append(f"{path}:1: {source.count(chr(10))} lines, at most {MAX_FILE_LINES}")
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found += [f"{path}:{node.lineno}: {node.name}: {m}" for m in _function(node)]
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module):
            name = getattr(node, "name", "module")
            line = getattr(node, "lineno", 1)
            found += [f"{path}:{line}: {name}: {m}" for m in _docstring(node)]
    found += [f"{path}:{line}: {message}" for line, message in _foreign_private(tree)]
    return found


def _function(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """Returns messages on the length, the annotations and the parameters of a function."""
    positional = [a for a in node.args.posonlyargs + node.args.args if a.arg not in ("self", "cls")]
    every = [*positional, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
    bare = [a.arg for a in every if a is not None and a.annotation is None]
    length = node.end_lineno - node.lineno + 1
    messages = []
    if bare or node.returns is None:
        messages.append(f"not annotated: {', '.join([*bare, *['return'] * (not node.returns)])}")
    if len(positional) > MAX_POSITIONAL:
        messages.append(f"{len(positional)} positional parameters, at most {MAX_POSITIONAL}")
    if length > MAX_FUNCTION_LINES:
        messages.append(f"{length} lines, at most {MAX_FUNCTION_LINES}")
    return messages


def _docstring(node: ast.AST) -> list[str]:
    """Returns messages on the first line of a docstring, and on a missing one."""
    docstring = ast.get_docstring(node)
    name = getattr(node, "name", "")
    if docstring is None:
        public = isinstance(node, ast.ClassDef) and not name.startswith("_")
        return ["no docstring"] if public else []
    first = docstring.splitlines()[0]
    messages = []
    if ODD_FIRST_WORDS.match(first):
        messages.append(f"docstring starts with {first.split()[0]!r}")
    if ";" in first:
        messages.append("semicolon in the docstring's first line")
    return messages


def _foreign_private(tree: ast.Module) -> list[tuple[int, str]]:
    """Returns (line, message) for private names imported or read from another package."""
    foreign, found = set(), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if not alias.name.startswith(PACKAGE):
                    foreign.add((alias.asname or alias.name).split(".")[0])
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith(PACKAGE):
            foreign |= {alias.asname or alias.name for alias in node.names}
            parts = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            found += [(node.lineno, f"private {p!r} imported") for p in parts if _is_private(p)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _is_private(node.attr):
            base = node.value
            while isinstance(base, ast.Attribute):
                base = base.value
            documented = ast.unparse(node) == "os._exit"  # public in spite of its name
            if isinstance(base, ast.Name) and base.id in foreign and not documented:
                found.append((node.lineno, f"private attribute {ast.unparse(node)}"))
    return found


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def files_of(paths: list[Path]) -> list[Path]:
    """Returns the Python files at and below `paths`, sorted."""
    return sorted({f for path in paths for f in ([path] if path.is_file() else path.rglob("*.py"))})


def main() -> int:
    """Prints the violations below the paths of the command line, default the package."""
    paths = [Path(argument) for argument in sys.argv[1:]] or [ROOT / PACKAGE]
    files = files_of(paths)
    found = [violation for file in files for violation in violations_of_file(file)]
    print(*found, sep="\n")
    lines = sum(file.read_text(encoding="utf-8").count("\n") for file in files)
    print(f"{len(found)} violations, {len(files)} files, {lines} lines")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
