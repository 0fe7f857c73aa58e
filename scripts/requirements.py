"""Prints the requirements of groups in pyproject.toml, one on each line, for pip's -r.

`requirements.py GROUP...`; the pseudo-group `build` has the requirements of the build back end.
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"


def requirements(groups: Iterable[str]) -> list[str]:
    """The requirements of the groups. Raises KeyError for an unknown group."""
    project = tomllib.loads(PYPROJECT.read_text())
    known: dict[str, list[str]] = {
        "build": project["build-system"]["requires"],
        **project["project"]["optional-dependencies"],
    }
    return [requirement for group in groups for requirement in known[group]]


if __name__ == "__main__":
    print(*requirements(sys.argv[1:]), sep="\n")
