"""The error for a file whose blocks cannot be mapped."""

from __future__ import annotations


class NotMappable(Exception):
    """The blocks of a file cannot be mapped. reason: text to follow the name of the file. cure: what to do, or ""."""

    def __init__(self, reason: str, cure: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.cure = cure
