"""Where blkloom answers otherwise than dmsetup, on purpose: the list that docs/dmsetup.md shows."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Difference:
    """command: of the step, as the transcript has it. dmsetup, blkloom: their lines in short. why: the
    reason, as the document gives it.
    """

    command: str
    dmsetup: str
    blkloom: str
    why: str

    def row(self) -> str:
        """In the document's table."""
        cells = (f"`{self.command}`", self.dmsetup, self.blkloom, self.why)
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


DIFFERENCES = [
    Difference(
        "dm info -c -o info_all one",
        "`BlkDevName` is `dm-0`",
        "its socket's name",
        "no block device is made; the socket in the run directory's `dev` is what opens the device",
    ),
    Difference(
        "dm info -c -o nonsense one",
        "lists its fields",
        "lists its fields",
        "there are none of LVM's, statistics have a verb of their own, and some are added",
    ),
    Difference(
        "dm info --columns --headings none -o name one",
        "`unrecognized option`",
        "no headings",
        "newer versions of dmsetup know `--headings`, Debian 12's does not",
    ),
    Difference(
        "dm info -c --headings full -o name,open one",
        "`unrecognized option`",
        "names of fields as headings",
        "newer versions of dmsetup know `--headings`, Debian 12's does not",
    ),
    Difference(
        "dm info -c -o name,events grown",
        "0",
        "1",
        "a change of size is an event, for clients that must be told",
    ),
    Difference(
        "dm create other -j 0 -m 42 --table 0 8 zero",
        "`No such device or address`",
        "`Device or resource busy`",
        "the number is in use; that is what is wrong",
    ),
    Difference(
        "dm -u some-uuid rename another",
        "`No such device or address`",
        "renames it",
        "a uuid names a device here as for every other verb",
    ),
]
