"""Tests of the rules of code_rules.py, all of which the package follows."""

import code_rules
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from xclip_jax.inference import slice_rows
from xclip_jax.loss import contrastive_loss

SIX_PARAMETERS = ", ".join(f"x{i}: int" for i in range(6))
PACKAGE_FILES = code_rules.list_files([code_rules.ROOT / code_rules.PACKAGE])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def f(x, y: int) -> None: ...", "f: not annotated: x"),
        ("def f(x: int): ...", "f: not annotated: return"),
        ("def f(*args, **kwargs) -> None: ...", "f: not annotated: args, kwargs"),
        ("def f(*, key) -> None: ...", "f: not annotated: key"),
        ("class C:\n    def f(self, x) -> None: ...", "f: not annotated: x"),
        ("def f() -> None:\n    def inner(x) -> None: ...", "inner: not annotated: x"),
        ("async def f(x) -> None: ...", "f: not annotated: x"),
        (f"def f({SIX_PARAMETERS}) -> None: ...", "f: 6 positional parameters, at most 5"),
        ("def f() -> None:\n" + "    x = 1\n" * 60, "f: 61 lines, at most 60"),
        ("x = 1\n" * 401, "401 lines, at most 400"),
        ('"""What a run writes."""', "module: docstring starts with 'What'"),
        ('class C:\n    """Whether it is open."""', "C: docstring starts with 'Whether'"),
        ('def f() -> None:\n    """How many."""', "f: docstring starts with 'How'"),
        ('def f() -> None:\n    """Of one video."""', "f: docstring starts with 'Of'"),
        ('def f() -> None:\n    """Likewise."""', "f: docstring starts with 'Likewise.'"),
        (
            'def f() -> None:\n    """Returns x; raises if it is 0."""',
            "f: semicolon in the first line of the docstring",
        ),
        ("import jax._src.core", "private '_src' imported"),
        ("from jax._src import core", "private '_src' imported"),
        ("from pickle import _Unpickler", "private '_Unpickler' imported"),
        ("import jax\nx = jax.core._trace", "private attribute jax.core._trace"),
        ("import jax.numpy as jnp\nx = jnp._f(1)", "private attribute jnp._f"),
        ("from jax import core\nx = core._trace.y", "private attribute core._trace"),
    ],
)
def test_rule_reports_a_violation(source, message):
    assert [text for _, text in code_rules.check_source(source)] == [message]


@pytest.mark.parametrize(
    "source",
    [
        '"""Returns nothing.\n\nWhat follows; may be any text.\n"""',
        "class C:\n    def f(self, a: int, b: int, c: int, d: int, e: int) -> None: ...",
        "def f(a: int, b: int, *, c: int, d: int, e: int, g: int) -> None: ...",
        "def f() -> None:\n" + "    x = 1\n" * 59,
        "from xclip_jax.search import _private",
        "from . import _private",
        "import os\nos._exit(1)",
        "import jax\nversion = jax.__version__",
        "class C:\n    def f(self) -> int:\n        return self._x",
    ],
)
def test_rules_accept_allowed_code(source):
    assert code_rules.check_source(source) == []


def test_violation_is_located(tmp_path):
    path = tmp_path / "module.py"
    path.write_text("\ndef f(x) -> None: ...\n")
    assert code_rules.find_violations(path) == [f"{path}:2: f: not annotated: x"]


def test_package_follows_the_rules():
    assert not [v for file in PACKAGE_FILES for v in code_rules.find_violations(file)]


def test_package_does_not_outgrow_its_limit():
    assert code_rules.count_lines(PACKAGE_FILES) <= code_rules.MAX_PACKAGE_LINES


def test_calls_check_array_shapes_and_types_during_tests():
    with pytest.raises(TypeCheckError, match="sim_TxV"):
        contrastive_loss(np.zeros((2, 3), np.float32))
    with pytest.raises(TypeCheckError, match="count"):
        slice_rows({}, 0, "1")
