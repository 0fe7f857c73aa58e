"""Targets of a test as an installed package provides them, for other processes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest


def install_targets(
    folder: Path, monkeypatch: pytest.MonkeyPatch, module: str, source: str, targets: Mapping[str, str]
) -> None:
    """Processes that are started from now on find `module` in `folder`, and its targets: classes by name."""
    package = folder / "site"
    about = package / f"{module}-1.dist-info"
    about.mkdir(parents=True)
    (package / f"{module}.py").write_text(source)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1\n")
    lines = (f"{name} = {module}:{target}\n" for name, target in targets.items())
    (about / "entry_points.txt").write_text("[blkloom.targets]\n" + "".join(lines))
    monkeypatch.setenv("PYTHONPATH", str(package))
