"""Checker of source files for the rules of CONTRIBUTING.md that ruff does not cover.

    python tests/code_rules.py [PATH ...]

Prints one line per violation, then totals. `code_rules_test.py` runs the checks on the package.
"""

import ast
import re
import sys
from pathlib import Path

MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 60
MAX_PACKAGE_LINES = 25_500
MAX_POSITIONAL = 5
FORBIDDEN_FIRST_WORD = re.compile(
    r"(What|Whether|Of|How|Likewise|Where|Who|Which|Why|When|If|For|With|In|As|To)\b"
)
PACKAGE = "xclip_jax"
ROOT = Path(__file__).parents[1]
Function = ast.FunctionDef | ast.AsyncFunctionDef


def find_violations(path: Path) -> list[str]:
    """Returns "file:line: message" for each violation in a source file."""
    return [f"{path}:{line}: {text}" for line, text in check_source(path.read_text("utf-8"))]


def check_source(source: str) -> list[tuple[int, str]]:
    """Returns (line, message) for each violation in a module's source."""
    tree = ast.parse(source)
    violations = []
    lines = len(source.splitlines())
    if lines > MAX_FILE_LINES:
        violations.append((1, f"{lines} lines, at most {MAX_FILE_LINES}"))
    for node in ast.walk(tree):
        messages = _check_function(node) if isinstance(node, Function) else []
        if isinstance(node, Function | ast.ClassDef | ast.Module):
            messages += _check_docstring(node)
        name, line = getattr(node, "name", "module"), getattr(node, "lineno", 1)
        violations += [(line, f"{name}: {message}") for message in messages]
    return sorted(violations + _check_private_names(tree))


def _check_function(node: Function) -> list[str]:
    """Returns messages about annotations, positional parameters and length."""
    arguments = node.args
    positional = [a for a in arguments.posonlyargs + arguments.args if a.arg not in ("self", "cls")]
    parameters = [*positional, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    missing = [a.arg for a in parameters if a is not None and a.annotation is None]
    missing += ["return"] if node.returns is None else []
    length = node.end_lineno - node.lineno + 1
    messages = []
    if missing:
        messages.append(f"not annotated: {', '.join(missing)}")
    if len(positional) > MAX_POSITIONAL:
        messages.append(f"{len(positional)} positional parameters, at most {MAX_POSITIONAL}")
    if length > MAX_FUNCTION_LINES:
        messages.append(f"{length} lines, at most {MAX_FUNCTION_LINES}")
    return messages


def _check_docstring(node: Function | ast.ClassDef | ast.Module) -> list[str]:
    """Returns messages about a docstring's first line."""
    first = (ast.get_docstring(node) or "").partition("\n")[0]
    messages = []
    if FORBIDDEN_FIRST_WORD.match(first):
        messages.append(f"docstring starts with {first.split()[0]!r}")
    if ";" in first:
        messages.append("semicolon in the first line of the docstring")
    return messages


def _check_private_names(tree: ast.Module) -> list[tuple[int, str]]:
    """Returns (line, message) for private names imported or read from another package."""
    foreign, violations = set(), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [a for a in node.names if a.name.split(".")[0] != PACKAGE]
            foreign |= {(a.asname or a.name).split(".")[0] for a in modules}
            parts = [part for a in modules for part in a.name.split(".")]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            module = (node.module or "").split(".")
            if module[0] == PACKAGE:
                continue
            foreign |= {a.asname or a.name for a in node.names}
            parts = [*module, *(a.name for a in node.names)]
        else:
            continue
        violations += [(node.lineno, f"private {p!r} imported") for p in parts if _is_private(p)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _is_private(node.attr):
            name = ast.unparse(node)
            # os._exit is documented and public in spite of its name.
            if name.partition(".")[0] in foreign and name != "os._exit":
                violations.append((node.lineno, f"private attribute {name}"))
    return violations


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def list_files(paths: list[Path]) -> list[Path]:
    """Returns the Python files at and below `paths`, sorted."""
    return sorted({f for path in paths for f in ([path] if path.is_file() else path.rglob("*.py"))})


def count_lines(files: list[Path]) -> int:
    """Returns the total number of lines in `files`."""
    return sum(len(file.read_text("utf-8").splitlines()) for file in files)


def main() -> int:
    """Prints the violations in the given paths or in the package, returns the exit status."""
    files = list_files([Path(argument) for argument in sys.argv[1:]] or [ROOT / PACKAGE])
    violations = [violation for file in files for violation in find_violations(file)]
    print(*violations, sep="\n")
    print(f"{len(violations)} violations, {len(files)} files, {count_lines(files)} lines")
    return bool(violations)


if __name__ == "__main__":
    sys.exit(main())
