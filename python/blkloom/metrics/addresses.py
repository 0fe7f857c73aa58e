"""Where an export is reached, as one word."""

from __future__ import annotations

from blkloom.control.states import ExportState
from blkloom.export.nbd.uri import reachable_host, tcp_uri, unix_uri


def uri_of(export: ExportState) -> str:
    """What an NBD client is given."""
    if export.unix:
        return unix_uri(export.unix, export.name)
    return tcp_uri(reachable_host(export.host), export.port, export.name)
