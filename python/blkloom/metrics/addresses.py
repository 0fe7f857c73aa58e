"""Where an export is reached, as one word. Pure."""

from __future__ import annotations

from blkloom.control.states import ExportState
from blkloom.export.nbd.uri import tcp_uri, unix_uri


def uri_of(export: ExportState) -> str:
    """What an NBD client is given."""
    return unix_uri(export.unix, export.name) if export.unix else tcp_uri(export.host, export.port, export.name)
