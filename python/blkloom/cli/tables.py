"""Where a verb's table comes from: an option, a file, or standard input."""

from __future__ import annotations

import errno
import os
import re
import shlex
import sys
from collections.abc import Sequence
from typing import Final

import click
import msgspec

from blkloom.dm.failing import VerbFailed
from blkloom.errors import BackingError, Place
from blkloom.qcow2.probing import begins_like_image, is_image_name
from blkloom.units import SECTOR

_LONGEST: Final = 64 << 20
"""Bytes of a table file at most."""
_SHOWN: Final = 100
_LINE: Final = re.compile(r"\s*(?:#.*)?$|\s*\d+\s+\d+\s*\S")

allow_backing_option: Final = click.option(
    "--allow-backing",
    multiple=True,
    type=click.Path(readable=False),
    metavar="DIR",
    help="Where names in an image may lead, besides its own directory.",
)


class TableText(msgspec.Struct, frozen=True):
    """A table as it was given. source: what errors call it."""

    text: str
    source: str

    @property
    def empty(self) -> bool:
        """Whether it has no line but comments."""
        return all(not line.strip() or line.strip().startswith("#") for line in self.text.split("\n"))


def read_table(option: str | None, file: str | None, *, allow_backing: Sequence[str] = ()) -> TableText:
    """--table, else the file, else standard input; a file named like a QCOW2 image is the image's disk, and names in
    it may lead to allow_backing. Raises VerbFailed for a file that cannot be read and, with dmsetup's words, for a
    line that is none.
    """
    if option is None and file is not None and is_image_name(file):
        return _image(file, allow_backing)
    if allow_backing:
        raise VerbFailed(
            "--allow-backing is for an image given by its path.", what="in a table, say allow_backing=<dir> itself"
        )
    if option is not None:
        table, called = TableText(option, "--table"), ""
    elif file is not None:
        table, called = TableText(_read(file), file), file
    else:
        table, called = TableText(os.fsdecode(sys.stdin.buffer.read()), "standard input"), "on stdin"
    for number, line in enumerate(table.text.split("\n"), 1):
        if not _LINE.match(line):
            raise VerbFailed(
                f"Invalid format on line {number} of table {called}.",
                what=f"{table.source}:{number}: {_shown(line)!r}: write: <start> <length> <target> <arguments>",
            )
    return table


def _shown(line: str) -> str:
    """As much of it as a person reads."""
    line = line.strip()
    return line if len(line) <= _SHOWN else f"{line[:_SHOWN]}..."


def _image(path: str, allow_backing: Sequence[str]) -> TableText:
    from blkloom.device.open_device import whole_file
    from blkloom.table import format_table

    table = whole_file(os.path.abspath(path), allow_backing=allow_backing)
    if not table.segments:
        raise BackingError(
            "the image is empty, and a table has no segment of no length",
            path=path,
            errno=errno.EINVAL,
            cure=f"give it a size first: qemu-img resize {os.path.basename(path)} 1G",
        )
    return TableText(format_table(table), path)


def _read(path: str) -> str:
    try:
        with open(path, "rb") as file:
            text = file.read(_LONGEST + 1)
    except OSError as error:
        raise VerbFailed(f"Couldn't open '{path}' for reading.", what=f"{path}: {error.strerror}") from error
    if begins_like_image(text):
        raise VerbFailed(
            f"{path} is no table.",
            what=f"{path}: it looks like a QCOW2 image; if it is to be one, give it a name that ends in .qcow2 (a link "
            "will do), or say so in a table",
        )
    if b"\0" in text:
        from blkloom.table.words import join_words

        words = ("loop", os.path.abspath(path), "0", "1", "round_up")
        table = f"0 {-(-os.path.getsize(path) // SECTOR)} {join_words(words, Place(path))}"
        raise VerbFailed(
            f"{path} is no table.",
            what=f"{path}: no text has such bytes; if what is in it is to be a device, use blkloom loop -f --show "
            f"{shlex.quote(path)}, or --table {shlex.quote(table)}",
        )
    if len(text) > _LONGEST:
        raise VerbFailed(f"{path} is no table.", what=f"{path}: it has more than {_LONGEST} bytes")
    return os.fsdecode(text)
