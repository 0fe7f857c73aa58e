"""`blkloom create`: a device with its table, live at once; or an empty one."""

from __future__ import annotations

import os
import sys

import click

from blkloom.cli.dm_verb import verb
from blkloom.cli.session import Named, Session
from blkloom.cli.tables import TableText, allow_backing_option, read_table
from blkloom.dm.failing import VerbFailed
from blkloom.errors import BackingError, BlkloomError, TableError


@verb("NAME", "[TABLE_FILE|IMAGE.qcow2]", most=2, complete=False)
@click.option("--table", metavar="TABLE", help="The table; else from TABLE_FILE, else from standard input.")
@click.option("-n", "--notable", is_flag=True, help="Without a table; load one later.")
@click.option("--concise", is_flag=True, help="Devices in the form name,uuid,minor,flags,table[,table...][;...].")
@click.option("-r", "--readonly", is_flag=True, help="For reading only.")
@click.option("-u", "--uuid", metavar="UUID", help="A uuid for the device.")
@click.option("-j", "--major", metavar="N", help="With -m; it must be there, and is not looked at.")
@click.option("-m", "--minor", metavar="N", help="With -j: the device's number.")
@click.option("--shared", is_flag=True, help="Do not lock files: others may write to them.")
@allow_backing_option
def create(
    session: Session,
    operands: tuple[str, ...],
    table: str | None,
    notable: bool,
    concise: bool,
    readonly: bool,
    uuid: str | None,
    major: str | None,
    minor: str | None,
    shared: bool,
    allow_backing: tuple[str, ...],
) -> None:
    """Make a device, and bring it to life with a table.

    \b
    blkloom create disk --table '0 2048 loop disk.img'
    blkloom create disk disk.table
    blkloom create disk disk.qcow2
    echo '0 2097152 ram' | blkloom create memory
    blkloom create late --notable && blkloom load late --table '0 8 zero' && blkloom resume late
    blkloom create --concise 'a,,,rw,0 8 zero;b,,,ro,0 8 linear blkloom:a 0'

    NBD clients reach it at once at the socket DIR/dev/NAME of the run directory. If its table cannot
    be loaded there is no device afterwards, as there was none before.
    """
    if concise:
        if table is not None or minor is not None or uuid is not None or notable:
            raise VerbFailed("--concise is incompatible with --[no]table, --minor, --uuid and --inactive.")
        _create_concise(session, operands, shared)
        return
    if not operands:
        raise VerbFailed("Please provide a name for the new device.")
    device = _New(session, operands[0], uuid or "", None if minor is None else _minor(minor), readonly, shared)
    file = operands[1] if len(operands) == 2 else None
    text = None if notable else read_table(table, file, allow_backing=allow_backing)
    device.make(text)


class _New:
    """A device to be."""

    def __init__(self, session: Session, name: str, uuid: str, minor: int | None, read_only: bool, shared: bool):
        self._session = session
        self._name = session.new_name(name, "create")
        self._uuid = session.new_uuid(uuid) if uuid else ""
        self._minor, self._read_only, self._shared = minor, read_only, shared

    def make(self, table: TableText | None) -> None:
        """Raises VerbFailed; it names the ioctl of dmsetup's that would have failed."""
        create, load = Named(self._name, name=self._name, uuid=self._uuid), Named(self._name, name=self._name)
        client = self._session.start()
        try:
            client.create(
                self._name,
                uuid=self._uuid,
                minor=self._minor,
                table=None if table is None or table.empty else table.text,
                source=table.source if table else "table",
                read_only=self._read_only,
                shared=self._shared,
            )
        except (TableError, BackingError) as error:
            with self._session.ioctl(load, "reload"):
                raise error from None
        except (BlkloomError, OSError) as error:
            with self._session.ioctl(create, "create"):
                raise error from None
        self._session.tell(load)


def _create_concise(session: Session, operands: tuple[str, ...], shared: bool) -> None:
    from blkloom.table.concise import split_concise

    if len(operands) > 1:
        raise VerbFailed("blkloom create --concise takes at most one argument")
    text = (operands[0] if operands else read_stdin()).removesuffix("\n")
    for fields in split_concise(text):
        if len(fields) < 5:
            name, uuid, minor, flags = [*fields, "(null)", "(null)", "(null)"][:4]
            raise VerbFailed(
                "Incomplete entry: five comma-separated fields are required for each device",
                f"Parsed {len(fields)} fields: name: {name} uuid: {uuid} minor: {minor} flags: {flags} table: (null)",
            )
        name, uuid, minor, flags, table = fields
        if flags not in ("", "ro", "rw"):
            raise VerbFailed(f"Invalid flags parameter '{flags}' must be 'ro' or 'rw' or empty.")
        device = _New(session, name, uuid, _minor(minor) if minor else None, flags == "ro", shared)
        given = read_table(table, None)
        device.make(TableText(given.text, f"--concise {name}"))


def read_stdin() -> str:
    """All of standard input."""
    return os.fsdecode(sys.stdin.buffer.read())


def _minor(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or int(text) >= 1 << 20:
        raise VerbFailed(f"Invalid minor number {text!r}.", what=f"a whole number below {1 << 20}")
    return int(text)
