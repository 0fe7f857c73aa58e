"""`blkloom create`: makes a device with a table, or without one (--notable)."""

from __future__ import annotations

import os
import sys
from typing import Any

import click

from blkloom.attach.registry import AUTO
from blkloom.cli.attaching import attach_new, via_option
from blkloom.cli.dm_verb import verb
from blkloom.cli.node_options import no_scan_option
from blkloom.cli.partitioning import add_to_new, partscan_option
from blkloom.cli.permissions import permission_bits
from blkloom.cli.session import Named, Session
from blkloom.cli.table_completion import complete_table
from blkloom.cli.tables import TableText, allow_backing_option, format_option, read_table
from blkloom.dm.failing import VerbFailed
from blkloom.errors import BackingError, BlkloomError, TableError


@verb("NAME", "[TABLE_FILE|IMAGE.qcow2|FILE]", most=2, complete=None)
@click.option(
    "--table", metavar="TABLE", shell_complete=complete_table, help="The table (else TABLE_FILE or standard input)."
)
@click.option("-n", "--notable", is_flag=True, help="Make the device without a table; load one later.")
@click.option("--concise", is_flag=True, help="Devices in the form name,uuid,minor,flags,table[,table...][;...].")
@click.option("-r", "--readonly", "--read-only", "readonly", is_flag=True, help="For reading only.")
@click.option("-u", "--uuid", metavar="UUID", help="A uuid for the device.")
@click.option("-j", "--major", metavar="N", help="Required with -m; its value is ignored.")
@click.option("-m", "--minor", metavar="N", help="Minor number of the device (with -j).")
@click.option("--shared", is_flag=True, help="Do not lock the files: other programs may write to them.")
@partscan_option
@click.option("--attach", is_flag=True, help="Attach it as well, and print the node.")
@click.option("--vhost-user", is_flag=True, help="Export it for virtual machines as well, and print the socket.")
@click.option("--addnodeoncreate", is_flag=True, help="Attach it as well, and print nothing.")
@click.option("--addnodeonresume", is_flag=True, help="Attach it when it has a table: now, or at its next resume.")
@click.option("-M", "--mode", type=permission_bits, metavar="MODE", help="Permissions of its nodes, octal.")
@click.option("-U", "--uid", type=click.IntRange(0), metavar="N", help="Owner of its nodes.")
@click.option("-G", "--gid", type=click.IntRange(0), metavar="N", help="Group of its nodes.")
@no_scan_option
@via_option
@format_option
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
    partscan: bool,
    attach: bool,
    vhost_user: bool,
    addnodeoncreate: bool,
    addnodeonresume: bool,
    mode: int | None,
    uid: int | None,
    gid: int | None,
    no_scan: bool,
    via: str | None,
    image_format: str | None,
    allow_backing: tuple[str, ...],
) -> None:
    """Make a device with a table; it is ready for I/O at once.

    \b
    blkloom create disk --table '0 2048 loop disk.img'
    blkloom create disk disk.table
    blkloom create disk disk.qcow2
    mount $(blkloom create disk disk.qcow2 --attach) /mnt
    blkloom create disk disk.qcow2 --vhost-user
    blkloom create disk disk.img --format raw
    echo '0 2097152 ram' | blkloom create memory
    blkloom create late --notable && blkloom load late --table '0 8 zero' && blkloom resume late
    blkloom create --concise 'a,,,rw,0 8 zero;b,,,ro,0 8 linear blkloom:a 0'

    NBD clients can connect to the socket DIR/dev/NAME in the run directory. If the table cannot be loaded,
    no device is made; nor if --attach or --vhost-user fails.
    """
    if partscan and no_scan:
        raise VerbFailed("-P is incompatible with --no-scan.")
    if addnodeoncreate and notable:
        what = "a node needs a size, and so a table: --addnodeonresume makes the node at the next resume"
        raise VerbFailed("--addnodeoncreate is incompatible with --notable.", what=what)
    nodes = _Nodes(via or (AUTO if attach else ""), addnodeoncreate, addnodeonresume, partscan)
    if concise and vhost_user:
        raise VerbFailed("--vhost-user is incompatible with --concise.", what="blkloom export NAME --vhost-user")
    nodes.options = {"mode": mode, "uid": uid, "gid": gid, "scan": not no_scan}
    if concise:
        if table is not None or minor is not None or uuid is not None or notable:
            raise VerbFailed("--concise is incompatible with --[no]table, --minor, --uuid and --inactive.")
        _create_concise(session, operands, shared, nodes)
        return
    if partscan and notable:
        raise VerbFailed("-P is incompatible with --notable.", what="later: blkloom partitions NAME --add")
    if not operands:
        raise VerbFailed("Please provide a name for the new device.")
    device = _New(session, operands[0], uuid or "", None if minor is None else _minor(minor), readonly, shared)
    device.nodes = nodes
    file = operands[1] if len(operands) == 2 else None
    text = None if notable else read_table(table, file, image_format=image_format, allow_backing=allow_backing)
    device.make(text, vhost_user=vhost_user)


class _Nodes:
    """What is said about the node of a new device. via: how it is attached, and its node printed; "" for not at all.
    on_create, on_resume: as in dmsetup. partscan: its partitions are made, too. options: of `NodeOptions`.
    """

    def __init__(self, via: str, on_create: bool, on_resume: bool, partscan: bool) -> None:
        self.via, self.on_create, self.on_resume, self.partscan = via, on_create, on_resume, partscan
        self.options: dict[str, Any] = {}

    def for_client(self, *, table: bool) -> dict[str, Any]:
        """Arguments of `Client.create`; none if nothing is special. table: the device gets a table."""
        from blkloom.control.states import NodeOptions  # msgspec is not needed for help

        options = NodeOptions(**self.options, at_resume=self.on_resume and not table)
        return {} if options == NodeOptions() else {"node": options}


class _New:
    """A device to be made."""

    nodes = _Nodes("", False, False, False)

    def __init__(
        self, session: Session, name: str, uuid: str, minor: int | None, read_only: bool, shared: bool
    ) -> None:
        self._session = session
        self._name = session.new_name(name, "create")
        self._uuid = session.new_uuid(uuid) if uuid else ""
        self._minor, self._read_only, self._shared = minor, read_only, shared

    def make(self, table: TableText | None, *, vhost_user: bool = False) -> None:
        """Makes the device. vhost_user: also its export for virtual machines, whose socket is printed. Raises
        VerbFailed, which names the ioctl that fails in dmsetup.
        """
        create, load = Named(self._name, name=self._name, uuid=self._uuid), Named(self._name, name=self._name)
        client = self._session.start()
        has_table = table is not None and not table.empty
        try:
            client.create(
                self._name,
                uuid=self._uuid,
                minor=self._minor,
                table=None if table is None or table.empty else table.text,
                source=table.source if table else "table",
                read_only=self._read_only,
                shared=self._shared,
                **self.nodes.for_client(table=has_table),
            )
        except (TableError, BackingError) as error:
            with self._session.ioctl(load, "reload"):
                raise error from None
        except (BlkloomError, OSError) as error:
            with self._session.ioctl(create, "create"):
                raise error from None
        if vhost_user:
            self._export()
        nodes = self.nodes
        if nodes.via or nodes.on_create or (nodes.on_resume and has_table):
            via = nodes.via or AUTO
            attach_new(self._session, self._name, via=via, partitions=nodes.partscan, silent=not nodes.via)
        if nodes.partscan:
            add_to_new(self._session, self._name)
        self._session.tell(load)

    def _export(self) -> None:
        """Exports the new device for virtual machines; removes the device if that fails."""
        try:
            made = self._session.client.export(self._name, kind="vhost-user")
        except BaseException:
            self._session.client.remove(self._name, force=True)
            raise
        click.echo(made.path)


def _create_concise(session: Session, operands: tuple[str, ...], shared: bool, nodes: _Nodes) -> None:
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
        device.nodes = nodes
        given = read_table(table, None)
        device.make(TableText(given.text, f"--concise {name}"))


def read_stdin() -> str:
    """Reads standard input to its end."""
    return os.fsdecode(sys.stdin.buffer.read())


def _minor(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or int(text) >= 1 << 20:
        raise VerbFailed(f"Invalid minor number '{text}'.", what=f"a whole number below {1 << 20}")
    return int(text)
