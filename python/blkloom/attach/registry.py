"""The ways to attach, the best first. A way's module is imported when it is first needed."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Final, cast

from blkloom.errors import CannotAttach, UsageError

if TYPE_CHECKING:
    from blkloom.attach.way import Way

AUTO: Final = "auto"
_WAYS: Final = {
    "ublk": ("blkloom.attach.ublk", "UblkWay"),
    "nbd": ("blkloom.attach.nbd", "NbdWay"),
    "loop": ("blkloom.attach.loop", "LoopWay"),
    "fuse": ("blkloom.attach.fuse", "FuseWay"),
}


def names() -> tuple[str, ...]:
    """Names of all ways, the best first."""
    return tuple(_WAYS)


def way(name: str) -> Way:
    """The way named `name`. Raises UsageError."""
    if name not in _WAYS:
        raise UsageError(f"there is no way '{name}' to attach", cure=f"there are: {', '.join([AUTO, *_WAYS])}")
    module, kind = _WAYS[name]
    return cast("Way", getattr(import_module(module), kind)())


def choose(name: str, *, block_device: bool = False, export: str = "") -> tuple[Way, dict[str, str]]:
    """Chooses a way; returns it, and by name why each better way is not possible. name: AUTO for the best way on this
    machine. block_device: AUTO chooses only ways whose node is a block device. export: only ways over this kind of
    export; "" for all. On any thread. Raises CannotAttach if no way is possible.
    """
    tried = [way(one) for one in ([name] if name != AUTO else names())]
    missing: dict[str, str] = {}
    for one in tried:
        if block_device and name == AUTO and not one.is_block_device:
            continue
        if export and one.export != export:
            if name != AUTO:
                missing[one.name] = "only devices of a supervisor (`blkloom create`) can be attached so"
            continue
        if not (why := one.lacks()):
            return one, missing
        missing[one.name] = why
    what = "; ".join(f"{one}: {why}" for one, why in missing.items())
    raise CannotAttach(f"cannot be attached here: {what}", cure="`blkloom doctor` says what to install or change")
