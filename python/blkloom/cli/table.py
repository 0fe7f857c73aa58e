"""`blkloom table`, `status`: prints the tables of devices, and the status of their targets."""

from __future__ import annotations

from collections.abc import Callable

import click

from blkloom.cli.dm_verb import MANY, verb
from blkloom.cli.session import Named, Session
from blkloom.cli.table_completion import complete_targets
from blkloom.control.states import DeviceInfo
from blkloom.dm.showing import Segment, concise_device, segment_line, table_segments

_target = click.option(
    "--target", metavar="TYPE", shell_complete=complete_targets, help="Only segments of this target."
)
_inactive = click.option("--inactive", is_flag=True, help="Of the inactive slot.")
_exec = click.option("--exec", "command", metavar="COMMAND", help="Run COMMAND with the path of each device's socket.")


@verb("[DEVICE...]", selectors=MANY)
@_target
@_inactive
@click.option("--showkeys", is_flag=True, help="Print keys, not zeros in their place.")
@click.option("--concise", is_flag=True, help="Print the format of create --concise.")
@_exec
def table(
    session: Session,
    operands: tuple[str, ...],
    target: str | None,
    inactive: bool,
    showkeys: bool,
    concise: bool,
    command: str | None,
) -> None:
    """Print the tables of devices (of all, without DEVICE), in the format that `load` reads.

    \b
    blkloom table disk > disk.table
    blkloom table --concise > all-devices
    """
    whole = _Tables(
        session, "table", target, lambda wire: table_segments(session.client.table(wire, inactive=inactive))
    )
    if concise:
        whole.concise(operands)
    else:
        whole.print(operands, command)


@verb("[DEVICE...]", selectors=MANY)
@_target
@_inactive
@click.option("--noflush", is_flag=True, help="Accepted and ignored: status does not flush.")
@_exec
def status(
    session: Session,
    operands: tuple[str, ...],
    target: str | None,
    inactive: bool,
    noflush: bool,
    command: str | None,
) -> None:
    """Print the status of the targets of devices (of all, without DEVICE).

    I/O errors of the storage go to standard error: their number, and the last one.
    """

    def segments(wire: str) -> list[Segment]:
        if inactive:  # The targets of an inactive table have no status, only arguments.
            return [
                (start, length, name, "")
                for start, length, name, _ in table_segments(session.client.table(wire, inactive=True))
            ]
        return [(start, length, name, text) for start, length, name, text in session.client.status(wire)]

    _Tables(session, "", target, segments).print(operands, command)


class _Tables:
    """task: the ioctl in the error for a missing device; "" where dmsetup prints another text."""

    def __init__(
        self, session: Session, task: str, target: str | None, segments: Callable[[str], list[Segment]]
    ) -> None:
        self._session, self._task, self._target, self._segments = session, task, target, segments

    def print(self, operands: tuple[str, ...], command: str | None) -> None:
        """Prints one line for each segment, with the device name in front if there are several devices."""
        session, several = self._session, self._session.several(operands)
        for info in session.found(operands, self._task):
            lines = self._lines(info)
            if lines is None:
                continue
            session.tell(Named(info.name, name=info.name))
            if not self._task and info.io_errors:
                failed = f"{info.io_errors} I/O errors, the last: {info.last_io_error}"
                click.echo(f"blkloom: device '{info.name}': {failed}", err=True)
            if not command or session.verbose:
                name = f"{session.show(info.name)}: " if several and not session.verbose else ""
                for line in lines:
                    click.echo(name + line)
            if session.verbose and several:
                click.echo()
            if command:
                from blkloom.cli.executing import execute

                execute(command, session, info)

    def concise(self, operands: tuple[str, ...]) -> None:
        """Prints all devices on one line."""
        texts = []
        for info in self._session.found(operands, self._task):
            segments = [segment for segment in self._read(info) if self._target in (None, segment[2])]
            if segments or self._target is None:
                texts.append(concise_device(info, self._session.show(info.name), segments))
        if texts:
            click.echo(";".join(texts))

    def _read(self, info: DeviceInfo) -> list[Segment]:
        with self._session.ioctl(Named(info.name, name=info.name), self._task or "status"):
            return self._segments(info.name)

    def _lines(self, info: DeviceInfo) -> list[str] | None:
        """The lines of a device. None: no segment has the wanted target. Without a table: one empty line."""
        segments = self._read(info)
        if self._target is None:
            return [segment_line(segment) for segment in segments] or [""]
        return [segment_line(segment) for segment in segments if segment[2] == self._target] or None
