"""The version of blkloom; engine/python/build.rs writes this file."""

from __future__ import annotations

from typing import Final

VERSION: Final = "0.1.0"
