"""`blkloom replay`: writes the entries of a log of writes to a device, and checks the device on the way."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable

import click

from blkloom.errors import BackingError, UsageError
from blkloom.open_files import open_file
from blkloom.write_log import DISCARD, MARK, LogEntry, WriteLog


@click.command()
@click.argument("log")
@click.argument("device", required=False)
@click.option(
    "--until",
    metavar="MARK|NUMBER|flush",
    default="",
    help="Stop after the first entry that is this mark, after so many entries, or after the first flush or FUA write.",
)
@click.option(
    "--check",
    metavar="COMMAND",
    default="",
    help="Run this command of the shell after each flush or FUA write; stop at the first that fails.",
)
@click.option("--list", "lists", is_flag=True, help="Print the entries, and write nothing: DEVICE is not needed.")
def replay(log: str, device: str | None, until: str, check: str, lists: bool) -> None:
    """Write the entries of LOG, the log of a log-writes target, to DEVICE: a file, a block device or a node.

    DEVICE should have the contents that the recorded device had at first. A discard writes zeros. LOG may also be one
    of the kernel's dm-log-writes.

    \b
    blkloom replay disk.log copy.img
    blkloom replay disk.log copy.img --until 'before unlink'
    blkloom replay disk.log copy.img --check 'e2fsck -fn copy.img'

    The exit status is 1 if the check fails; then DEVICE has the state that it failed for.
    """
    with open(log, "rb") as file:
        entries = WriteLog(file, log)
        if lists:
            for number, entry in enumerate(entries, 1):
                click.echo(f"{number}\t{entry.describe()}")
            return
        if device is None:
            raise UsageError("no DEVICE to write to", cure="name it after LOG, or give --list")
        ends = _end(until)
        descriptor = _opened(device)
        try:
            found = _replay(entries, descriptor, ends, check)
        finally:
            os.close(descriptor)
    if until and not found:
        raise UsageError(f"no such entry in {log}: '{until}'", cure="--list prints the entries")


def _opened(device: str) -> int:
    try:
        return open_file(device, writable=True, direct=False)
    except OSError as error:
        what = f"could not be opened for writing: {error.strerror}"
        cure = "give a file, block device or node"
        raise BackingError(what, path=device, errno=error.errno or errno.EIO, cure=cure) from error


def _end(until: str) -> Callable[[int, LogEntry], bool]:
    """Whether an entry, with its number from 1 on, is the last to be written."""
    if not until:
        return lambda _number, _entry: False
    if until == "flush":
        return lambda _number, entry: entry.is_durable
    if until.isascii() and until.isdigit():
        return lambda number, _entry: number == int(until)
    mark = os.fsencode(until)
    return lambda _number, entry: bool(entry.flags & MARK) and entry.mark == mark


def _replay(entries: WriteLog, descriptor: int, ends: Callable[[int, LogEntry], bool], check: str) -> bool:
    """Writes the entries. Returns whether it stopped at an entry. Ends the program if the check fails."""
    checks = 0
    with click.progressbar(
        entries, length=entries.entries, label="entries", file=sys.stderr, hidden=not sys.stderr.isatty()
    ) as shown:
        for number, entry in enumerate(shown, 1):
            _write(descriptor, entry, entries.sector)
            if check and entry.is_durable:
                os.fsync(descriptor)
                checks += 1
                _check(check, number, entry)
            if ends(number, entry):
                os.fsync(descriptor)
                click.echo(f"replayed {number} of {entries.entries} entries, up to: {entry.describe()}")
                return True
    os.fsync(descriptor)
    click.echo(f"replayed {entries.entries} entries" + (f", checked {checks} times" if check else ""))
    return False


def _write(descriptor: int, entry: LogEntry, sector: int) -> None:
    offset = entry.sector * sector
    data = memoryview(entry.data)
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written
    if entry.flags & DISCARD:
        end = offset + entry.sectors * sector
        while offset < end:
            offset += os.pwrite(descriptor, bytes(min(end - offset, 1 << 20)), offset)


def _check(command: str, number: int, entry: LogEntry) -> None:
    done = subprocess.run(["sh", "-c", command], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        click.echo(done.stdout + done.stderr, nl=False)
        click.echo(f"the check failed with status {done.returncode} after entry {number}: {entry.describe()}", err=True)
        sys.exit(1)
