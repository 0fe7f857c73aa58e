"""The registry of the kinds of exports.

The supervisor imports only the modules of endpoints, workers only those of servers, when they are first needed.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Final, NamedTuple, cast

from blkloom.errors import UsageError

if TYPE_CHECKING:
    from blkloom.export.exporter import Endpoints, StartExportServer


class _Kind(NamedTuple):
    """endpoints: module and class in the supervisor. server: in a worker."""

    endpoints: tuple[str, str]
    server: tuple[str, str]


DEFAULT: Final = "nbd"
_KINDS: Final = {
    "nbd": _Kind(
        ("blkloom.export.nbd.endpoints", "NbdEndpoints"), ("blkloom.export.nbd.export_server", "NbdExportServer")
    ),
    "fuse": _Kind(
        ("blkloom.export.fuse.endpoints", "FuseEndpoints"), ("blkloom.export.fuse.export_server", "FuseExportServer")
    ),
    "vhost-user": _Kind(
        ("blkloom.export.vhost_user.endpoints", "VhostUserEndpoints"),
        ("blkloom.export.vhost_user.export_server", "VhostUserExportServer"),
    ),
    "ublk": _Kind(
        ("blkloom.export.ublk.endpoints", "UblkEndpoints"), ("blkloom.export.ublk.export_server", "UblkExportServer")
    ),
    "kernel-nbd": _Kind(
        ("blkloom.export.kernel_nbd.endpoints", "KernelNbdEndpoints"),
        ("blkloom.export.kernel_nbd.export_server", "KernelNbdExportServer"),
    ),
}


def kinds() -> tuple[str, ...]:
    """Names, the default first."""
    return tuple(_KINDS)


def endpoints(kind: str) -> Endpoints:
    """The endpoints of a kind of export. Raises UsageError for an unknown kind."""
    return cast("Endpoints", _found(_kind(kind).endpoints)())


def export_server(kind: str) -> StartExportServer:
    """The server class of a kind of export. Raises UsageError for an unknown kind."""
    return cast("StartExportServer", _found(_kind(kind).server))


def _kind(name: str) -> _Kind:
    if name not in _KINDS:
        raise UsageError(f"there are no exports of kind '{name}'", cure=f"there are: {', '.join(_KINDS)}")
    return _KINDS[name]


def _found(where: tuple[str, str]) -> type:
    module, name = where
    return cast("type", getattr(import_module(module), name))
