"""NBD servers as ends of a copy: the target `nbd` over the whole export. May fail: BackingError, UsageError."""

from __future__ import annotations

import errno
import time
from typing import Any

from blkloom.copying.ends import End, table_end
from blkloom.errors import BackingError, Place, UsageError
from blkloom.nbd_client.connecting import connect
from blkloom.nbd_client.handshake import HandshakeError
from blkloom.nbd_client.links import CONNECT_SECONDS
from blkloom.nbd_client.uri import parse_uri
from blkloom.printing import described
from blkloom.table import Segment, Table
from blkloom.targets.nbd import Nbd
from blkloom.units import SECTOR, Bytes, Sectors, to_sectors


def server_end(uri: str, *, name: str = "", writable: bool = False, identity: dict[str, Any] | None = None) -> End:
    """The export of a server. It is connected to for its size. identity: instead of the URI. Raises BackingError,
    UsageError.
    """
    try:
        parsed = parse_uri(uri)
    except ValueError as error:
        raise UsageError(f"{uri}: {error}", cure="write nbd://HOST/NAME or nbd+unix:///NAME?socket=PATH") from error
    name = name or str(parsed)
    cure, number = "start the server, or correct the URI", errno.ECONNREFUSED
    try:
        connected = connect(parsed, time.monotonic() + CONNECT_SECONDS)
    except HandshakeError as error:
        raise BackingError(str(error), path=name, errno=errno.EPROTO, cure=error.cure or cure) from error
    except OSError as error:
        raise BackingError(described(error), path=name, errno=error.errno or number, cure=cure) from error
    except ValueError as error:  # credentials of TLS
        raise BackingError(
            str(error), path=name, errno=errno.EINVAL, cure="correct the file, or name another"
        ) from error
    connected.close()
    found = connected.found
    if writable and found.read_only:
        raise BackingError("the export is read-only", path=name, errno=errno.EROFS, cure="serve it for writing")
    if found.size % SECTOR:
        raise BackingError(
            f"its size of {found.size} bytes is not a multiple of {SECTOR}",
            path=name,
            errno=errno.EINVAL,
            cure="copy with nbdcopy",
        )
    segment = Segment(Sectors(0), to_sectors(Bytes(found.size)), Nbd(uri), Place(name))
    table = Table((segment,) if found.size else ())
    return table_end(name, table, identity if identity is not None else {"server": str(parsed)})
