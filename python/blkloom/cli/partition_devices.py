"""Partition devices: `disk1` is a linear device on a part of `disk`, for NBD clients and FUSE files.

The partition table is read through the supervisor, so that this command does not count as a client of the device. If
the node of the disk is a file, each partition device has a file as its node, too.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from blkloom.errors import DeviceBusy, NoSuchDevice, Place
from blkloom.partitions import Disk, Partition, PartitionTable, find_partitions
from blkloom.table.words import join_words
from blkloom.units import SECTOR

if TYPE_CHECKING:
    from blkloom.cli.session import Session
    from blkloom.control.states import DeviceInfo


def partition_name(whole: str, number: int) -> str:
    """Name of a partition as in the kernel: `p` after a digit."""
    return f"{whole}{'p' if whole[-1:].isdigit() else ''}{number}"


def partitions_of(session: Session, whole: str) -> list[DeviceInfo]:
    """The partition devices of `whole`, by number."""
    found = [info for info in session.client.info() if info.loop and info.loop.partition]
    mine = [info for info in found if info.deps == [f"blkloom:{whole}"]]
    return sorted(mine, key=lambda info: info.loop.partition if info.loop else 0)


def scan(session: Session, whole: DeviceInfo, block: int) -> PartitionTable:
    """Reads the partition table of a live device. block: its logical block size. Raises the errors of the read."""
    from blkloom.control.messages import MOST_READ

    def read(offset: int, length: int) -> bytes:
        pieces = []
        while length:
            piece = session.client.read(whole.name, offset, min(length, MOST_READ))
            pieces.append(piece)
            offset, length = offset + len(piece), length - len(piece)
        return b"".join(pieces)

    return find_partitions(Disk(whole.size, block, read))


def update_partitions(session: Session, whole: DeviceInfo, block: int) -> list[str]:
    """Updates the partition devices of `whole` to its partition table. Correct ones stay, with their clients. Returns
    the warnings about the table. Raises DeviceBusy, and changes nothing, if a partition that must change is in use.
    """
    table = scan(session, whole, block)
    wanted = {partition.number: partition for partition in table.partitions}
    there = partitions_of(session, whole.name)
    stale = [info for info in there if not _is(session, info, wanted, whole.name)]
    remove_unused(session, stale)
    kept = {info.loop.partition for info in there if info.loop and info not in stale}
    for partition in table.partitions:
        if partition.number not in kept:
            _make(session, whole, partition)
    if whole.node is not None and whole.node.via == "fuse":
        for info in partitions_of(session, whole.name):
            if info.node is None:
                session.client.attach(info.name, via="fuse", read_only=whole.node.read_only)
    return table.warnings


def remove_unused(session: Session, infos: list[DeviceInfo]) -> None:
    """Removes all of them, the highest number first, or none. Raises DeviceBusy if one is in use."""
    if busy := [info.name for info in infos if info.open_count]:
        raise DeviceBusy(f"in use: {', '.join(busy)}", cure="end that first")
    remove_partitions(session, infos, deferred=False)


def remove_partitions(session: Session, infos: list[DeviceInfo], *, deferred: bool) -> None:
    """Removes the partitions, the highest number first. deferred: a partition in use is removed after its last use;
    without it, raises DeviceBusy.
    """
    for info in reversed(infos):
        with suppress(NoSuchDevice):
            session.client.remove(info.name, deferred=deferred)


def detach_partitions(session: Session, whole: str, *, lazy: bool, force: bool) -> None:
    """Detaches the partition devices that have files as nodes, because their disk is detached. Raises DeviceBusy."""
    for info in reversed(partitions_of(session, whole)):
        if info.node is not None and info.node.via == "fuse":
            session.client.detach(info.name, lazy=lazy, force=force)


def beyond(session: Session, whole: str, sectors: int) -> list[DeviceInfo]:
    """Partitions that extend beyond this end."""
    found = []
    for info in partitions_of(session, whole):
        if start_of(session, info) + info.size // SECTOR > sectors:
            found.append(info)
    return found


def start_of(session: Session, partition: DeviceInfo) -> int:
    """The first sector of a partition device on its disk."""
    return int(session.client.table(partition.name).split()[4])


def _text(whole: str, partition: Partition) -> str:
    return f"0 {partition.length} linear {join_words([f'blkloom:{whole}', str(partition.start)], Place())}"


def _is(session: Session, info: DeviceInfo, wanted: dict[int, Partition], whole: str) -> bool:
    partition = wanted.get(info.loop.partition) if info.loop else None
    return partition is not None and session.client.table(info.name) == _text(whole, partition)


def _make(session: Session, whole: DeviceInfo, partition: Partition) -> None:
    from blkloom.control.states import LoopNotes

    session.client.create(
        partition_name(whole.name, partition.number),
        table=_text(whole.name, partition),
        source=f"partition {partition.number} of {whole.name}",
        read_only=whole.read_only,
        loop=LoopNotes(partition=partition.number),
    )
