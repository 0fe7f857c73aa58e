"""`blkloom fault`: makes a live device failing, slow, throttled or read-only, and well again."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, Literal

import click
from click.shell_completion import CompletionItem

from blkloom.cli.completing import complete_devices
from blkloom.cli.dm_verb import ONE, verb
from blkloom.cli.session import Session
from blkloom.dm.failing import NotACommandLine, VerbFailed

if TYPE_CHECKING:
    from blkloom.control.faults import Fault, Requests

_KINDS: Final = {
    "fail": "requests fail with EIO, or with --errno",
    "slow": "requests wait: slow 10ms",
    "throttle": "limits a second: --iops, --bps",
    "read-only": "writes fail with EROFS",
    "flaky": "works for some seconds, and for some it does not: flaky 5 2",
    "bad-blocks": "reads of these sectors fail until they are written: bad-blocks 8 100-107",
    "off": "well again, with the table that it had",
}
"""The second word, and what becomes of the device."""
_OPTIONS: Final = {
    "fail": {"reads", "writes", "flushes", "probability", "errno", "ranges", "seed"},
    "slow": {"reads", "writes", "flushes"},
    "throttle": {"reads", "writes", "iops", "bps"},
    "flaky": {"drop_writes", "error_writes", "error_reads"},
}
_SPELLED: Final = {"ranges": "range"}
_TIME: Final = {"": 1, "ms": 1, "s": 1000}


def complete_fault(context: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The device, then the kind."""
    if not context.params.get("operands"):
        return complete_devices(context, param, incomplete)
    if len(context.params["operands"]) > 1:
        return []
    return [CompletionItem(name, help=what) for name, what in _KINDS.items() if name.startswith(incomplete)]


@verb("[DEVICE [KIND [ARGUMENTS...]]]", complete=complete_fault, selectors=ONE)
@click.option("--list", "as_list", is_flag=True, help="Print the faults of devices (of all, without DEVICE).")
@click.option("--reads", is_flag=True, help="Only reads.")
@click.option("--writes", is_flag=True, help="Only writes, discards and write-zeroes.")
@click.option("--flushes", is_flag=True, help="Only flushes.")
@click.option("--probability", metavar="P", help="fail: with this probability, from 0 to 1.")
@click.option("--errno", metavar="NAME", help="fail: with this error, such as ENOSPC.")
@click.option("--range", "ranges", metavar="S+N", multiple=True, help="fail: only N sectors from S on. Several times.")
@click.option("--seed", metavar="NUMBER", help="fail: of the random numbers.")
@click.option("--iops", metavar="N", help="throttle: operations a second.")
@click.option("--bps", metavar="SIZE", help="throttle: bytes a second.")
@click.option("--drop-writes", is_flag=True, help="flaky: writes succeed and do nothing.")
@click.option("--error-writes", is_flag=True, help="flaky: only writes fail.")
@click.option("--error-reads", is_flag=True, help="flaky: only reads fail.")
def fault(session: Session, operands: tuple[str, ...], as_list: bool, **options: object) -> None:
    """Make a live device failing, slow, throttled or read-only, and well again; without KIND, print its fault.

    \b
    blkloom fault disk fail                          # everything
    blkloom fault disk fail --reads --probability 0.01
    blkloom fault disk fail --writes --errno ENOSPC --range 2048+128
    blkloom fault disk slow 10ms --reads
    blkloom fault disk throttle --iops 100 --bps 1m
    blkloom fault disk read-only
    blkloom fault disk flaky 5 2 --drop-writes       # in seconds
    blkloom fault disk bad-blocks 8 100-107          # sectors; a write makes one good
    blkloom fault disk off                           # well again, with the table that it had
    blkloom fault --list

    A fault replaces the former one. Clients, nodes and mounted file systems stay. The table is in the device
    DEVICE-real meanwhile.
    """
    given = {name: value for name, value in options.items() if value not in (None, False, ())}
    named = (
        None if not operands and not session.elsewhere else session.named(None if session.elsewhere else operands[0])
    )
    rest = operands if session.elsewhere else operands[1:]
    if as_list or named is None or not rest:
        if given or (as_list and rest):
            raise NotACommandLine("An option needs a device and what becomes of it.", what=", ".join(_KINDS))
        for info in [session.info(named)] if named is not None else session.client.info():
            if info.fault:
                click.echo(f"{session.show(info.name)}: {info.fault}")
        return
    kind, *arguments = rest
    if kind not in _KINDS:
        raise VerbFailed(f"Unknown fault '{kind}'.", what=f"there are {', '.join(_KINDS)}")
    for name in sorted(given.keys() - _OPTIONS.get(kind, set())):
        raise NotACommandLine(f"{kind} does not take --{_SPELLED.get(name, name).replace('_', '-')}.")
    session.client.fault(named.wire, _fault(kind, arguments, given))


def _fault(kind: str, arguments: list[str], given: dict[str, object]) -> Fault | None:
    from blkloom.control.faults import Fault

    requests: list[Requests] = [name for name in ("reads", "writes", "flushes") if name in given]
    _check_count(kind, arguments)
    match kind:
        case "fail":
            return Fault.fail(
                requests,
                probability=str(given.get("probability", "")),
                errno=str(given.get("errno", "")),
                ranges=[_range(text) for text in _texts(given.get("ranges"))],
                seed=_number(given["seed"], "--seed") if "seed" in given else None,
            )
        case "slow":
            return Fault.slow(_milliseconds(arguments[0]), requests)
        case "throttle":
            return Fault.throttle(
                iops=_number(given.get("iops", "0"), "--iops"), bps=_size(given.get("bps", "0")), requests=requests
            )
        case "read-only":
            return Fault.only_reads()
        case "flaky":
            up, down = (_number(text, "flaky") for text in arguments)
            return Fault.flaky(up, down, _feature(given))
        case "bad-blocks":
            return Fault.bad_blocks([_sectors(text) for text in arguments])
    return None


def _check_count(kind: str, arguments: list[str]) -> None:
    wanted = {"slow": "a time, such as 10ms", "flaky": "two times in seconds: up and down", "bad-blocks": "sectors"}
    least = {"slow": 1, "flaky": 2, "bad-blocks": 1}.get(kind, 0)
    if len(arguments) < least or (len(arguments) > least and kind != "bad-blocks"):
        raise NotACommandLine(
            f"{kind} takes {wanted.get(kind, 'no arguments')}.", what=" ".join(arguments) or "none given"
        )


def _feature(given: dict[str, object]) -> Literal["", "error_reads", "error_writes", "drop_writes"]:
    found: list[Literal["error_reads", "error_writes", "drop_writes"]] = [
        name for name in ("error_reads", "error_writes", "drop_writes") if name in given
    ]
    if len(found) > 1:
        raise NotACommandLine("Only one of --error-reads, --error-writes and --drop-writes permitted.")
    return found[0] if found else ""


def _texts(value: object) -> list[str]:
    return [str(text) for text in value] if isinstance(value, tuple) else []


def _number(value: object, what: str) -> int:
    text = str(value)
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise NotACommandLine(f"{what} takes a whole number.", what=f"'{text}'")
    return int(text)


def _size(value: object) -> int:
    from blkloom.units import parse_size

    try:
        return parse_size(str(value))
    except ValueError as error:
        raise NotACommandLine("--bps takes a size, such as 1m.", what=str(error)) from error


def _milliseconds(text: str) -> int:
    found = re.fullmatch(r"([0-9]{1,9})(ms|s|)", text)
    if not found:
        raise NotACommandLine("slow takes a time, such as 10ms or 2s.", what=f"'{text}'")
    return int(found[1]) * _TIME[found[2]]


def _range(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([0-9]{1,18})\+([0-9]{1,18})", text)
    if not found:
        raise NotACommandLine("--range takes <first sector>+<sectors>.", what=f"'{text}'")
    return int(found[1]), int(found[2])


def _sectors(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([0-9]{1,18})(?:-([0-9]{1,18}))?", text)
    if not found or (found[2] and int(found[2]) < int(found[1])):
        raise NotACommandLine("bad-blocks takes sectors: 8, or 100-107.", what=f"'{text}'")
    first = int(found[1])
    return first, int(found[2] or first) - first + 1
