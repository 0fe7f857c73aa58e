"""Reads the devices of a `serve` command line, and opens all of them or none."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import msgspec

from blkloom import _engine
from blkloom.device.device import Device
from blkloom.device.open_device import whole_file
from blkloom.errors import BackingError, Place, TableError, UsageError
from blkloom.table import Segment, Table, parse_concise, parse_table
from blkloom.targets.ram import Ram
from blkloom.targets.registry import Targets, all_targets
from blkloom.units import SECTOR, Bytes, Sectors, to_sectors


class DeviceRequest(msgspec.Struct, frozen=True):
    """A device to open: its name, which is also the name of the export, and its table."""

    name: str
    table: Table
    read_only: bool = False


def requested(
    files: Sequence[str],
    table: str | None,
    source: str,
    table_file: str | None,
    ram: Bytes | None,
    named: Sequence[str],
    concise: str | None,
    *,
    image_format: str = "auto",
    allow_backing: Sequence[str] = (),
) -> list[DeviceRequest]:
    """The devices of the command line, in the order to open them. A single FILE, --table or --ram gets the name "".
    image_format, allow_backing: for the files, as in `whole_file`.

    Raises TableError, BackingError, UsageError.
    """
    targets = all_targets()
    single = [text for text in (table, table_file, ram) if text is not None]
    if len(single) + bool(files) > 1:
        raise UsageError("FILE, --table, --table-file and --ram exclude each other", cure="add devices with --device")
    found = []
    if table is not None:
        found.append(DeviceRequest("", parse_table(table, targets=targets, source=source)))
    elif table_file is not None:
        found.append(DeviceRequest("", parse_table(_text_of(table_file), targets=targets, source=table_file)))
    elif ram is not None:
        found.append(DeviceRequest("", _ram(ram)))
    else:
        for file in files:
            whole = whole_file(file, format=image_format, allow_backing=allow_backing)
            found.append(DeviceRequest(Path(file).name if len(files) > 1 else "", whole))
    found += [_named(text, targets) for text in named]
    if concise is not None:
        devices = parse_concise(concise, targets=targets, source="--concise")
        found += [DeviceRequest(device.name, device.table, device.read_only) for device in devices]
    if not found:
        raise UsageError("nothing to serve", cure="name a FILE, or give --table, --ram or --device")
    names = [device.name for device in found]
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError:
            what = f"{name} cannot be the name of an export: it is not UTF-8"
            raise UsageError(what, cure="choose one: --device NAME='0 SECTORS loop FILE'") from None
    if double := {name for name in names if names.count(name) > 1}:
        raise UsageError(f"two devices are called '{sorted(double)[0]}'", cure="name them with --device NAME=TABLE")
    return found


def _text_of(path: str) -> str:
    try:
        return os.fsdecode(Path(path).read_bytes())
    except OSError as error:
        raise BackingError(error.strerror or "cannot be read", path=path, errno=error.errno or 5) from error


def _ram(size: Bytes) -> Table:
    if size < SECTOR or size % SECTOR:
        raise UsageError(f"--ram {size}: must be a multiple of {SECTOR} bytes, and not 0")
    return Table((Segment(Sectors(0), to_sectors(size), Ram(), Place("--ram")),))


def _named(text: str, targets: Targets) -> DeviceRequest:
    name, equals, table = text.partition("=")
    if not equals or not name:
        raise UsageError(f"--device '{text}' is not NAME=TABLE", cure="as in --device disk='0 2048 zero'")
    return DeviceRequest(name, parse_table(table, targets=targets, source=f"--device {name}"))


class Served(msgspec.Struct, frozen=True):
    """Open devices, by name. partitions: for each device that is a partition of another one, the name of that and the
    number.
    """

    devices: dict[str, Device] = {}
    partitions: dict[str, tuple[str, int]] = {}


@contextmanager
def open_devices(
    requests: Sequence[DeviceRequest],
    *,
    engine: _engine.Engine,
    read_only: bool,
    direct_io: bool,
    shared: bool,
    fault_timeout: float,
    partscan: bool = False,
) -> Iterator[Served]:
    """Opens the devices in order; a table may refer to earlier devices. Closes them in reverse order: drains and
    flushes each of them, and raises an error of a flush after all are closed. partscan: also opens a device for each
    partition.
    """
    with ExitStack() as stack:
        served = Served()
        opened = served.devices
        for request in requests:
            try:
                device = Device(
                    request.table,
                    engine=engine,
                    name=request.name,
                    read_only=read_only or request.read_only,
                    direct_io=direct_io,
                    shared=shared,
                    fault_timeout=fault_timeout,
                    devices=opened,
                )
            except TableError as error:
                if error.place.source == "table":
                    error.place = Place(f"--device {request.name}", error.place.line, error.place.column)
                raise
            opened[request.name] = stack.enter_context(device)
        if partscan:
            from blkloom.cli.served_partitions import open_partitions  # imported only for that

            open_partitions(served, stack, engine, fault_timeout=fault_timeout)
        yield served
