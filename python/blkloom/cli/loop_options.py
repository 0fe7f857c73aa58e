"""Command-line parser of `blkloom loop`, compatible with the getopt_long of losetup. Touches no device.

Options may be anywhere. A long option may be shortened if the short form is unique; short forms of losetup's options
stay valid even if we add options. Some options take a value only after `=`. Raises LoopFailed with the messages of
losetup. Source: losetup(8), sys-utils/losetup.c.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Final, TypeVar

from blkloom.dm.failing import VerbFailed
from blkloom.units import DEVICE_LIMIT, parse_size

_T = TypeVar("_T")


class LoopFailed(VerbFailed):
    """A losetup error message, with our name in front. what: a line that blkloom adds, or ""."""

    last = ""

    def __init__(self, line: str, *, what: str = "", hint: bool = False) -> None:
        super().__init__(
            f"blkloom: {line}", *(["Try 'blkloom loop --help' for more information."] if hint else []), what=what
        )


class Value(Enum):
    """Whether an option takes a value."""

    NONE = 0
    REQUIRED = 1
    OPTIONAL = 2


LOSETUPS: Final[Mapping[str, Value]] = {
    "all": Value.NONE,
    "set-capacity": Value.NONE,
    "detach": Value.NONE,
    "detach-all": Value.NONE,
    "find": Value.NONE,
    "nooverlap": Value.NONE,
    "help": Value.NONE,
    "associated": Value.REQUIRED,
    "json": Value.NONE,
    "list": Value.NONE,
    "sector-size": Value.REQUIRED,
    "noheadings": Value.NONE,
    "offset": Value.REQUIRED,
    "output": Value.REQUIRED,
    "output-all": Value.NONE,
    "sizelimit": Value.REQUIRED,
    "partscan": Value.NONE,
    "read-only": Value.NONE,
    "direct-io": Value.OPTIONAL,
    "raw": Value.NONE,
    "show": Value.NONE,
    "verbose": Value.NONE,
    "version": Value.NONE,
}
OURS: Final[Mapping[str, Value]] = {
    "name": Value.REQUIRED,
    "block-map": Value.OPTIONAL,
    "change": Value.REQUIRED,
    "autoclear": Value.NONE,
    "no-attach": Value.NONE,
    "no-scan": Value.NONE,
    "shared": Value.NONE,
}
LETTERS: Final = {
    "a": "all",
    "b": "sector-size",
    "c": "set-capacity",
    "d": "detach",
    "D": "detach-all",
    "f": "find",
    "h": "help",
    "j": "associated",
    "J": "json",
    "l": "list",
    "L": "nooverlap",
    "n": "noheadings",
    "o": "offset",
    "O": "output",
    "P": "partscan",
    "r": "read-only",
    "v": "verbose",
    "V": "version",
}
_EXCLUSIVE: Final = (
    ("detach-all", "all", "set-capacity", "detach", "find", "associated", "change"),
    ("detach-all", "set-capacity", "detach", "find", "list", "change"),
    ("detach-all", "output", "set-capacity", "detach", "find", "change"),
    ("json", "raw"),
    ("partscan", "no-scan"),
)


@dataclass
class LoopOptions:
    """A parsed command line. given: each option by its long name, with its last value ("" for none). operands: the
    other arguments.

    The other fields are parsed values. None: not given.
    """

    given: dict[str, str] = field(default_factory=dict)
    operands: list[str] = field(default_factory=list)
    offset: int | None = None
    sizelimit: int | None = None
    block_size: int | None = None
    direct_io: bool | None = None
    block_map: str | None = None
    """The option for the table."""
    attach: bool = True
    """Attach the device, where root sets it up. Not in `given`: it means nothing elsewhere."""

    def __contains__(self, option: str) -> bool:
        """Whether an option was given."""
        return option in self.given


def read_options(arguments: Sequence[str]) -> LoopOptions:
    """Parses the command line. Raises LoopFailed."""
    found = LoopOptions()
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if word == "--":
            found.operands += rest
            break
        if word.startswith("--"):
            _long(word, rest, found)
        elif word.startswith("-") and word != "-":
            _short(word, rest, found)
        else:
            found.operands.append(word)
    found.attach = found.given.pop("no-attach", None) is None
    if "offset" in found:
        found.offset = _size(found.given["offset"], "offset")
    if "sizelimit" in found:
        found.sizelimit = _size(found.given["sizelimit"], "size")
    if "sector-size" in found:
        found.block_size = _size(found.given["sector-size"], "logical block size")
    if "direct-io" in found:
        found.direct_io = _one_of(found.given["direct-io"], {"": True, "on": True, "off": False})
    if "block-map" in found:
        found.block_map = _one_of(found.given["block-map"], {"": "block_map", "try": "block_map=try"})
        if found.direct_io:
            raise LoopFailed("mutually exclusive arguments: --direct-io --block-map")
    return found


def _long(word: str, rest: list[str], found: LoopOptions) -> None:
    name, equals, value = word[2:].partition("=")
    known = {**LOSETUPS, **OURS}
    matches = [name] if name in known else [one for one in known if one.startswith(name)]
    if len(losetups := [one for one in matches if one in LOSETUPS]) == 1:
        matches = losetups
    if not matches:
        raise LoopFailed(f"unrecognized option '--{name}'", hint=True)
    if len(matches) > 1:
        possible = " ".join(f"'--{one}'" for one in matches)
        raise LoopFailed(f"option '--{name}' is ambiguous; possibilities: {possible}", hint=True)
    (name,) = matches
    if equals and known[name] is Value.NONE:
        raise LoopFailed(f"option '--{name}' doesn't allow an argument", hint=True)
    if not equals and known[name] is Value.REQUIRED:
        if not rest:
            raise LoopFailed(f"option '--{name}' requires an argument", hint=True)
        value = rest.pop(0)
    _give(found, name, value)


def _short(word: str, rest: list[str], found: LoopOptions) -> None:
    letters = word[1:]
    while letters:
        letter, letters = letters[0], letters[1:]
        if letter not in LETTERS:
            raise LoopFailed(f"invalid option -- '{letter}'", hint=True)
        name = LETTERS[letter]
        if LOSETUPS[name] is Value.NONE:
            _give(found, name, "")
            continue
        if not letters and not rest:
            raise LoopFailed(f"option requires an argument -- '{letter}'", hint=True)
        _give(found, name, letters or rest.pop(0))
        break


def _give(found: LoopOptions, name: str, value: str) -> None:
    found.given[name] = value
    for group in _EXCLUSIVE:
        if name in group and sum(one in found for one in group) > 1:
            raise LoopFailed(f"mutually exclusive arguments: {' '.join(f'--{one}' for one in group)}")


def _size(text: str, what: str) -> int:
    """Parses a number of bytes, also 0x200, with a suffix. Raises LoopFailed."""
    try:
        number = int(text, 16) if text[:2].lower() == "0x" else None
        return parse_size(text if number is None else str(min(number, DEVICE_LIMIT)))
    except ValueError as error:
        why = f"failed to parse {what}: '{text}': {os.strerror(errno.EINVAL)}"
        raise LoopFailed(why, what=str(error)) from error


def _one_of(text: str, meanings: Mapping[str, _T]) -> _T:
    if text not in meanings:
        raise LoopFailed(f"argument error: '{text}'", what=f"one of: {', '.join(filter(None, meanings))}")
    return meanings[text]
