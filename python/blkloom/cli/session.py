"""Session of one dmsetup-style command: its connection to the supervisor, and its devices."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import click

from blkloom.device_names import (
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
from blkloom.dm.failing import IoctlFailed, NotACommandLine, VerbFailed, as_ioctl

if TYPE_CHECKING:
    from blkloom.control.client import Client
    from blkloom.control.messages import DeviceKey
    from blkloom.control.states import DeviceInfo
    from blkloom.dm.fields import Row

RUN_DIR: Final = "blkloom.run_dir"
"""Key of --run-dir in click's meta, from the group to the verbs."""
_MOST_LINKS: Final = 8
NAMING: Final = "blkloom.naming"
"""Key of the selector options of a verb (`dm_verb`)."""


class Named(NamedTuple):
    """A device selector from the command line. wire: for the client. The other fields: for dmsetup's error lines."""

    wire: DeviceKey
    name: str = ""
    uuid: str = ""
    numbers: str = ""


class Session:
    """Connection, selectors and output forms of one command."""

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
        """The client of a command that makes devices: starts a supervisor if none runs."""
        from blkloom.cli.connecting import connect

        if not self._started:
            self.client = self._context.find_root().with_resource(connect(self.run_dir))
            self._started = True
        return self.client

    @cached_property
    def client(self) -> Client:
        """A client of the supervisor, if one runs or a former one has left devices; else a client without devices."""
        from blkloom.cli.connecting import look  # msgspec and the channel are not needed for help

        return self._context.find_root().with_resource(look(self.run_dir))

    def ioctl(self, named: Named, task: str) -> AbstractContextManager[None]:
        """Turns errors in the block into dmsetup's error for this ioctl. Errors of connecting are left as they are."""
        _ = self.client  # connected before the block begins
        return as_ioctl(task, name=mangle(named.name), uuid=mangle(named.uuid), numbers=named.numbers)

    @property
    def elsewhere(self) -> bool:
        """Whether -u or -j -m select the device."""
        return self.uuid is not None or self.numbers is not None

    def show(self, name: str) -> str:
        """A name in the form of --manglename."""
        return show_name(name, self.mangling)

    def named(self, text: str | None) -> Named:
        """The device that `text`, -u, or -j and -m select. Raises VerbFailed."""
        if text is not None:
            if self.elsewhere:
                raise NotACommandLine(
                    f"'{text}' names a device, and so do -u, or -j and -m.", what="name it in one way"
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
        """The real name for an argument. Raises VerbFailed with dmsetup's text."""
        return self.checked(lambda: check_name(read_name(text, self.mangling)), text)

    def new_name(self, text: str, task: str, *, what: str = "name") -> str:
        """The same for a new name of a device. task: the ioctl that refuses a reserved name."""
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
        """The name of the device for a path: its socket or node, or its node in dmsetup's form. Raises VerbFailed."""
        from blkloom.cli.connecting import directory

        folder, _, last = path.rpartition("/")
        here = directory(self.run_dir).devices
        if folder in ("/dev/mapper", "mapper") or os.path.realpath(folder or "/") == os.path.realpath(here):
            return unmangle(last)
        if (name := self.at_node(path)) is not None:
            return name
        what = f"sockets of devices are in {here}, and nodes are where `blkloom info -c -o name,node` says"
        raise VerbFailed(f"Device {path} not found", what=what)

    def at_node(self, path: str) -> str | None:
        """The name of the device whose node, stable name or file this path is."""
        names: dict[str, str] = {}
        for info in self.client.info():
            places = [info.node.path, info.node.link] if info.node is not None else []
            names |= dict.fromkeys([*places, *(export.path for export in info.exports if export.path)], info.name)
        return next((names[place] for place in _ways_to(path) if place in names), None)

    def checked(self, read: Callable[[], str], text: str, what: str = "name") -> str:
        """Calls `read` on `text`. A DeviceNameError becomes dmsetup's lines, except for a reserved name."""
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
        """The devices of a verb, one by one: its operands, or those that -u, -j -m or -S select."""
        if self.select is not None:
            yield from (Named(info.name, name=info.name) for info in self.selected(operands))
        elif operands:
            yield from map(self.named, operands)
        else:
            yield self.named(None)

    def several(self, operands: Sequence[str]) -> bool:
        """Whether a query is for several devices: its lines then begin with their names."""
        return self.select is not None or len(operands) > 1 or not (operands or self.elsewhere)

    def found(self, operands: Sequence[str], task: str = "") -> Iterator[DeviceInfo]:
        """The devices of a query (without operands: all, by name). Prints a message if there are none.

        Raises VerbFailed when it reaches a device that does not exist. task: the ioctl of that error.
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
        """The named devices (or all) that -S selects."""
        from blkloom.dm.selecting import parse_selection

        selection = parse_selection(self.select or "")
        if operands or self.elsewhere:
            infos = [self.info(self.named(text)) for text in operands or (None,)]
        else:
            infos = self.everything()
        return [row.info for row in self.rows(infos) if selection(row)]

    def rows(self, infos: Sequence[DeviceInfo]) -> list[Row]:
        """Devices as input of a report."""
        from blkloom.dm.fields import Row

        others = {info.name: info for info in self.everything()}
        return [Row(info, others=others, shown=self.show(info.name)) for info in infos]

    def everything(self) -> list[DeviceInfo]:
        """All devices, sorted by name as in the kernel."""
        return sorted(self.client.info(), key=lambda info: mangle(info.name))

    def info(self, named: Named, task: str = "") -> DeviceInfo:
        """The state of one device. Raises VerbFailed; its text has the line of the ioctl `task`, if given."""
        try:
            with self.ioctl(named, task or "info"):
                (info,) = self.client.info(named.wire)
        except IoctlFailed as error:
            if task or error.errno != errno.ENXIO:
                raise
            raise VerbFailed("Device does not exist.") from error
        return info

    def tell(self, named: Named) -> None:
        """Prints the new state of the device, with -v."""
        if self.verbose:
            from blkloom.dm.showing import info_lines

            info = self.info(named)
            click.echo("\n".join(info_lines(info, self.show(info.name))))


def _ways_to(path: str) -> Iterator[str]:
    """A path, and where it leads, link by link. A file at the end is not asked for anything: it may be a FUSE file."""
    place = os.path.abspath(path)
    for _ in range(_MOST_LINKS):
        yield place
        folder, last = os.path.split(place)
        place = os.path.join(os.path.realpath(folder), last)
        yield place
        try:
            place = os.path.normpath(os.path.join(os.path.dirname(place), os.readlink(place)))
        except OSError:
            return


def _selector(*, uuid: str = "", minor: int | None = None) -> DeviceKey:
    from blkloom.control.messages import Selector  # msgspec is not needed for help

    return Selector(uuid=uuid, minor=minor)
