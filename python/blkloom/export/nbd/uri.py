"""NBD URIs, as clients take them. Pure functions; source: NetworkBlockDevice/nbd doc/uri.md, RFC 3986."""

from __future__ import annotations

import os
from urllib.parse import quote

from blkloom.export.nbd.codes import DEFAULT_PORT


def tcp_uri(host: str, port: int, name: str = "") -> str:
    """`nbd://host:port/name`. host: a name or an address; IPv6 gets its brackets, the port is left
    out where it is 10809, an address that means "any" becomes localhost. name: the export's.
    """
    if host in {"", "0.0.0.0", "::"}:
        host = "localhost"
    shown = f"[{host.replace('%', '%25')}]" if ":" in host else quote(host, safe="")
    return f"nbd://{shown}{'' if port == DEFAULT_PORT else f':{port}'}/{quote(name, safe='')}"


def unix_uri(path: str | bytes | os.PathLike[str], name: str = "") -> str:
    """`nbd+unix:///name?socket=path`, the path made absolute."""
    absolute = os.path.abspath(os.fsencode(path))
    return f"nbd+unix:///{quote(name, safe='')}?socket={quote(absolute, safe='/')}"
