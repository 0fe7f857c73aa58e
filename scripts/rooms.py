"""Checks the table of packages in ARCHITECTURE.md, for `make lint`.

The last column of a Python package's row names, in backticks, the packages that its modules import at run time. Modules
directly under `blkloom/` may be imported by all packages and are not listed. The names and the imports must be the
same. Prints the differences; exit code 1 if there are any.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import grimp

ROOT = Path(__file__).parent.parent
PACKAGE = "blkloom"
_ROW = re.compile(r"\| (?P<rooms>[^|]*`blkloom/[^|]*) \| [^|]* \| (?P<known>[^|]*) \|")
_NAME = re.compile(r"`([^`]+)`")


def described() -> dict[str, set[str]]:
    """The packages that each package may import according to the document, by their dotted names."""
    rows: dict[str, set[str]] = {}
    for row in _ROW.finditer((ROOT / "ARCHITECTURE.md").read_text()):
        rooms = [name for name in _NAME.findall(row["rooms"]) if not name.endswith(".py")]
        known = {f"{PACKAGE}.{name.replace('/', '.')}" for name in _NAME.findall(row["known"])}
        rows |= {room.replace("/", "."): known for room in rooms}
    return rows


def imported(packages: set[str]) -> dict[str, set[str]]:
    """The packages that each package imports, by their dotted names."""
    graph = grimp.build_graph(PACKAGE, exclude_type_checking_imports=True)
    found: dict[str, set[str]] = {package: set() for package in packages}
    for module in graph.modules:
        importer = _package_of(module, packages)
        others = {_package_of(other, packages) for other in graph.find_modules_directly_imported_by(module)}
        if importer:
            found[importer] |= {other for other in others if other and other != importer}
    return found


def _package_of(module: str, packages: set[str]) -> str:
    """The innermost of the packages that contains a module; "" if none does."""
    return max((name for name in packages if f"{module}.".startswith(f"{name}.")), key=len, default="")


def complaints() -> list[str]:
    """The differences, one per line."""
    said = described()
    folders = {path.parent.relative_to(ROOT / "python") for path in (ROOT / "python" / PACKAGE).glob("*/__init__.py")}
    missing = sorted({".".join(folder.parts) for folder in folders} - said.keys())
    found = [f"ARCHITECTURE.md: no row of its table is about {name.replace('.', '/')}" for name in missing]
    for name, real in sorted(imported(set(said)).items()):
        for other in sorted(real - said[name]):
            found.append(f"ARCHITECTURE.md: {name} imports {other}, and its row does not say so")
        for other in sorted(said[name] - real):
            found.append(f"ARCHITECTURE.md: {name} does not import {other}, and its row says so")
    return found


if __name__ == "__main__":
    wrong = complaints()
    print(*wrong, sep="\n", end="\n" if wrong else "")
    sys.exit(bool(wrong))
