"""Which targets there are: the built-in ones, those installed packages bring, those a caller passes.

Built-in targets and plug-ins are imported when first asked for, so reading a table needs neither
the engine nor a plug-in the table does not name; a plug-in that cannot be imported harms only the
tables that name it. Installed packages are asked for theirs when a name is neither passed nor built in: that takes
longer than all the rest of reading a table. Immutable once made; safe to share between threads.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from importlib import import_module
from typing import Any, Final, Protocol

import msgspec

from blkloom.errors import Place, UnknownTarget, UsageError
from blkloom.target.base import Target

ENTRY_POINT_GROUP: Final = "blkloom.targets"
"""Packages name their targets in this group: `name = "module:Class"`."""

BUILTIN: Final = {
    "error": "blkloom.target.error:Error",
    "linear": "blkloom.target.linear:Linear",
    "loop": "blkloom.target.loop:Loop",
    "qcow2": "blkloom.target.qcow2:Qcow2",
    "ram": "blkloom.target.ram:Ram",
    "striped": "blkloom.target.striped:Striped",
    "zero": "blkloom.target.zero:Zero",
}
"""The targets blkloom brings, one a line."""

_log = logging.getLogger(__name__)


class Entry(Protocol):
    """The name of a target and where its class is; `importlib.metadata.EntryPoint` is one."""

    @property
    def name(self) -> str:
        """The word in tables."""
        ...

    @property
    def value(self) -> str:
        """Where the class is: "module:Class"."""
        ...

    def load(self) -> Any:
        """Imports it. May raise anything."""


class _BuiltIn(msgspec.Struct, frozen=True):
    name: str
    value: str

    def load(self) -> Any:
        module, _, cls = self.value.partition(":")
        return getattr(import_module(module), cls)


class Targets:
    """Looks target classes up by the word in the table.

    A class passed by the caller goes before a plug-in, a plug-in never before a built-in target.
    """

    def __init__(
        self,
        classes: Iterable[type[Target]] = (),
        *,
        installed: Iterable[Entry] = (),
        plugins: Callable[[], Iterable[Entry]] = tuple,
    ) -> None:
        """classes: targets of the caller's own. plugins: more of `installed`, called when first needed. Raises
        UsageError for a class without a fit name, or two of one name.
        """
        self._known = {entry.name: entry for entry in installed}
        self._find_plugins = plugins
        self._classes: dict[str, type[Target]] = {}
        for cls in classes:
            name = getattr(cls, "name", None)
            if not isinstance(name, str) or not name or any(letter.isspace() for letter in name):
                raise UsageError(f"target class {cls.__qualname__} has no name; set: name = 'one-word'")
            if self._classes.setdefault(name, cls) is not cls:
                raise UsageError(f"two target classes are named {name!r}: {self._classes[name]!r} and {cls!r}")

    def find(self, name: str, *, place: Place | None = None) -> type[Target]:
        """The class named `name`. Raises UnknownTarget that lists what exists, or says why the
        plug-in of that name cannot be used.
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
            cure=f"did you mean {near[0]!r}? {known}" if near else known,
        )

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted({*self._classes, *self._installed})

    def __contains__(self, name: str) -> bool:
        return name in self._classes or name in self._known or name in self._installed

    def __iter__(self) -> Iterator[type[Target]]:
        """Every class, by name. A plug-in that cannot be imported is left out, with a warning."""
        for name in self.names():
            try:
                yield self.find(name)
            except UnknownTarget as error:
                _log.warning("%s", error)

    def extended(self, classes: Iterable[type[Target]]) -> Targets:
        """These, and `classes` before them."""
        own = {cls.name: cls for cls in Targets(classes)._classes.values()}
        plugins = self._find_plugins
        return Targets((self._classes | own).values(), installed=self._known.values(), plugins=plugins)

    @cached_property
    def _installed(self) -> dict[str, Entry]:
        """All of them; what is built in goes first."""
        return {entry.name: entry for entry in self._find_plugins()} | self._known

    def _load(self, point: Entry, place: Place | None) -> type[Target]:
        try:
            found = point.load()
        except Exception as error:  # a plug-in's import may raise anything
            why = f"{point.value} cannot be imported: {error!r}"
            raise UnknownTarget("target cannot be used", place=place, value=point.name, cure=why) from error
        if not (isinstance(found, type) and issubclass(found, Target) and found.name == point.name):
            why = f"{point.value} is not a Target class named {point.name!r}"
            raise UnknownTarget("target cannot be used", place=place, value=point.name, cure=why)
        return found


def builtin_targets() -> Targets:
    """The targets blkloom brings."""
    return Targets(installed=_built_in())


def all_targets(classes: Iterable[type[Target]] = ()) -> Targets:
    """`classes`, the built-in targets and those of installed packages (entry points of the group
    "blkloom.targets").
    """
    return Targets(classes, installed=_built_in(), plugins=_plugins)


def _built_in() -> list[Entry]:
    return [_BuiltIn(name, value) for name, value in BUILTIN.items()]


def _plugins() -> Iterable[Entry]:
    from importlib.metadata import entry_points  # costs more than the rest of this package

    return entry_points(group=ENTRY_POINT_GROUP)
