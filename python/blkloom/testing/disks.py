"""Disks that lose power, fail, are slow or full: context managers for tests of programs that store data.

    with power_cut("64M") as disk:
        ...  # write to disk.device
        for state in disk.states(20):
            ...  # recover state.device, and check it

A disk is made of the targets for tests (docs/targets.md), on memory or on a file. It is a device of this process, or,
with `client`, one of a supervisor, which can be exported and attached. Nothing is left of it after the block; a file
keeps its contents.

Random choices come from `seed`: the argument, or the environment variable BLKLOOM_SEED, or another one each time. An
exception that leaves the block gets a note with the seed.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Final, TypeVar

from blkloom import (
    Bytes,
    Client,
    Device,
    Sectors,
    Segment,
    Table,
    TargetSpec,
    UsageError,
    builtin_targets,
    format_table,
    parse_size,
    parse_table,
    to_sectors,
)
from blkloom import open as open_device
from blkloom.device.open_device import whole_file
from blkloom.targets.delay import Delay, DelayedRef
from blkloom.targets.device_ref import DeviceRef
from blkloom.targets.error import CERTAIN, OPERATIONS, Error, Range
from blkloom.targets.flakey import Features, Flakey
from blkloom.targets.full import Full
from blkloom.targets.linear import Linear
from blkloom.targets.ram import Ram
from blkloom.targets.throttle import Throttle
from blkloom.targets.torn import Torn
from blkloom.testing.disk_devices import DevicesOfProcess, DevicesOfSupervisor, DiskDevices
from blkloom.testing.seeds import VARIABLE, choose_seed
from blkloom.units import SECTOR, to_bytes

Lower = int | str | os.PathLike[str]
"""Lower device of a disk: a size (bytes, or text such as "64M") for new memory, or the `pathlib.Path` of a file."""

DEFAULT_SIZE: Final = "64M"
_D = TypeVar("_D", bound="Disk")
_OnDevice = Callable[[DeviceRef, Sectors], TargetSpec]
"""The target on a lower device of that size."""
_WRITES: Final = frozenset(OPERATIONS) - {"read"}


class Disk:
    """A disk for tests: a device on another one. name: of the device. size: bytes."""

    def __init__(self, devices: DiskDevices, name: str, lower: Lower) -> None:
        """Makes the lower device. Raises TableError, BackingError, UsageError."""
        self.name = name
        self._devices = devices
        self._below = f"{name}-below"
        if isinstance(lower, os.PathLike):
            table = whole_file(os.path.abspath(lower))
        else:
            size = _size(lower)
            if size <= 0 or size % SECTOR:
                cure = f"give a multiple of {SECTOR}; for a file, give a pathlib.Path"
                raise UsageError(f"a disk of {size} bytes", cure=cure)
            table = _table(Ram(), to_sectors(size))
        self.size: Final = to_bytes(table.length)
        devices.create(self._below, table)

    @property
    def device(self) -> Device:
        """The device. Raises UsageError if a supervisor has it."""
        return self._devices.device(self.name)

    @contextmanager
    def served(self) -> Iterator[str]:
        """The NBD URI of the disk inside of the block. Raises ListenError."""
        with self._devices.served(self.name) as uri:
            yield uri

    @property
    def status(self) -> str:
        """The status of the target, as `blkloom status` prints it."""
        return self._devices.status(self.name)

    def _make(self, spec: TargetSpec) -> None:
        self._devices.create(self.name, _table(spec, to_sectors(self.size)))

    def _replace(self, spec: TargetSpec) -> None:
        self._devices.replace(self.name, _table(spec, to_sectors(self.size)))

    def _message(self, *words: str) -> None:
        self._devices.message(self.name, list(words))

    @property
    def _ref(self) -> DeviceRef:
        return DeviceRef(f"blkloom:{self._below}", Sectors(0))


class State:
    """A state of a disk after a power cut: a copy, which may be changed. number: 1 for the first. path: of its file."""

    def __init__(self, number: int, path: Path) -> None:
        self.number = number
        self.path = path

    @cached_property
    def device(self) -> Device:
        """The copy as a device, until the next state. Raises BackingError, BusyError."""
        return open_device(whole_file(self.path, format="raw"))

    def close(self) -> None:
        """Closes the device, and removes the file."""
        if "device" in self.__dict__:
            self.device.close(flush=False)
        self.path.unlink(missing_ok=True)


class PowerCutDisk(Disk):
    """A disk that `power_cut` has made. seed: of the first state."""

    def __init__(self, devices: DiskDevices, name: str, lower: Lower, torn: _OnDevice) -> None:
        super().__init__(devices, name, lower)
        self._make(spec := torn(self._ref, to_sectors(self.size)))
        assert isinstance(spec, Torn)
        self.seed = spec.seed
        self.state: State | None = None
        """The state that `states` has yielded last, while it is there."""
        self._states = ExitStack()

    def cut(self, *, after: int | None = None) -> None:
        """The power fails: all I/O fails with EIO. after: only at the write after so many more, and not now; discards
        and write-zeroes count as writes.
        """
        self._message("cut", *(() if after is None else (str(after),)))

    def restore(self, seed: int | None = None) -> None:
        """The power is on again, and the disk has one of its possible states. Cuts it first if it was not cut. seed:
        chooses the state; None: that of the disk, or the next number at each further call.
        """
        self.cut()
        self._message("restore", *(() if seed is None else (str(seed),)))

    def states(self, number: int = 10) -> Iterator[State]:
        """Cuts the power, and yields different states that the disk may have then, as many as there are, but at most
        `number`. Each lasts until the next; `restore` is possible afterwards. Raises OSError if the copies do not fit
        into the directory for temporary files.
        """
        self.cut()
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="blk")))
            self._states.callback(stack.close)  # if the loop of the caller is left
            self._message("states", str(number), str(folder / "state"))
            for at in range(1, number + 1):
                if not (path := folder / f"state.{at}").exists():
                    return
                self.state = state = State(at, path)
                stack.callback(state.close)
                yield state
                state.close()
                self.state = None

    def close_states(self) -> None:
        """Removes the states of a loop that was left early."""
        self._states.close()


class FlakyDisk(Disk):
    """A disk that `flaky_disk` has made. seed: of the failures."""

    def __init__(
        self, devices: DiskDevices, name: str, lower: Lower, failing: _OnDevice, *, fails_at_once: bool, seed: int
    ) -> None:
        super().__init__(devices, name, lower)
        self.seed = seed
        self._failing, self._good = failing(self._ref, to_sectors(self.size)), Linear(self._ref)
        self._make(self._failing if fails_at_once else self._good)

    def start_failing(self) -> None:
        """From now on requests fail. The sequence of random failures starts again."""
        self._replace(self._failing)

    def stop_failing(self) -> None:
        """From now on no request fails."""
        self._replace(self._good)


class SlowDisk(Disk):
    """A disk that `slow_disk` has made."""

    def __init__(
        self, devices: DiskDevices, name: str, lower: Lower, delays: tuple[int, int, int], limits: dict[str, int | str]
    ) -> None:
        super().__init__(devices, name, lower)
        self._limited = f"{name}-limits"
        devices.create(self._limited, _table(Throttle(self._ref), to_sectors(self.size)))
        if limits:
            self.set_limits(**limits)
        self._make(self._delay(delays))

    def set_delays(self, read_ms: int = 0, write_ms: int | None = None, flush_ms: int | None = None) -> None:
        """Other delays, as for `slow_disk`. Requests that wait now wait again."""
        self._replace(self._delay(_delays(read_ms, write_ms, flush_ms)))

    def set_limits(self, **limits: int | str) -> None:
        """Other limits a second, in devices of all former ones: `iops`, `iops_rd`, `iops_wr` (operations), `bps`,
        `bps_rd`, `bps_wr` (bytes, or text such as "1M"); `burst` (ms). Requests that wait now keep their time. Raises
        UsageError.
        """
        self._devices.message(self._limited, ["set", *(f"{name}={value}" for name, value in limits.items())])

    def _delay(self, delays: tuple[int, int, int]) -> Delay:
        ref = DeviceRef(f"blkloom:{self._limited}", Sectors(0))
        return Delay(tuple(DelayedRef(ref, milliseconds) for milliseconds in delays))


class FullDisk(Disk):
    """A disk that `full_disk` has made."""

    def __init__(self, devices: DiskDevices, name: str, lower: Lower, space: Bytes) -> None:
        super().__init__(devices, name, lower)
        self._make(Full(self._ref, space))

    @property
    def used(self) -> int:
        """Bytes of the space that are used."""
        return int(self.status.split()[0])

    def set_space(self, space: int | str) -> None:
        """Another limit of the space, in bytes, or text such as "1M"."""
        self._message("set", str(space))


@contextmanager
def power_cut(
    lower: Lower = DEFAULT_SIZE,
    *,
    seed: int | None = None,
    memory: int | str = DEFAULT_SIZE,
    on_full: str = "wait",
    block: int = SECTOR,
    tear_inside: bool = False,
    client: Client | None = None,
    name: str = "disk",
) -> Iterator[PowerCutDisk]:
    """A disk that can lose power (target `torn`). Writes that no flush has covered may then be lost, each block alone.

    lower: a size for new memory, or the path of a file. memory: bytes of writes that are held until a flush. on_full:
    further writes "wait" for a flush, or "fail". block: bytes that are written whole or not at all; tear_inside: not
    even those are. client, name: the disk is a device of that supervisor. Raises TableError, BackingError, UsageError.
    """
    chosen, held = choose_seed(seed), _size(memory)

    def torn(ref: DeviceRef, _: Sectors) -> Torn:
        return Torn(ref, chosen, held, on_full, block, tear_inside)

    with _made(client, lambda devices: PowerCutDisk(devices, name, lower, torn)) as disk:
        try:
            with _noted("power_cut", disk):
                yield disk
        finally:
            disk.close_states()


@contextmanager
def flaky_disk(
    lower: Lower = DEFAULT_SIZE,
    *,
    probability: float = 0.01,
    operations: Iterable[str] = OPERATIONS,
    error: int = errno.EIO,
    up: int | None = None,
    down: int | None = None,
    failing: bool = True,
    seed: int | None = None,
    client: Client | None = None,
    name: str = "disk",
) -> Iterator[FlakyDisk]:
    """A disk whose requests fail: each with a probability (target `error`), or all for some seconds (target `flakey`).

    lower: a size for new memory, or the path of a file. operations: those that fail, of "read", "write", "discard",
    "write_zeroes", "flush". error: number of the error. up, down: seconds without failures and with them, in turn; then
    all operations fail, or only reads, or all but reads, and with EIO. failing: False: only after `start_failing`.
    client, name: the disk is a device of that supervisor. Raises TableError, BackingError, UsageError.
    """
    chosen, failed = choose_seed(seed), _operations(operations)
    if error not in errno.errorcode:
        raise UsageError(f"error: {error} is no error number", cure="give one of the module errno")
    billionths = _billionths(probability)

    def fails(ref: DeviceRef, length: Sectors) -> TargetSpec:
        if up is None and down is None:
            whole = (Range(Sectors(0), length),)  # without an option, flushes would not fail, as in the kernel
            return Error(ref, billionths, failed, error, whole, chosen)
        return Flakey(ref, up or 0, down or 0, _features(failed, error))

    with (
        _made(
            client, lambda devices: FlakyDisk(devices, name, lower, fails, fails_at_once=failing, seed=chosen)
        ) as disk,
        _noted("flaky_disk", disk),
    ):
        yield disk


@contextmanager
def slow_disk(
    lower: Lower = DEFAULT_SIZE,
    *,
    read_ms: int = 0,
    write_ms: int | None = None,
    flush_ms: int | None = None,
    client: Client | None = None,
    name: str = "disk",
    **limits: int | str,
) -> Iterator[SlowDisk]:
    """A disk whose requests wait for some milliseconds (target `delay`), and are limited (target `throttle`).

    lower: a size for new memory, or the path of a file. write_ms: None: as reads. flush_ms: None: as writes. limits:
    as for `SlowDisk.set_limits`. client, name: the disk is a device of that supervisor. Raises TableError,
    BackingError, UsageError.
    """
    delays = _delays(read_ms, write_ms, flush_ms)
    with _made(client, lambda devices: SlowDisk(devices, name, lower, delays, limits)) as disk:
        yield disk


@contextmanager
def full_disk(
    lower: Lower = DEFAULT_SIZE, *, space: int | str, client: Client | None = None, name: str = "disk"
) -> Iterator[FullDisk]:
    """A disk on which only `space` bytes can be written (target `full`). Further writes fail with ENOSPC.

    Space is used in blocks of 4096 bytes. Blocks that were written may be written again; discards free them. lower: a
    size for new memory, or the path of a file, whose former contents use no space. client, name: the disk is a device
    of that supervisor. Raises TableError, BackingError, UsageError.
    """
    with _made(client, lambda devices: FullDisk(devices, name, lower, _size(space))) as disk:
        yield disk


@contextmanager
def _made(client: Client | None, make: Callable[[DiskDevices], _D]) -> Iterator[_D]:
    """A disk inside of the block. Afterwards, or if it cannot be made, nothing is left."""
    devices = DevicesOfProcess() if client is None else DevicesOfSupervisor(client)
    try:
        yield make(devices)
    finally:
        devices.close()


@contextmanager
def _noted(what: str, disk: PowerCutDisk | FlakyDisk) -> Iterator[None]:
    """Adds the seed to an exception that leaves the block."""
    try:
        yield
    except BaseException as error:
        state = f", state {disk.state.number}" if isinstance(disk, PowerCutDisk) and disk.state else ""
        error.add_note(f"{what}: seed {disk.seed}{state}; to repeat: seed={disk.seed}, or {VARIABLE}={disk.seed}")
        raise


def _table(spec: TargetSpec, length: Sectors) -> Table:
    """A table of one segment. Raises TableError for arguments that the target does not take."""
    return parse_table(format_table(Table((Segment(Sectors(0), length, spec),))), targets=builtin_targets())


def _size(size: int | str) -> Bytes:
    """Bytes of a number or text. Raises UsageError."""
    try:
        return parse_size(size) if isinstance(size, str) else Bytes(size)
    except ValueError as error:
        raise UsageError(str(error), cure="for a file, give a pathlib.Path") from error


def _operations(given: Iterable[str]) -> tuple[str, ...]:
    names = set(given)
    if not names or not names <= set(OPERATIONS):
        raise UsageError(f"operations: {sorted(names)}", cure=f"give one or more of {', '.join(OPERATIONS)}")
    return tuple(name for name in OPERATIONS if name in names)


def _billionths(probability: float) -> int:
    if not 0 <= probability <= 1:
        raise UsageError(f"probability: {probability}", cure="give a number from 0 to 1")
    return round(probability * CERTAIN)


def _features(operations: tuple[str, ...], error: int) -> Features:
    """Of a flakey disk while it is down."""
    if error != errno.EIO:
        raise UsageError("error: a disk with `up` and `down` fails with EIO", cure="leave out `error`, or give neither")
    if operations == OPERATIONS:
        return Features()
    if operations == ("read",):
        return Features(error_reads=True)
    if set(operations) == _WRITES:
        return Features(error_writes=True)
    cure = f"give all, only read, or {', '.join(sorted(_WRITES))}"
    raise UsageError(f"operations: a disk with `up` and `down` cannot fail only {', '.join(operations)}", cure=cure)


def _delays(read_ms: int, write_ms: int | None, flush_ms: int | None) -> tuple[int, int, int]:
    write = read_ms if write_ms is None else write_ms
    return (read_ms, write, write if flush_ms is None else flush_ms)
