"""`blkloom partitions`: prints the partitions of a live device, and makes them devices or nodes."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, NamedTuple

import click

from blkloom.cli.dm_verb import ONE, verb
from blkloom.cli.session import Session
from blkloom.dm.failing import NoReport, NotACommandLine
from blkloom.errors import BlkloomError, UsageError

if TYPE_CHECKING:
    from blkloom.control.states import DeviceInfo
    from blkloom.partitions import Partition

partscan_option = click.option(
    "-P",
    "--partscan",
    is_flag=True,
    help="The partitions, too: nodes of the kernel, or devices if the node is no block device.",
)


class _Row(NamedTuple):
    """A partition, and where its data can be read. scheme: of the partition table. device: name of its partition
    device. node: path of its node.
    """

    partition: Partition
    scheme: str
    device: str
    node: str


_COLUMNS: Final[dict[str, tuple[str, Callable[[_Row], int | str], str]]] = {
    "nr": ("NR", lambda row: row.partition.number, "number"),
    "start": ("START", lambda row: row.partition.start, "first sector (of 512 bytes)"),
    "end": ("END", lambda row: row.partition.start + row.partition.length - 1, "last sector"),
    "sectors": ("SECTORS", lambda row: row.partition.length, "number of sectors"),
    "size": ("SIZE", lambda row: row.partition.length * 512, "bytes"),
    "type": ("TYPE", lambda row: row.partition.type, "GUID, or number in an MBR"),
    "name": ("NAME", lambda row: row.partition.name, "name in a GPT"),
    "uuid": ("UUID", lambda row: row.partition.uuid, "PARTUUID"),
    "scheme": ("SCHEME", lambda row: row.scheme, "gpt or dos"),
    "device": ("DEVICE", lambda row: row.device, "partition device"),
    "node": ("NODE", lambda row: row.node, "node"),
}
"""Heading, value and description of each column."""
_DEFAULT: Final = "nr,start,end,sectors,size,type,name,uuid,device,node"
_RIGHT: Final = frozenset({"nr", "start", "end", "sectors", "size"})


@verb("DEVICE", most=1, selectors=ONE)
@click.option("-o", "--options", metavar="COLUMNS", help="Columns to print; +COLUMNS adds columns; `help` lists them.")
@click.option("--noheadings", is_flag=True, help="No headings.")
@click.option("--json", "as_json", is_flag=True, help="Print all columns as JSON.")
@click.option("--add", is_flag=True, help="Make nodes or devices of the partitions, and update those that there are.")
@click.option("--update", is_flag=True, help="Update the nodes and devices that there are to the partition table.")
@click.option("--remove", is_flag=True, help="Remove nodes and devices of the partitions.")
@click.option("--devices", is_flag=True, help="With --add: make devices even if the node is a block device.")
def partitions(
    session: Session,
    operands: tuple[str, ...],
    options: str | None,
    noheadings: bool,
    as_json: bool,
    add: bool,
    update: bool,
    remove: bool,
    devices: bool,
) -> None:
    """Print the partitions of a device, or make them nodes or devices.

    \b
    blkloom partitions disk
    blkloom partitions disk --json
    blkloom partitions disk --add                 # /dev/ublkb0p1, or devices disk1, disk2, ...
    blkloom partitions disk --update              # after a change of the partition table
    blkloom partitions disk --remove

    The partition table is read through the device. If its node is a block device, --add makes nodes of the
    partitions in the kernel. Otherwise each partition is a device: of its own NBD socket, and with a file as
    its node, if that of the disk is a file.
    """
    if options in ("help", "?"):
        click.echo("\n".join(f"{name:10}{column[2]}" for name, column in _COLUMNS.items()))
        return
    columns = _chosen(options)
    if add + update + remove > 1:
        raise NotACommandLine("Only one of --add, --update and --remove permitted.")
    if devices and not add:
        raise NotACommandLine("--devices goes with --add.")
    whole = session.info(session.named(operands[0] if operands else None))
    if add:
        add_partitions(session, whole, devices=devices)
    elif update:
        _update(session, whole)
    elif remove:
        _remove(session, whole)
    else:
        _show(session, whole, columns, headings=not noheadings, as_json=as_json)


def add_partitions(session: Session, whole: DeviceInfo, *, devices: bool = False) -> None:
    """Makes nodes or devices of the partitions; prints warnings. devices: make devices also of a block device."""
    from blkloom.cli.partition_devices import update_partitions

    if _is_block_device(whole):
        _warn(whole, session.client.scan_partitions(whole.name))
    if devices or not _is_block_device(whole):
        _warn(whole, update_partitions(session, whole, whole.block_size))
    elif _has_devices(session, whole):
        update_partitions(session, whole, whole.block_size)


def _update(session: Session, whole: DeviceInfo) -> None:
    from blkloom.cli.partition_devices import update_partitions

    if _has_devices(session, whole):
        _warn(whole, update_partitions(session, whole, whole.block_size))
    if whole.node is not None and whole.node.partitions:
        _warn(whole, session.client.scan_partitions(whole.name))


def _remove(session: Session, whole: DeviceInfo) -> None:
    from blkloom.cli.partition_devices import partitions_of, remove_unused

    remove_unused(session, partitions_of(session, whole.name))
    if _is_block_device(whole):
        session.client.scan_partitions(whole.name, remove=True)


def _is_block_device(whole: DeviceInfo) -> bool:
    from blkloom.attach.registry import way

    return whole.node is not None and way(whole.node.via).is_block_device


def _has_devices(session: Session, whole: DeviceInfo) -> bool:
    from blkloom.cli.partition_devices import partitions_of

    return bool(partitions_of(session, whole.name))


def _warn(whole: DeviceInfo, warnings: list[str]) -> None:
    for warning in warnings:
        click.echo(f"blkloom: {whole.name}: {warning}", err=True)


def _chosen(given: str | None) -> list[str]:
    text = given or _DEFAULT
    names = [name.strip().lower() for name in (f"{_DEFAULT},{text[1:]}" if text.startswith("+") else text).split(",")]
    for name in names:
        if name not in _COLUMNS:
            raise NoReport(f"Unrecognised field: {name}", what=f"there are: {', '.join(_COLUMNS)}")
    return names


def _show(session: Session, whole: DeviceInfo, columns: list[str], *, headings: bool, as_json: bool) -> None:
    from blkloom.cli.partition_devices import scan
    from blkloom.printing import printable

    if not whole.live:
        raise UsageError(f"device '{whole.name}' has no table", cure=f"blkloom load {whole.name}, then resume")
    table = scan(session, whole, whole.block_size)
    rows = _rows(session, whole, table.partitions, table.kind)
    if as_json:
        found = [{name: column[1](row) for name, column in _COLUMNS.items()} for row in rows]
        click.echo(json.dumps({"device": whole.name, "scheme": table.kind, "partitions": found}, indent=2))
    else:
        lines = [[printable(str(_COLUMNS[name][1](row))) for name in columns] for row in rows]
        if headings and rows:
            lines.insert(0, [_COLUMNS[name][0] for name in columns])
        widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
        for line in lines:
            cells = [
                cell.rjust(width) if name in _RIGHT else cell.ljust(width)
                for name, cell, width in zip(columns, line, widths, strict=True)
            ]
            click.echo(" ".join(cells).rstrip())
    _warn(whole, table.warnings)


def _rows(session: Session, whole: DeviceInfo, found: list[Partition], scheme: str) -> list[_Row]:
    from blkloom.attach.kernel_partitions import kernel_partitions
    from blkloom.cli.partition_devices import partitions_of, start_of

    devices = {(start_of(session, info), info.size // 512): info for info in partitions_of(session, whole.name)}
    in_kernel = {}
    if whole.node is not None and _is_block_device(whole):
        in_kernel = {(start, length): path for path, start, length in kernel_partitions(whole.node.path).values()}
    rows = []
    for partition in found:
        place = (partition.start, partition.length)
        device = devices.get(place)
        node = in_kernel.get(place) or (device.node.path if device and device.node else "")
        rows.append(_Row(partition, scheme, device.name if device else "", node))
    return rows


def add_to_new(session: Session, name: str) -> None:
    """The partitions of a device that was just made; removes the device if that fails."""
    (whole,) = session.client.info(name)
    try:
        add_partitions(session, whole)
    except (BlkloomError, OSError):
        session.client.remove(name, force=True)
        raise
