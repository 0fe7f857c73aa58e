"""Names of test files: pytest imports them as top-level modules, so no two outside of packages may have one name."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

TESTS = Path(__file__).parent.parent


def test_no_two_test_files_outside_of_packages_have_one_name() -> None:
    names = Counter(path.name for path in TESTS.rglob("test_*.py") if not (path.parent / "__init__.py").exists())
    assert not [name for name, count in names.items() if count > 1]
