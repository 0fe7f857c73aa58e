"""The output of `dmsetup_compared.sh` as a list of steps, with the expected differences of the two programs removed.

On both sides:
- backing devices and files are legs: `/dev/loop1`, `7:1`, `(7, 1)`, `loop1` and the file's path become `<leg 1>`;
- a device in a table becomes its name: `253:13` (the kernel's number) and `blkloom:low` become `<low>`;
- the major number becomes 0, as in blkloom;
- the text after `Usage:` is removed, because each program has its own; so is text about options after the program's
  name.

In dmsetup's output:
- lines about read ahead are removed: with blkloom, the client reads ahead;
- `(253:11)` in a line about an ioctl is removed: blkloom has no such number;
- repeated lines of `remove --retry` are removed: newer versions print one.

In blkloom's output, lines that begin with `blkloom:` are removed: dmsetup has no such details.
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
