"""Parser for dmsetup's options, compatible with its getopt_long.

Options may be anywhere, also before the verb. A long option may be shortened if the short form is unique.
Pure; raises NotACommandLine with the messages of getopt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from blkloom.dm.failing import NotACommandLine

FLAGS: Final = (
    "addnodeoncreate",
    "addnodeonresume",
    "checks",
    "columns",
    "concise",
    "deferred",
    "force",
    "help",
    "inactive",
    "nameprefixes",
    "noflush",
    "noheadings",
    "nolockfs",
    "noopencount",
    "notable",
    "noudevrules",
    "noudevsync",
    "readonly",
    "retry",
    "rows",
    "setuuid",
    "showkeys",
    "tree",
    "unbuffered",
    "unquoted",
    "verbose",
    "verifyudev",
    "yes",
)
"""Options without a value."""

VALUES: Final = (
    "exec",
    "gid",
    "headings",
    "major",
    "manglename",
    "minor",
    "mode",
    "options",
    "readahead",
    "select",
    "separator",
    "sort",
    "table",
    "target",
    "udevcookie",
    "uid",
    "units",
    "uuid",
)
"""Options with a value."""

LETTERS: Final = {
    "c": "columns",
    "C": "columns",
    "f": "force",
    "G": "gid",
    "h": "help",
    "j": "major",
    "m": "minor",
    "M": "mode",
    "n": "notable",
    "o": "options",
    "O": "sort",
    "r": "readonly",
    "S": "select",
    "u": "uuid",
    "U": "uid",
    "v": "verbose",
    "y": "yes",
}

LONG: Final[dict[str, bool]] = {**dict.fromkeys(FLAGS, False), **dict.fromkeys(VALUES, True)}
"""Every long option, and whether it takes a value."""


IGNORED: Final = frozenset(
    {
        "addnodeoncreate",
        "addnodeonresume",
        "checks",
        "gid",
        "mode",
        "nolockfs",
        "noopencount",
        "noudevrules",
        "noudevsync",
        "readahead",
        "udevcookie",
        "uid",
        "verifyudev",
        "yes",
    }
)
"""Options that every verb accepts and ignores, unless it has them itself: they concern nodes, udev and other things
that the verb does not touch.
"""


class Words(NamedTuple):
    """A parsed command line: options as `--long` or `--long=value`, and operands, in their order."""

    options: list[str]
    operands: list[str]


def read_words(
    arguments: Sequence[str],
    own: Mapping[str, bool] | None = None,
    own_letters: Mapping[str, str] | None = None,
    *,
    one_operand: bool = False,
) -> Words:
    """Separates options from operands.

    own: additional long options, and whether they take a value; they take precedence over dmsetup's. own_letters: the
    long option for each additional letter. one_operand: stop after the first operand; `operands` then has all the
    following words unchanged.
    """
    letters = {**LETTERS, **(own_letters or {})}
    long = {**LONG, **(own or {})}
    options: list[str] = []
    operands: list[str] = []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if word == "--":
            operands += rest
            break
        if word.startswith("--"):
            options.append(_long(word, rest, long))
        elif word.startswith("-") and word != "-":
            options += _short(word, rest, long, letters)
        else:
            operands.append(word)
            if one_operand:
                operands += rest
                break
    return Words(options, operands)


def _long(word: str, rest: list[str], known: Mapping[str, bool]) -> str:
    given, equals, value = word[2:].partition("=")
    matches = [given] if given in known else [name for name in known if name.startswith(given)]
    if len(dmsetups := [name for name in matches if name in LONG]) == 1:
        matches = dmsetups  # A short form of a dmsetup option stays valid, even if we add options.
    if not matches:
        raise NotACommandLine(f"blkloom: unrecognized option '--{given}'")
    if len(matches) > 1:
        possible = " ".join(f"'--{name}'" for name in matches)
        raise NotACommandLine(f"blkloom: option '--{given}' is ambiguous; possibilities: {possible}")
    (name,) = matches
    if not known[name]:
        if equals:
            raise NotACommandLine(f"blkloom: option '--{name}' doesn't allow an argument")
        return f"--{name}"
    if not equals:
        if not rest:
            raise NotACommandLine(f"blkloom: option '--{name}' requires an argument")
        value = rest.pop(0)
    return f"--{name}={value}"


def _short(word: str, rest: list[str], known: Mapping[str, bool], named: Mapping[str, str]) -> list[str]:
    found = []
    letters = word[1:]
    while letters:
        letter, letters = letters[0], letters[1:]
        if letter not in named:
            raise NotACommandLine(f"blkloom: invalid option -- '{letter}'")
        name = named[letter]
        if not known[name]:
            found.append(f"--{name}")
            continue
        if not letters and not rest:
            raise NotACommandLine(f"blkloom: option requires an argument -- '{letter}'")
        found.append(f"--{name}={letters or rest.pop(0)}")
        break
    return found
