"""Records of kernel nodes: files `<run-dir>/kernel/<kernel's name>`, in the form that udev's IMPORT{file} reads.

A record is written before the kernel announces the node, so that udev's rule finds the device's name. `reap` uses the
records to find nodes that a killed supervisor has left.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

_NAME: Final = "BLKLOOM_NAME"
_SEQUENCE: Final = "BLKLOOM_DISKSEQ"
_ASIDE: Final = ".new"


def write_record(folder: str, kernel_name: str, name: str, sequence: int) -> None:
    """Writes a record. name: of the link in /dev/blkloom, "" for none. sequence: the kernel's diskseq; 0: unknown."""
    path = os.path.join(folder, kernel_name)
    aside = f"{path}{_ASIDE}"
    Path(aside).write_text(f"{_NAME}={name}\n{_SEQUENCE}={sequence}\n", encoding="utf-8")
    os.replace(aside, path)


def remove_record(folder: str, kernel_name: str) -> None:
    """Removes a record if it exists."""
    with suppress(FileNotFoundError):
        os.unlink(os.path.join(folder, kernel_name))


def records(folder: str, prefix: str) -> Iterator[tuple[str, int]]:
    """The kernel's name and diskseq of each record whose name begins with `prefix`. Removes unfinished records."""
    for path in sorted(Path(folder).glob(f"{prefix}*")):
        if path.suffix == _ASIDE:
            remove_record(folder, path.name)
            continue
        with suppress(FileNotFoundError):
            lines = dict(line.partition("=")[::2] for line in path.read_text(encoding="utf-8").splitlines())
            sequence = lines.get(_SEQUENCE, "")
            yield path.name, int(sequence) if sequence.isdecimal() else 0
