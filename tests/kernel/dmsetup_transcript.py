"""What `dmsetup_compared.sh` printed, as steps, with what must differ between the two sides evened out.

Both sides:
- backing devices and files are legs: `/dev/loop1`, `7:1`, `(7, 1)`, `loop1` and the file's path are `<leg 1>`;
- a device in a table is its name: `253:13` (the kernel's number) and `blkloom:low` are `<low>`;
- the major number, which is 0 in blkloom, is 0;
- behind `Usage:` each has a text of its own: it ends there; so do words about options after the program's name.

dmsetup's side:
- lines about read ahead: NBD clients read ahead, blkloom does not;
- `(253:11)` in a line about an ioctl: there is no such number here;
- `remove --retry` repeats its line for each time it tried, newer versions do not.

blkloom's side: lines that begin with `blkloom:` say more of what went wrong than dmsetup can.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

MAJORS = r"(?:25[0-9]|24[0-9])"


@dataclass
class Step:
    """One command: the words, and what was printed until the next."""

    title: str
    command: str
    lines: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return "\n".join([f"$ {self.command}", *self.lines])


def steps(text: str, legs: list[str], device: str) -> list[Step]:
    """The steps of a transcript. legs: how this side names them. device: what stands before the name of
    a device in a table.
    """
    found: list[Step] = []
    title, names = "", dict[str, str]()
    name = ""
    for raw in text.splitlines():
        line = _even(raw, legs, device, names)
        if raw.startswith("## "):
            title = raw[3:]
        elif raw.startswith("$ "):
            found.append(Step(title, line[2:]))
        elif not line.startswith(("2> blkloom: ", "1> Read Ahead:")) and "open failed: No such file" not in line:
            found[-1].lines.append(line)
        # Numbers are reused, but what a device stands on was looked at just before.
        if raw.startswith("1> Name: "):
            name = raw.split()[-1]
        elif raw.startswith("1> Major, minor: "):
            names[raw.split()[-1]] = name
    return [_end(step) for step in found]


def _even(line: str, legs: list[str], device: str, names: dict[str, str]) -> str:
    for number, leg in enumerate(legs):
        line = line.replace(leg, f"<leg {number}>").replace(f"({Path(leg).name})", f"(<leg {number}>)")
    line = re.sub(r"\b7(?::|, )([0-2])\b", r"<leg \1>", line)
    line = re.sub(rf"(ioctl on \S* \S*)\({MAJORS}:\d+\) failed", r"\1 failed", line)
    line = line.replace("ioctl on bad failed", "ioctl on bad  failed")
    if line.startswith(("1> ", "$ ")):
        line = re.sub(rf" {MAJORS}:(\d+)(?= \d)", lambda found: f" <{names.get(found[1], found[1])}>", line)
        line = re.sub(rf"{re.escape(device)}(low|mid)\b", r"<\1>", line)
        line = re.sub(rf"\b{MAJORS}([:,] ?\d+)", r"0\1", line)
        line = re.sub(rf" {MAJORS}( +\d+ [L-][I-])", r"   0\1", line)
        line = re.sub(rf"(-j|--major) {MAJORS}\b", r"\1 0", line)
        line = re.sub(r"(?<= )/\S+/table\b", "<table>", line)
    return re.sub(r"2> (?:dmsetup|blkloom): ((?:unrecognized|invalid) option)", r"2> \1", line)


def _end(step: Step) -> Step:
    lines: list[str] = []
    for line in step.lines:
        if line.startswith("2> Usage:"):
            lines.append("2> Usage:")
        elif not (
            ("2> Usage:" in lines and line.startswith("2> ")) or ("--retry" in step.command and lines[-1:] == [line])
        ):
            lines.append(re.sub(" +", " ", line) if "--tree" in step.command else line)
    step.lines = lines
    return step
