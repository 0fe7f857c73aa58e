"""Where a verb's table comes from: an option, a file, or standard input."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from typing import Final

from blkloom.dm.failing import VerbFailed
from blkloom.qcow2.probing import is_image_name

_LINE: Final = re.compile(r"\s*(?:#.*)?$|\s*\d+\s+\d+\s*\S")


@dataclass(frozen=True, slots=True)
class TableText:
    """A table as it was given. source: what errors call it."""

    text: str
    source: str

    @property
    def empty(self) -> bool:
        """Whether it has no line but comments."""
        return all(not line.strip() or line.strip().startswith("#") for line in self.text.split("\n"))


def read_table(option: str | None, file: str | None) -> TableText:
    """--table, else the file, else standard input; a file named like a QCOW2 image is the image's disk. Raises
    VerbFailed for a file that cannot be read and, with dmsetup's words, for a line that is none.
    """
    if option is None and file is not None and is_image_name(file):
        return _image(file)
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
                what=f"{table.source}:{number}: {line.strip()!r}: write: <start> <length> <target> <arguments>",
            )
    return table


def _image(path: str) -> TableText:
    from blkloom.device.open_device import whole_file
    from blkloom.table import format_table

    return TableText(format_table(whole_file(os.path.abspath(path))), path)


def _read(path: str) -> str:
    try:
        with open(path, "rb") as file:
            return os.fsdecode(file.read())
    except OSError as error:
        raise VerbFailed(f"Couldn't open '{path}' for reading.", what=f"{path}: {error.strerror}") from error
