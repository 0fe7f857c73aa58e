"""The intended differences between the output of blkloom and dmsetup: the list in docs/dmsetup.md."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Difference:
    """One intended difference. command: of the step, as in the transcript. dmsetup, blkloom: their output in short.
    why: the reason, as in the document.
    """

    command: str
    dmsetup: str
    blkloom: str
    why: str

    def row(self) -> str:
        """The difference as a row of the document's table."""
        cells = (f"`{self.command}`", self.dmsetup, self.blkloom, self.why)
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


DIFFERENCES = [
    Difference(
        "dm info -c -o info_all one",
        "`BlkDevName` is `dm-0`",
        "name of the socket",
        "there is no block device; clients use the socket in `<run-dir>/dev`",
    ),
    Difference(
        "dm info -c -o nonsense one",
        "lists its fields",
        "lists its fields",
        "blkloom has no fields of LVM, a separate verb for statistics, and some new fields",
    ),
    Difference(
        "dm info --columns --headings none -o name one",
        "`unrecognized option`",
        "no headings",
        "newer versions of dmsetup have `--headings`, the one of Debian 12 does not",
    ),
    Difference(
        "dm info -c --headings full -o name,open one",
        "`unrecognized option`",
        "names of fields as headings",
        "newer versions of dmsetup have `--headings`, the one of Debian 12 does not",
    ),
    Difference(
        "dm info -c -o name,events grown",
        "0",
        "1",
        "a change of the size is an event, so that programs that wait for events see it",
    ),
    Difference(
        "dm create other -j 0 -m 42 --table 0 8 zero",
        "`No such device or address`",
        "`Device or resource busy`",
        "the error is that the number is in use",
    ),
    Difference(
        "dm -u some-uuid rename another",
        "`No such device or address`",
        "renames the device",
        "a uuid selects a device, as with all other verbs",
    ),
]
