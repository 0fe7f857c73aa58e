"""The partitions of a loop device as devices of their own: `loop0p1` stands on a piece of `loop0`.

They are made when the device is set up with -P, looked at again with -c, and removed before it is. What is
on the device is read through the supervisor, so that nobody becomes its client for that.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from blkloom.cli.loop_options import LoopFailed
from blkloom.errors import BlkloomError, DeviceBusy, NoSuchDevice
from blkloom.partitions import Disk, Partition, PartitionTable, find_partitions
from blkloom.units import SECTOR

if TYPE_CHECKING:
    from blkloom.cli.session import Session
    from blkloom.control.states import DeviceInfo


def partition_name(whole: str, number: int) -> str:
    """As the kernel names them: a `p` behind a digit."""
    return f"{whole}{'p' if whole[-1:].isdigit() else ''}{number}"


def partitions_of(session: Session, whole: str) -> list[DeviceInfo]:
    """Devices that are partitions of `whole`, by number."""
    found = [info for info in session.client.info() if info.loop and info.loop.partition]
    mine = [info for info in found if info.deps == [f"blkloom:{whole}"]]
    return sorted(mine, key=lambda info: info.loop.partition if info.loop else 0)


def scan(session: Session, whole: DeviceInfo, block: int) -> PartitionTable:
    """The partition table of a live device. block: its logical block size. Raises what reading raises."""
    from blkloom.control.messages import MOST_READ

    def read(offset: int, length: int) -> bytes:
        pieces = []
        while length:
            piece = session.client.read(whole.name, offset, min(length, MOST_READ))
            pieces.append(piece)
            offset, length = offset + len(piece), length - len(piece)
        return b"".join(pieces)

    return find_partitions(Disk(whole.size, block, read))


def remove_partitions(session: Session, infos: list[DeviceInfo], *, deferred: bool) -> None:
    """Those of the highest number first. deferred: one in use goes when it is used no more, else DeviceBusy."""
    for info in reversed(infos):
        try:
            session.client.remove(info.name, deferred=deferred)
        except NoSuchDevice:
            continue


def update_partitions(session: Session, whole: DeviceInfo, block: int) -> list[str]:
    """Makes the devices of `whole` those of its partition table; those that are right stay as they are,
    with their clients. What the table's warnings are. Raises LoopFailed for one that is in use and should
    be another.
    """
    table = scan(session, whole, block)
    wanted = {partition.number: partition for partition in table.partitions}
    there = partitions_of(session, whole.name)
    stale = [info for info in there if not _is(session, info, wanted, whole.name)]
    remove_unused(session, whole.name, stale)
    kept = {info.loop.partition for info in there if info.loop and info not in stale}
    for partition in table.partitions:
        if partition.number not in kept:
            _make(session, whole, partition)
    return table.warnings


def remove_unused(session: Session, whole: str, infos: list[DeviceInfo]) -> None:
    """All or none. Raises LoopFailed for one in use."""
    busy = [info.name for info in infos if info.open_count]
    if busy:
        raise reread_failed(whole, DeviceBusy(f"in use: {', '.join(busy)}", cure="end that first"))
    try:
        remove_partitions(session, infos, deferred=False)
    except DeviceBusy as error:  # since a moment ago
        raise reread_failed(whole, error) from error


def reread_failed(name: str, error: BlkloomError) -> LoopFailed:
    """How losetup tells of partitions that could not be made what they should be."""
    why = os.strerror(error.errno) if error.errno else error.what
    return LoopFailed(f"{name}: failed to reread partitions: {why}", what=str(error))


def beyond(session: Session, whole: str, sectors: int) -> list[DeviceInfo]:
    """Partitions that reach behind that end."""
    found = []
    for info in partitions_of(session, whole):
        _, _, _, _, start = session.client.table(info.name).split()[:5]
        if int(start) + info.size // SECTOR > sectors:
            found.append(info)
    return found


def _text(whole: str, partition: Partition) -> str:
    from blkloom.errors import Place
    from blkloom.table.words import join_words

    return f"0 {partition.length} linear {join_words([f'blkloom:{whole}', str(partition.start)], Place())}"


def _is(session: Session, info: DeviceInfo, wanted: dict[int, Partition], whole: str) -> bool:
    partition = wanted.get(info.loop.partition) if info.loop else None
    return partition is not None and session.client.table(info.name) == _text(whole, partition)


def _make(session: Session, whole: DeviceInfo, partition: Partition) -> None:
    from blkloom.control.states import LoopNotes

    try:
        session.client.create(
            partition_name(whole.name, partition.number),
            table=_text(whole.name, partition),
            source=f"partition {partition.number} of {whole.name}",
            read_only=whole.read_only,
            loop=LoopNotes(partition=partition.number),
        )
    except BlkloomError as error:
        raise reread_failed(whole.name, error) from error
