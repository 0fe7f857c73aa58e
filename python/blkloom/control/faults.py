"""Faults of devices as values: what `blkloom fault` can make of a live device.

Each is one line of a table over the device. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final, Literal, Self, TypeAlias

import msgspec

from blkloom.errors import UsageError

Requests: TypeAlias = Literal["reads", "writes", "flushes"]
"""Writes include discards and write-zeroes."""

DEVICE: Final = ""
"""Stands for the device in `Fault.line`."""
_ALL: Final[tuple[Requests, ...]] = ("reads", "writes", "flushes")
_OPERATIONS: Final = {"reads": ["read"], "writes": ["write", "discard", "write_zeroes"], "flushes": ["flush"]}
_SECTOR: Final = "512"
_MOST_BLOCKS: Final = 4096


class Fault(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A fault of a device. words: as `blkloom fault` has it, such as `slow 10ms`. line: the target and its arguments.
    read_only: writes fail with EROFS. messages: for the target, after it was loaded.
    """

    words: str
    line: tuple[str, ...]
    read_only: bool = False
    messages: tuple[str, ...] = ()

    @classmethod
    def fail(
        cls,
        requests: Iterable[Requests] = (),
        *,
        probability: float | str = "",
        errno: str = "",
        ranges: Sequence[tuple[int, int]] = (),
        seed: int | None = None,
    ) -> Self:
        """Requests fail. requests: only these. probability: of each request, from 0 to 1. errno: the name of the error,
        "" for EIO. ranges: only there: (first sector, sectors). seed: of the random numbers.
        """
        chosen = _chosen(requests)
        features, words = [], ["fail", *(f"--{name}" for name in chosen)]
        if probability != "":
            text = f"{probability:.9f}".rstrip("0").rstrip(".") if isinstance(probability, float) else str(probability)
            features.append(f"probability={text}")
            words.append(f"--probability {text}")
        if chosen:
            features.append(f"operations={'+'.join(one for name in chosen for one in _OPERATIONS[name])}")
        if errno:
            features.append(f"errno={errno}")
            words.append(f"--errno {errno}")
        for first, length in ranges:
            features.append(f"range={first}+{length}")
            words.append(f"--range {first}+{length}")
        if seed is not None:
            features.append(f"seed={seed}")
            words.append(f"--seed {seed}")
        return cls(words=" ".join(words), line=("error", DEVICE, "0", str(len(features)), *features))

    @classmethod
    def slow(cls, milliseconds: int, requests: Iterable[Requests] = ()) -> Self:
        """Requests wait so long. requests: only these."""
        chosen = _chosen(requests)
        times = [str(milliseconds if name in chosen or not chosen else 0) for name in _ALL]
        line = [word for time in times for word in (DEVICE, "0", time)]
        words = ["slow", f"{milliseconds}ms", *(f"--{name}" for name in chosen)]
        return cls(words=" ".join(words), line=("delay", *line))

    @classmethod
    def throttle(cls, *, iops: int = 0, bps: int = 0, requests: Iterable[Requests] = ()) -> Self:
        """Requests keep limits a second: operations and bytes; 0: no limit. requests: reads or writes only. Raises
        UsageError.
        """
        chosen = _chosen(requests)
        if not (iops or bps):
            raise UsageError("throttle needs a limit", cure="give --iops, --bps or both")
        if "flushes" in chosen or len(chosen) > 1:
            raise UsageError("throttle limits all requests, or reads, or writes", cure="give --reads or --writes alone")
        suffix = {"reads": "_rd", "writes": "_wr"}[chosen[0]] if chosen else ""
        limits = [f"{name}{suffix}={value}" for name, value in (("iops", iops), ("bps", bps)) if value]
        given = [f"--{name} {value}" for name, value in (("iops", iops), ("bps", bps)) if value]
        words = ["throttle", *given, *(f"--{name}" for name in chosen)]
        return cls(words=" ".join(words), line=("throttle", DEVICE, "0", str(len(limits)), *limits))

    @classmethod
    def only_reads(cls) -> Self:
        """The device is read-only: writes fail with EROFS."""
        return cls(words="read-only", line=("linear", DEVICE, "0"), read_only=True)

    @classmethod
    def flaky(cls, up: int, down: int, what: Literal["", "error_reads", "error_writes", "drop_writes"] = "") -> Self:
        """The device works for `up` seconds, and for `down` seconds it does not, in turn. what: happens then; "": all
        requests fail.
        """
        words = f"flaky {up} {down}" + (f" --{what.replace('_', '-')}" if what else "")
        features = ["1", what] if what else ["2", "error_reads", "error_writes"]
        return cls(words=words, line=("flakey", DEVICE, "0", str(up), str(down), *features))

    @classmethod
    def bad_blocks(cls, sectors: Sequence[tuple[int, int]]) -> Self:
        """Reads of these sectors fail until they are written: (first sector, sectors). Raises UsageError."""
        numbers = sorted({number for first, length in sectors for number in range(first, first + length)})
        if not 0 < len(numbers) <= _MOST_BLOCKS:
            raise UsageError(f"{len(numbers)} bad blocks", cure=f"give 1 to {_MOST_BLOCKS}, or use fail --range")
        words = [f"{first}-{first + length - 1}" if length > 1 else str(first) for first, length in sectors]
        return cls(
            words=f"bad-blocks {' '.join(words)}",
            line=("dust", DEVICE, "0", _SECTOR),
            messages=("quiet", *(f"addbadblock {number}" for number in numbers), "enable"),
        )


def messages_of(words: str) -> tuple[str, ...]:
    """The messages of a fault with these words, for a target that was loaded again. Raises UsageError."""
    kind, *sectors = words.split() or [""]
    if kind != "bad-blocks":
        return ()
    ranges = []
    for text in sectors:
        first, _, last = text.partition("-")
        if not (first.isdecimal() and (last or first).isdecimal() and int(last or first) >= int(first)):
            raise UsageError(f"'{text}' are no sectors", cure="write bad-blocks 8 100-107")
        ranges.append((int(first), int(last or first) - int(first) + 1))
    return Fault.bad_blocks(ranges).messages


def _chosen(requests: Iterable[Requests]) -> list[Requests]:
    """In the usual order; [] if all are meant. Raises UsageError."""
    given = set(requests)
    if unknown := given - set(_ALL):
        raise UsageError(f"'{min(unknown)}' are no requests", cure=f"there are {', '.join(_ALL)}")
    return [] if given == set(_ALL) else [name for name in _ALL if name in given]
