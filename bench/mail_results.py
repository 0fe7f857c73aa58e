"""Results of the mails' test scripts (`bench/mails`): the data, its JSON form, and its part of the performance page.

A `Place` is a machine, or a virtual machine, in which the scripts have run. Pure functions, except `load` and `save`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Final

import msgspec

from cells import NONE, table
from results import AT_THE_FLOOR

_DRIVER: Final = "losetup"
_NULL: Final = "zero"
_OURS: Final = "blkloom"
_PEERS: Final = {
    _DRIVER: "the loop driver",
    "dm-linear": "dm-linear",
    "dm-snapshot": "dm-snapshot",
    "qemu-nbd": "qemu-nbd -c",
    _NULL: "null",
}
_SCRIPTS: Final = {
    "goals": "goals",
    "snapshot": "snapshot",
    "2018": "dm-loop and dm-ram, 2018",
    "2025": "dm-loop, 2025",
    "2015": "loop driver, 2015",
    "2020": "dm-qcow2, 2020",
}


@dataclass(frozen=True)
class Row:
    """One contender in one test. rates: I/Os of all jobs per second of wall time, for each round; a second of a place
    that counts instructions is 10^9 of them. switches: context switches of the machine per I/O. cached: MiB of page
    cache and buffers at the end.
    """

    script: str
    test: str
    contender: str
    rates: list[float]
    switches: list[float] = field(default_factory=list)
    cached: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        return median(self.rates)


@dataclass(frozen=True)
class Place:
    """A place and what was measured there. via: how blkloom's devices were attached. counts: whether it counts
    instructions. settings: the environment of each script. failed: scripts that failed, with the reason. load: the load
    average before, where times are measured: other programs slow down both sides, but not alike.
    """

    name: str
    kernel: str
    via: str
    counts: bool
    when: str
    commit: str
    rounds: int
    settings: dict[str, dict[str, str]]
    rows: list[Row]
    failed: dict[str, str] = field(default_factory=dict)
    load: float | None = None

    @property
    def key(self) -> tuple[str, str]:
        return self.name, self.via

    def with_scripts_of(self, later: Place) -> Place:
        """The place, with the results of `later` in place of those of the same scripts."""
        kept = [row for row in self.rows if row.script not in later.settings]
        failed = {script: why for script, why in self.failed.items() if script not in later.settings}
        return replace(
            later,
            settings={**self.settings, **later.settings},
            rows=[*kept, *later.rows],
            failed={**failed, **later.failed},
        )


@dataclass(frozen=True)
class Comparison:
    """A goal and what was reached. ratio: of I/Os per second, or of instructions per I/O; floor: the same ratio of a
    server that moves no data.
    """

    text: str
    ratio: float
    floor: float | None
    goal: float
    at_most: bool

    @property
    def verdict(self) -> str:
        """Whether the goal is met, or is missed by no more than 10 % of what a server without data reaches."""
        if self.ratio <= self.goal if self.at_most else self.ratio >= self.goal:
            return "met"
        if self.floor is None:
            return "**missed**"
        share = self.floor / self.ratio if self.at_most else self.ratio / self.floor
        return "at the floor" if share >= AT_THE_FLOOR else "**missed**"


def comparisons(place: Place) -> list[Comparison]:
    """The speed goals of attached devices, compared with the rows of `goals` of this place."""
    figure = _figures([row for row in place.rows if row.script == "goals"], place)
    found = []

    def compare(what: str, peer: str, goal: float, *, at_most: bool) -> None:
        if what in figure and peer in figure:
            floor = figure[_NULL] / figure[peer] if _NULL in figure and peer != _OURS else None
            names = [_PEERS.get(one, one) for one in (what, peer)]
            text = f"{names[0]} / {names[1]}"
            found.append(Comparison(text, figure[what] / figure[peer], floor, goal, at_most))

    if not place.counts:
        compare(_OURS, _DRIVER, 0.35, at_most=False)
    elif place.via == "ublk":
        compare(_OURS, _DRIVER, 1.25, at_most=True)
        compare(_OURS, "qemu-nbd", 1 / 3, at_most=True)
        compare("qcow2", "qemu-nbd-qcow2", 1 / 3, at_most=True)
        compare("qcow2", _OURS, 1.05, at_most=True)
    return found


def _figures(rows: list[Row], place: Place) -> dict[str, float]:
    """By contender, of the first test of `rows`: I/Os per second, or instructions per I/O."""
    if not rows:
        return {}
    unit = _unit(place)
    return {row.contender: unit(row.rate) for row in rows if row.test == rows[0].test}


def _unit(place: Place) -> Callable[[float], float]:
    return (lambda rate: 1e9 / rate) if place.counts else (lambda rate: rate)


def section(places: list[Place]) -> str:
    """The part of the performance page."""
    parts = ["## The mails' scripts, on attached devices", _INTRODUCTION, _goals(places)]
    parts += [_place(place) for place in places]
    return "\n\n".join(parts)


_INTRODUCTION: Final = (
    "`bench/mails` has the test scripts of the mails from which blkloom descends, with their commands, but `blkloom` "
    "for `dmsetup` or `losetup`. The devices are nodes that `blkloom attach` made. Each script also runs alone "
    "(`sudo bench/mails/2018.sh`); its first lines explain its settings. `bench/mail_scripts.py` runs them all. "
    "`goals` (4K randrw, qd 16, on one file) and `snapshot` "
    "are not from a mail.\n\n"
    "Rates of many jobs are the I/Os of all jobs divided by the time from the start of the first to the end of the "
    "last. *null* is a device with the target `zero`, attached in the same way, which moves no data. It is served by "
    "the same event loops, so it is a floor of the target, not of the way to attach. Columns with `/` are ratios "
    "to the figure of another device.\n\n"
    "The virtual machines run without KVM. QEMU emulates one processor, whose clock advances by a nanosecond for each "
    "instruction (`-icount`), so **the figures of virtual machines are instructions per I/O** of client, kernel and "
    "server together, and a ratio below 1 is better. They do not include the cost of cache misses and of several "
    "processors.\n\n"
    "All files are on tmpfs; those of 2025 are on ext4 and XFS on a RAM disk (brd) or on a loop device there."
)


def _goals(places: list[Place]) -> str:
    rows = [
        [
            f"{place.name}, {place.via}",
            one.text,
            f"{'at most' if one.at_most else 'at least'} {one.goal:.2f}x",
            f"{one.ratio:.2f}x",
            f"{one.floor:.2f}x" if one.floor is not None else NONE,
            one.verdict,
        ]
        for place in places
        for one in comparisons(place)
    ]
    return table(["place, attached by", "4K randrw, qd 16", "goal", "reached", "null", ""], rows)


def _place(place: Place) -> str:
    unit = "instructions per I/O" if place.counts else "I/Os/s"
    text = f"### {place.name}, attached by `{place.via}`: {unit}\n\n"
    text += f"Linux {place.kernel}, {place.when}, commit {place.commit}, {_rounds(place)}. "
    text += f"Load average before: {place.load:.1f}. " if place.load is not None else ""
    text += (
        "Settings: " + "; ".join(f"`{script}` {_environment(used)}" for script, used in place.settings.items()) + "."
    )
    if place.failed:
        text += " Not measured: " + "; ".join(f"`{script}` ({why})" for script, why in place.failed.items()) + "."
    rows = []
    for script, test in dict.fromkeys((row.script, row.test) for row in place.rows):
        rows += _lines([row for row in place.rows if (row.script, row.test) == (script, test)], place)
    text += "\n\n" + table(["script", "test", "device", unit, *(f"/ {name}" for name in _PEERS.values())], rows)
    return text + _caches(place)


def _rounds(place: Place) -> str:
    rounds = max((len(row.rates) for row in place.rows), default=0)
    return f"medians of up to {rounds} rounds" if rounds > 1 else "one round"


def _environment(used: dict[str, str]) -> str:
    return " ".join(f"{name}={value!r}" if " " in value else f"{name}={value}" for name, value in used.items()) or "-"


def _lines(rows: list[Row], place: Place) -> list[list[str]]:
    """A line for each device of blkloom in a test, with the ratios to its peers; all devices if none is of blkloom."""
    figure = _figures(rows, place)
    ours = [row for row in rows if row.contender.startswith((_OURS, "qcow2"))] or rows
    return [
        [
            _SCRIPTS.get(row.script, row.script),
            row.test,
            row.contender,
            f"{figure[row.contender]:,.0f}",
            *(_ratio(figure, row.contender, peer) for peer in _PEERS),
        ]
        for row in ours
    ]


def _ratio(figure: dict[str, float], ours: str, peer: str) -> str:
    # A QCOW2 image is compared with qemu-nbd on a QCOW2 image.
    if ours == "qcow2" and peer == "qemu-nbd":
        peer = "qemu-nbd-qcow2"
    return f"{figure[ours] / figure[peer]:.2f}x" if peer in figure and peer != ours else NONE


def _caches(place: Place) -> str:
    """The context switches and the page cache of the test of the loop driver."""
    rows = [
        [row.test, row.contender, f"{median(row.switches):.2f}", f"{median(row.cached):.0f} MiB"]
        for row in place.rows
        if row.script == "2015" and row.switches
    ]
    if not rows:
        return ""
    return "\n\n" + table(["loop driver, 2015", "device", "context switches per I/O", "page cache"], rows)


def load(path: Path) -> list[Place]:
    """Read the places; none if the file does not exist. Raises OSError, msgspec.DecodeError."""
    return msgspec.json.decode(path.read_bytes(), type=list[Place]) if path.exists() else []


def save(places: list[Place], path: Path) -> None:
    """Write the places as indented JSON."""
    path.write_bytes(msgspec.json.format(msgspec.json.encode(places), indent=1) + b"\n")


def added(places: list[Place], later: Place) -> list[Place]:
    """The places with the results of `later`, which replace those of the same scripts."""
    known = {place.key: place for place in places}
    known[later.key] = known[later.key].with_scripts_of(later) if later.key in known else later
    return list(known.values())
