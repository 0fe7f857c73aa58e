"""The registry of targets: built-in targets, targets of installed packages, targets that a caller passes.

A target is imported at its first use, so reading a table needs neither the engine nor a plug-in that the table does not
name. A plug-in that cannot be imported fails only the tables that name it. Installed packages are searched only for a
name that is neither passed nor built in, because the search is slow. Immutable; safe to share between threads.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from importlib import import_module
from typing import Any, Final, Protocol

import msgspec

from blkloom.errors import Place, UnknownTarget, UsageError
from blkloom.image.registry import FORMATS
from blkloom.printing import described
from blkloom.targets.spec import TargetSpec

ENTRY_POINT_GROUP: Final = "blkloom.targets"
"""Entry point group in which packages name their targets: `name = "module:Class"`."""

BUILTIN: Final = {
    "delay": "blkloom.targets.delay:Delay",
    "dust": "blkloom.targets.dust:Dust",
    "error": "blkloom.targets.error:Error",
    "flakey": "blkloom.targets.flakey:Flakey",
    "full": "blkloom.targets.full:Full",
    "linear": "blkloom.targets.linear:Linear",
    "log-writes": "blkloom.targets.log_writes:LogWrites",
    "loop": "blkloom.targets.loop:Loop",
    "mirror": "blkloom.targets.mirror:Mirror",
    "nbd": "blkloom.targets.nbd:Nbd",
    "pause": "blkloom.targets.pause:Pause",
    "qcow2": "blkloom.targets.qcow2:Qcow2",
    "ram": "blkloom.targets.ram:Ram",
    "snapshot": "blkloom.targets.snapshot:Snapshot",
    "snapshot-merge": "blkloom.targets.snapshot_merge:SnapshotMerge",
    "snapshot-origin": "blkloom.targets.snapshot_origin:SnapshotOrigin",
    "striped": "blkloom.targets.striped:Striped",
    "torn": "blkloom.targets.torn:Torn",
    "throttle": "blkloom.targets.throttle:Throttle",
    "unstriped": "blkloom.targets.unstriped:Unstriped",
    "zero": "blkloom.targets.zero:Zero",
}
"""The built-in targets."""

_log = logging.getLogger(__name__)


class Entry(Protocol):
    """The name of a target and the location of its class, such as an `importlib.metadata.EntryPoint`."""

    @property
    def name(self) -> str:
        """The name in tables."""
        ...

    @property
    def value(self) -> str:
        """The location of the class: "module:Class"."""
        ...

    def load(self) -> Any:
        """Imports the class. May raise any exception."""


class _BuiltIn(msgspec.Struct, frozen=True):
    name: str
    value: str

    def load(self) -> Any:
        module, _, cls = self.value.partition(":")
        return getattr(import_module(module), cls)


class _OfFormat(msgspec.Struct, frozen=True):
    name: str

    @property
    def value(self) -> str:
        return f'blkloom.targets.image:reading_spec("{self.name}")'

    def load(self) -> Any:
        from blkloom.targets.image import reading_spec

        return reading_spec(self.name)


class Targets:
    """Finds target classes by their name in tables.

    A class passed by the caller takes precedence over built-in targets and plug-ins. A plug-in never replaces a
    built-in target.
    """

    def __init__(
        self,
        classes: Iterable[type[TargetSpec]] = (),
        *,
        installed: Iterable[Entry] = (),
        plugins: Callable[[], Iterable[Entry]] = tuple,
    ) -> None:
        """classes: targets of the caller. plugins: returns more entries like `installed`; called at the first need.
        Raises UsageError for a class without a valid name, or for two classes with the same name.
        """
        self._known = {entry.name: entry for entry in installed}
        self._find_plugins = plugins
        self._classes: dict[str, type[TargetSpec]] = {}
        for cls in classes:
            name = getattr(cls, "name", None)
            if not isinstance(name, str) or not name or any(letter.isspace() for letter in name):
                raise UsageError(f"target class {cls.__qualname__} has no name; set: name = 'one-word'")
            if self._classes.setdefault(name, cls) is not cls:
                both = f"{_named(self._classes[name])} and {_named(cls)}"
                raise UsageError(f"two target classes are named '{name}': {both}", cure="rename one")

    def find(self, name: str, *, place: Place | None = None) -> type[TargetSpec]:
        """The class named `name`. Raises UnknownTarget with the list of all targets, or with the reason why the plug-in
        of that name cannot be used.
        """
        if name in self._classes:
            return self._classes[name]
        if (entry := self._known.get(name) or self._installed.get(name)) is not None:
            return self._load(entry, place)
        import difflib  # only this error needs it

        near = difflib.get_close_matches(name, self.names(), n=1)
        known = f"there are: {', '.join(self.names())}"
        raise UnknownTarget(
            "unknown target type",
            place=place,
            value=name,
            cure=f"did you mean '{near[0]}'? {known}" if near else known,
        )

    def names(self) -> list[str]:
        """The names of all targets, sorted."""
        return sorted({*self._classes, *self._installed})

    def __contains__(self, name: str) -> bool:
        return name in self._classes or name in self._known or name in self._installed

    def __iter__(self) -> Iterator[type[TargetSpec]]:
        """All classes, sorted by name. A plug-in that cannot be imported is skipped with a warning."""
        for name in self.names():
            try:
                yield self.find(name)
            except UnknownTarget as error:
                _log.warning("%s", error)

    def extended(self, classes: Iterable[type[TargetSpec]]) -> Targets:
        """A registry with `classes` added; they take precedence."""
        own = {cls.name: cls for cls in Targets(classes)._classes.values()}
        plugins = self._find_plugins
        return Targets((self._classes | own).values(), installed=self._known.values(), plugins=plugins)

    @cached_property
    def _installed(self) -> dict[str, Entry]:
        """All entries; built-in targets take precedence over plug-ins."""
        return {entry.name: entry for entry in self._find_plugins()} | self._known

    def _load(self, point: Entry, place: Place | None) -> type[TargetSpec]:
        try:
            found = point.load()
        except Exception as error:  # a plug-in's import may raise anything
            why = f"{point.value} cannot be imported: {described(error)}"
            raise UnknownTarget("target cannot be used", place=place, value=point.name, cure=why) from error
        if not (isinstance(found, type) and issubclass(found, TargetSpec) and found.name == point.name):
            why = f"{point.value} is not a TargetSpec class named '{point.name}'"
            raise UnknownTarget("target cannot be used", place=place, value=point.name, cure=why)
        return found


def builtin_targets() -> Targets:
    """A registry of the built-in targets only."""
    return Targets(installed=_built_in())


def all_targets(classes: Iterable[type[TargetSpec]] = ()) -> Targets:
    """A registry of `classes`, the built-in targets and those of installed packages (entry points of the group
    "blkloom.targets").
    """
    return Targets(classes, installed=_built_in(), plugins=_plugins)


def _built_in() -> list[Entry]:
    """The entries of `BUILTIN`, and one for each image format without a target class of its own."""
    formats = (name for name, entry in FORMATS.items() if not entry.target and name not in BUILTIN)
    return [*(_BuiltIn(name, value) for name, value in BUILTIN.items()), *map(_OfFormat, formats)]


def _plugins() -> Iterable[Entry]:
    from importlib.metadata import entry_points  # costs more than the rest of this package

    return entry_points(group=ENTRY_POINT_GROUP)


def _named(cls: type[TargetSpec]) -> str:
    """The place where a class is defined."""
    return f"{cls.__module__}.{cls.__qualname__}"
