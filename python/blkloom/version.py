"""The version of blkloom, as it is in pyproject.toml; `importlib.metadata` takes 18 ms to say it."""

from __future__ import annotations

from typing import Final

VERSION: Final = "0.1.0"
