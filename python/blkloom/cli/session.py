"""One command of dmsetup's kind: its supervisor, and the devices its words name."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import click

from blkloom.dm.failing import IoctlFailed, NotACommandLine, VerbFailed, as_ioctl
from blkloom.dm.names import (
    DeviceNameError,
    MangleError,
    Mangling,
    ReservedNameError,
    check_name,
    check_new_name,
    check_uuid,
    mangle,
    read_name,
    show_name,
    unmangle,
)

if TYPE_CHECKING:
    from blkloom.control.client import Client
    from blkloom.control.messages import DeviceKey
    from blkloom.control.states import DeviceInfo
    from blkloom.dm.fields import Row

RUN_DIR: Final = "blkloom.run_dir"
"""Where the group leaves --run-dir for the verbs (in click's meta)."""
NAMING: Final = "blkloom.naming"
"""Where a verb's options that name devices are (`dm_verb`)."""


class Named(NamedTuple):
    """A device as a command line names it. wire: for the client; the others: for dmsetup's error lines."""

    wire: DeviceKey
    name: str = ""
    uuid: str = ""
    numbers: str = ""


class Session:
    """What a verb works with."""

    def __init__(self, context: click.Context) -> None:
        given: dict[str, Any] = context.meta.get(NAMING, {})
        self.run_dir: str | None = context.meta.get(RUN_DIR)
        self.verbose: int = given.get("verbose", 0)
        self.uuid: str | None = given.get("uuid")
        self.numbers: tuple[int, int] | None = given.get("numbers")
        self.select: str | None = given.get("select")
        self.mangling: Mangling = given.get("manglename", Mangling.AUTO)
        self._context = context
        self._started = False

    def start(self) -> Client:
        """The client of a command that makes something: starts the supervisor if there is none."""
        from blkloom.cli.connecting import connect

        if not self._started:
            self.client = self._context.find_root().with_resource(connect(self.run_dir))
            self._started = True
        return self.client

    @cached_property
    def client(self) -> Client:
        """Connected, if there is a supervisor or it left devices; else there are none."""
        from blkloom.cli.connecting import look  # msgspec and the channel are not needed for help

        return self._context.find_root().with_resource(look(self.run_dir))

    def ioctl(self, named: Named, task: str) -> AbstractContextManager[None]:
        """Errors in the block, but not of reaching the supervisor, are told as dmsetup tells of this ioctl."""
        _ = self.client  # reached before the block begins
        return as_ioctl(task, name=mangle(named.name), uuid=mangle(named.uuid), numbers=named.numbers)

    @property
    def elsewhere(self) -> bool:
        """Whether -u or -j -m name the device."""
        return self.uuid is not None or self.numbers is not None

    def show(self, name: str) -> str:
        """A name as --manglename has it."""
        return show_name(name, self.mangling)

    def named(self, text: str | None) -> Named:
        """The device that `text`, or -u, or -j and -m name. Raises VerbFailed."""
        if text is not None:
            if self.elsewhere:
                raise NotACommandLine(
                    f"{text!r} names a device, and so do -u, or -j and -m.", what="name it in one way"
                )
            name = self.from_path(text) if "/" in text else self.name(text)
            return Named(name, name=name)
        if self.uuid is not None:
            uuid = self.new_uuid(self.uuid)
            return Named(_selector(uuid=uuid), uuid=uuid)
        if self.numbers is not None:
            major, minor = self.numbers
            return Named(_selector(minor=minor), numbers=f"({major}:{minor})" if major else "")
        raise VerbFailed("No device specified.")

    def name(self, text: str) -> str:
        """The real name that a word means. Raises VerbFailed with dmsetup's text."""
        return self.checked(lambda: check_name(read_name(text, self.mangling)), text)

    def new_name(self, text: str, task: str, *, what: str = "name") -> str:
        """The same for a name that a device is to get. task: the ioctl that would refuse a reserved one."""
        try:
            return self.checked(
                lambda: check_new_name(read_name(text, self.mangling, what=what), what=what), text, what
            )
        except ReservedNameError as error:
            raise IoctlFailed(task, errno.EINVAL, name=text, what=str(error)) from error

    def new_uuid(self, text: str) -> str:
        """The same for a uuid."""
        return self.checked(lambda: check_uuid(read_name(text, self.mangling, what="UUID")), text, "UUID")

    def from_path(self, path: str) -> str:
        """The name of the device whose socket, or whose node of dmsetup's, a path is. Raises VerbFailed."""
        from blkloom.cli.connecting import directory

        folder, _, last = path.rpartition("/")
        here = directory(self.run_dir).devices
        if folder in ("/dev/mapper", "mapper") or os.path.realpath(folder or "/") == os.path.realpath(here):
            return unmangle(last)
        raise VerbFailed(f"Device {path} not found", what=f"sockets of devices are in {here}")

    def checked(self, read: Callable[[], str], text: str, what: str = "name") -> str:
        """What `read` makes of `text`; a DeviceNameError, but for a reserved name, becomes dmsetup's lines."""
        try:
            return read()
        except ReservedNameError:
            raise
        except MangleError as error:
            failed = {
                "name": f'Failed to mangle device name "{text}".',
                "new name": f'Failed to mangle new device name "{text}"',
                "UUID": f'Failed to mangle device uuid "{text}".',
            }
            raise VerbFailed(error.what, failed[what], what=error.cure) from error
        except DeviceNameError as error:
            raise VerbFailed(error.what, what=error.cure) from error

    def each(self, operands: Sequence[str]) -> Iterator[Named]:
        """The devices a verb is for, one after the other: the words, or -u or -j -m, or what -S selects."""
        if self.select is not None:
            yield from (Named(info.name, name=info.name) for info in self.selected(operands))
        elif operands:
            yield from map(self.named, operands)
        else:
            yield self.named(None)

    def several(self, operands: Sequence[str]) -> bool:
        """Whether a verb that looks is for more devices than one: its lines begin with their names."""
        return self.select is not None or len(operands) > 1 or not (operands or self.elsewhere)

    def found(self, operands: Sequence[str], task: str = "") -> Iterator[DeviceInfo]:
        """The devices a verb that looks is for (without words: all, by name); says so if there are none.

        Raises VerbFailed, at its turn, for one that does not exist. task: the ioctl that says so.
        """
        if self.select is not None:
            yield from self.selected(operands)
        elif operands:
            yield from (self.info(self.named(text), task) for text in operands)
        elif self.elsewhere:
            yield self.info(self.named(None), task)
        elif infos := self.everything():
            yield from infos
        else:
            click.echo("No devices found")

    def selected(self, operands: Sequence[str]) -> list[DeviceInfo]:
        """Those of the named devices (of all) that -S selects."""
        from blkloom.dm.selecting import parse_selection

        selection = parse_selection(self.select or "")
        if operands or self.elsewhere:
            infos = [self.info(self.named(text)) for text in operands or (None,)]
        else:
            infos = self.everything()
        return [row.info for row in self.rows(infos) if selection(row)]

    def rows(self, infos: Sequence[DeviceInfo]) -> list[Row]:
        """Devices as reports see them."""
        from blkloom.dm.fields import Row

        others = {info.name: info for info in self.everything()}
        return [Row(info, others=others, shown=self.show(info.name)) for info in infos]

    def everything(self) -> list[DeviceInfo]:
        """All devices by name, as the kernel lists them."""
        return sorted(self.client.info(), key=lambda info: mangle(info.name))

    def info(self, named: Named, task: str = "") -> DeviceInfo:
        """One device. Raises VerbFailed: with the ioctl's line where task is given."""
        try:
            with self.ioctl(named, task or "info"):
                (info,) = self.client.info(named.wire)
        except IoctlFailed as error:
            if task or error.errno != errno.ENXIO:
                raise
            raise VerbFailed("Device does not exist.") from error
        return info

    def tell(self, named: Named) -> None:
        """With -v: the device's state after what was done to it."""
        if self.verbose:
            from blkloom.dm.showing import info_lines

            info = self.info(named)
            click.echo("\n".join(info_lines(info, self.show(info.name))))


def _selector(*, uuid: str = "", minor: int | None = None) -> DeviceKey:
    from blkloom.control.messages import Selector  # msgspec is not needed for help

    return Selector(uuid=uuid, minor=minor)
