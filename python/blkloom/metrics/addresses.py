"""Formats the address of an export as one word."""

from __future__ import annotations

from blkloom.control.states import ExportState
from blkloom.export.nbd.details import NbdDetails
from blkloom.export.nbd.uri import reachable_host, tcp_uri, unix_uri


def uri_of(export: ExportState) -> str:
    """The NBD URI of an export; for a FUSE file, its path."""
    if export.path:
        return export.path
    tls = NbdDetails.parse(export.details).tls.mode == "require"
    if export.unix:
        return unix_uri(export.unix, export.name, tls=tls)
    return tcp_uri(reachable_host(export.host), export.port, export.name, tls=tls)
