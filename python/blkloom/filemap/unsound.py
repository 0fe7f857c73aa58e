"""Why a file cannot be mapped."""

from __future__ import annotations


class Unsound(Exception):
    """A file that cannot be mapped. reason: after the file's name; cure: what to do, or ""."""

    def __init__(self, reason: str, cure: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.cure = cure
