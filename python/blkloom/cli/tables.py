"""Reads the table of a verb from an option, a file or standard input."""

from __future__ import annotations

import errno
import os
import re
import shlex
import stat
import sys
from collections.abc import Sequence
from typing import Final

import click
import msgspec

from blkloom.dm.failing import VerbFailed
from blkloom.errors import BackingError
from blkloom.image.registry import FORMATS, bytes_look_like, format_of_name

_LONGEST: Final = 64 << 20
"""Largest size of a table file in bytes."""
_SHOWN: Final = 100
_LINE: Final = re.compile(r"\s*(?:#.*)?$|\s*\d+\s+\d+\s*\S")

format_option: Final = click.option(
    "--format",
    "image_format",
    type=click.Choice(list(FORMATS)),
    help="The file is no table but a disk: as it is, or the disk in a QCOW2 image whatever its name.",
)

allow_backing_option: Final = click.option(
    "--allow-backing",
    multiple=True,
    type=click.Path(readable=False),
    metavar="DIR",
    help="Also allow names in an image to refer to files below DIR.",
)


class TableText(msgspec.Struct, frozen=True):
    """The text of a table. source: its name in errors."""

    text: str
    source: str

    @property
    def empty(self) -> bool:
        """Whether it has only comments and empty lines."""
        return all(not line.strip() or line.strip().startswith("#") for line in self.text.split("\n"))


def read_table(
    option: str | None,
    file: str | None,
    *,
    image_format: str | None = None,
    allow_backing: Sequence[str] = (),
) -> TableText:
    """--table, else the file, else standard input; a file named like a QCOW2 image, or with an `image_format`, is a
    disk, and names in an image may lead to allow_backing. Raises VerbFailed for a file that cannot be read and,
    with dmsetup's words, for a line that is none.
    """
    if image_format is not None and (option is not None or file is None):
        raise VerbFailed(f"--format {image_format} is for a file given by its path.")
    if option is None and file is not None:
        form = image_format or format_of_name(file)
        if image_format or form != "raw":
            return _disk(file, form, allow_backing)
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
                what=f"{table.source}:{number}: '{_shown(line)}': write: <start> <length> <target> <arguments>",
            )
    return table


def _shown(line: str) -> str:
    """Shortens a line for an error message."""
    line = line.strip()
    return line if len(line) <= _SHOWN else f"{line[:_SHOWN]}..."


def _disk(path: str, image_format: str, allow_backing: Sequence[str]) -> TableText:
    from blkloom.device.open_device import whole_file
    from blkloom.table import format_table

    table = whole_file(os.path.abspath(path), format=image_format, allow_backing=allow_backing)
    if not table.segments:
        raise BackingError(
            "the disk is empty, and a table has no segment of no length",
            path=path,
            errno=errno.EINVAL,
            cure=f"give it a size first: qemu-img resize -f {image_format} {shlex.quote(path)} 1G",
        )
    return TableText(format_table(table), path)


def _read(path: str) -> str:
    try:
        # A pipe that no process writes to is empty, and not waited for.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            os.set_blocking(file.fileno(), True)
            text = file.read(_LONGEST + 1)
            empty_pipe = not text and stat.S_ISFIFO(os.fstat(file.fileno()).st_mode)
    except OSError as error:
        raise VerbFailed(f"Couldn't open '{path}' for reading.", what=f"{path}: {error.strerror}") from error
    if empty_pipe:
        raise VerbFailed(f"{path} is no table.", what=f"{path}: a pipe that no process has written to")
    if found := bytes_look_like(text):
        cure = "add --format qcow2" if found == "QCOW2" else "convert it first: qemu-img convert -O qcow2"
        raise VerbFailed(
            f"{path} is no table.",
            what=f"{path}: it looks like a {found} image; if its disk is to be the device, {cure}; if its bytes are, "
            "add --format raw",
        )
    if b"\0" in text:
        what = f"{path}: it has NUL bytes, as no text has; if it is a disk, add --format raw"
        raise VerbFailed(f"{path} is no table.", what=what)
    if len(text) > _LONGEST:
        raise VerbFailed(f"{path} is no table.", what=f"{path}: it has more than {_LONGEST} bytes")
    return os.fsdecode(text)
