"""Partitions of the devices of `blkloom serve -P`: a device for each, opened after its disk."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

import click

from blkloom import _engine
from blkloom.cli.partition_devices import partition_name
from blkloom.device.device import Device
from blkloom.errors import UsageError
from blkloom.partitions import Disk, Partition, find_partitions
from blkloom.table import parse_table
from blkloom.targets.registry import all_targets

if TYPE_CHECKING:
    from blkloom.cli.devices import Served


def open_partitions(served: Served, stack: ExitStack, engine: _engine.Engine, *, fault_timeout: float) -> None:
    """Adds a device for each partition to `served`. stack: closes them. Prints warnings. Raises UsageError if another
    device has the name of a partition.
    """
    for name, device in list(served.devices.items()):
        for partition in _partitions(name, device):
            part = partition_name(name, partition.number) if name else f"p{partition.number}"
            if part in served.devices:
                what = f"partition {partition.number} of '{name}' would have the name of another device, '{part}'"
                raise UsageError(what, cure="name that one with --device NAME=TABLE")
            table = f"0 {partition.length} linear blkloom:disk {partition.start}"
            served.devices[part] = stack.enter_context(
                Device(
                    parse_table(table, targets=all_targets(), source=f"partition {part}"),
                    engine=engine,
                    name=part,
                    read_only=device.read_only,
                    fault_timeout=fault_timeout,
                    devices={"disk": device},
                )
            )
            served.partitions[part] = (name, partition.number)


def _partitions(name: str, device: Device) -> list[Partition]:
    """The partitions of a live device; prints warnings."""
    table = find_partitions(Disk(device.size, device.limits.logical, lambda at, length: device.pread(length, at)))
    for warning in table.warnings:
        click.echo(f"blkloom: {name or 'the disk'}: {warning}", err=True)
    return table.partitions
