"""The package follows the rules of code_rules.py."""

import code_rules


def test_package_follows_the_rules():
    files = code_rules.files_of([code_rules.ROOT / code_rules.PACKAGE])
    assert not [v for file in files for v in code_rules.violations_of_file(file)]


def test_package_stays_within_its_size():
    files = code_rules.files_of([code_rules.ROOT / code_rules.PACKAGE])
    lines = sum(file.read_text(encoding="utf-8").count("\n") for file in files)
    assert lines <= code_rules.MAX_PACKAGE_LINES
