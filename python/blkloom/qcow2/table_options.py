"""The options of a table line for an image: their words, and what may stand behind the =. Pure; any thread. May fail:
TableError, with the word and what it may be.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Final

from blkloom.units import Bytes, parse_size

if TYPE_CHECKING:
    from collections.abc import Callable

    from blkloom.table.arguments import Arguments

_LARGEST: Final = Bytes(1 << 40)


def read_options(arguments: Arguments) -> dict[str, Any]:
    """What remains of the line, as arguments of the target. Raises TableError."""
    found: dict[str, Any] = {}
    for option in arguments.options():
        word, _, value = option.partition("=")
        reading = _OPTIONS.get(word)
        if reading is None or (reading is not _flag) != ("=" in option):
            known = ", ".join(word if reading is _flag else f"{word}=" for word, reading in _OPTIONS.items())
            raise arguments.error("unknown option", value=option, cure=f"options are: {known}")
        field = _FIELDS.get(word, word)
        if field in found and word != "allow_backing":
            raise arguments.error("option given twice", value=option, cure="give it once")
        try:
            read = reading(value)
        except ValueError as error:
            raise arguments.error(f"Invalid {word}: {error}", value=option) from error
        found[field] = (*found.get(field, ()), read) if word == "allow_backing" else read
    return found


def _flag(_value: str) -> bool:
    return True


def _word(value: str) -> str:
    if not value:
        raise ValueError("nothing behind the =")
    return value


def _folder(value: str) -> str:
    if not os.path.isabs(value):
        raise ValueError("the path must begin with /")
    return value


def _off(value: str) -> bool:
    return {"on": True, "off": False}[_one_of("on", "off")(value)]


def _one_of(*values: str) -> Callable[[str], str]:
    def reading(value: str) -> str:
        if value not in values:
            raise ValueError(f"must be {' or '.join(values)}")
        return value

    return reading


def _size(value: str) -> Bytes:
    size = parse_size(value)
    if size > _LARGEST:
        raise ValueError("more than any machine has")
    return size


_OPTIONS: Final[dict[str, Callable[[str], object]]] = {
    "read_only": _flag,
    "direct_io": _flag,
    "snapshot": _word,
    "allow_backing": _folder,
    "lock": _off,
    "cache": _size,
    "discard": _one_of("unmap", "ignore"),
    "preallocate": _size,
    "compact_zeroes": _flag,
    "on_enospc": _one_of("fail", "park"),
    "fault_injection": _flag,
}
_FIELDS: Final = {"discard": "discard_as"}
