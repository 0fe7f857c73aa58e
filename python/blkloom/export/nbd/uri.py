"""NBD URIs. Source: NetworkBlockDevice/nbd doc/uri.md, RFC 3986.

Pure functions, except `reachable_host`, which asks the kernel for an address of this machine.
"""

from __future__ import annotations

import errno
import os
import socket
from typing import Final
from urllib.parse import quote

from blkloom.export.nbd.codes import DEFAULT_PORT

_OTHER_HOST: Final = {
    "": (socket.AF_INET, "198.51.100.1"),
    "0.0.0.0": (socket.AF_INET, "198.51.100.1"),
    "::": (socket.AF_INET6, "2001:db8::1"),
}
"""For each wildcard address, an address that no machine has (RFC 5737, RFC 3849)."""


def tcp_uri(host: str, port: int, name: str = "", *, tls: bool = False) -> str:
    """`nbd://host:port/name`; `nbds` with TLS. host: a name or an address; IPv6 gets its brackets, the port is left
    out where it is 10809. name: the export's.
    """
    shown = f"[{host.replace('%', '%25')}]" if ":" in host else quote(host, safe="")
    return f"nbd{'s' if tls else ''}://{shown}{'' if port == DEFAULT_PORT else f':{port}'}/{quote(name, safe='')}"


def reachable_host(address: str) -> str:
    """The host for the URI of a server that listens on `address`. For a wildcard address: the source address of packets
    to other hosts, or else the name of this machine.
    """
    if address not in _OTHER_HOST:
        return address
    family, other = _OTHER_HOST[address]
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((other, DEFAULT_PORT))  # of a datagram socket: it finds the route and sends nothing
            return str(probe.getsockname()[0])
    except OSError as error:
        if error.errno not in {errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT}:
            raise
        return socket.gethostname()


def unix_uri(path: str | bytes | os.PathLike[str], name: str = "", *, tls: bool = False) -> str:
    """`nbd+unix:///name?socket=path`, the path made absolute; `nbds+unix` with TLS."""
    absolute = os.path.abspath(os.fsencode(path))
    return f"nbd{'s' if tls else ''}+unix:///{quote(name, safe='')}?socket={quote(absolute, safe='/')}"
