"""NBD URIs of servers, as libnbd reads them.

Source: NetworkBlockDevice/nbd doc/uri.md, RFC 3986. Pure.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final
from urllib.parse import parse_qsl, quote, unquote, urlsplit

import msgspec

if TYPE_CHECKING:
    from blkloom._engine import TlsClient

DEFAULT_PORT: Final = 10809
"""TCP port assigned by IANA."""
_SCHEMES: Final = ("nbd", "nbds", "nbd+unix", "nbds+unix", "nbd+vsock", "nbds+vsock")
_LONGEST: Final = 4096
_PARAMETERS: Final = ("tls-certificates", "tls-hostname", "tls-psk-file", "tls-verify-peer")
_BOOLEANS: Final = {"true": True, "1": True, "false": False, "0": False}
_HOST_CID: Final = 2
"""The address of the host of a virtual machine (VMADDR_CID_HOST), the default of vsock."""


class Credentials(msgspec.Struct, frozen=True):
    """What TLS needs. certificates: a directory; psk: a file of keys, and the user; verify: whether the server's
    certificate is checked; host: the name that it must have, "" for that of the URI.
    """

    certificates: str | None = None
    psk: str | None = None
    user: str = ""
    verify: bool = True
    host: str = ""

    def client(self) -> TlsClient:
        """Reads the files. Raises OSError, ValueError."""
        from blkloom import _engine  # a table is parsed without the engine

        return _engine.TlsClient(certificates=self.certificates, psk=self.psk, user=self.user, verify=self.verify)


class NbdUri(msgspec.Struct, frozen=True):
    """A server, and the name of its export. transport: tcp, unix or vsock. host, port: of tcp; of vsock, host is the
    number of the machine. path: of a Unix socket.
    """

    transport: str
    tls: bool
    host: str = ""
    port: int = DEFAULT_PORT
    path: str = ""
    export: str = ""
    credentials: Credentials = Credentials()

    def __str__(self) -> str:
        """The URI without its TLS options, for people."""
        scheme = ("nbds" if self.tls else "nbd") + ("" if self.transport == "tcp" else f"+{self.transport}")
        name = quote(self.export, safe="/")
        if self.transport == "unix":
            return f"{scheme}:///{name}?socket={quote(self.path, safe='/')}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        port = "" if self.port == DEFAULT_PORT else f":{self.port}"
        return f"{scheme}://{host}{port}/{name}"


def parse_uri(text: str) -> NbdUri:
    """Parses an NBD URI. Raises ValueError with the reason."""
    if "\0" in text or not text.isprintable():
        raise ValueError("it has characters that cannot be printed")
    parts = urlsplit(text)
    if parts.scheme not in _SCHEMES:
        raise ValueError(f"it must begin with {', '.join(f'{scheme}://' for scheme in _SCHEMES[:-1])} or nbds+vsock://")
    if parts.fragment:
        raise ValueError("it must not have a fragment (#)")
    kind, _, transport = parts.scheme.partition("+")
    try:
        query = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query), errors="strict")
        export = unquote(parts.path.removeprefix("/"), errors="strict")
        port = parts.port
    except ValueError as error:
        raise ValueError(f"it is malformed: {error}") from error
    if len(export.encode()) > _LONGEST or "\0" in export:
        raise ValueError(f"the name of the export must have no NUL and at most {_LONGEST} bytes")
    sockets = [value for name, value in query if name == "socket"]
    tls = kind == "nbds"
    credentials = _credentials(dict(query), unquote(parts.username or ""), tls=tls)
    common = NbdUri(transport=transport or "tcp", tls=tls, export=export, credentials=credentials)
    if transport == "unix":
        if parts.hostname or port:
            raise ValueError("a Unix socket has no host: write nbd+unix:///NAME?socket=PATH")
        if len(sockets) != 1 or not sockets[0]:
            raise ValueError("a Unix socket needs one parameter socket=PATH")
        if tls and credentials.verify and not credentials.psk and not credentials.host:
            raise ValueError("a Unix socket has no host that a certificate could name: add tls-hostname=NAME")
        return msgspec.structs.replace(common, path=sockets[0])
    if sockets:
        raise ValueError("the parameter socket goes with nbd+unix:// only")
    host = parts.hostname or ""
    if transport == "vsock":
        cid = host or str(_HOST_CID)
        if not cid.isdecimal() or int(cid) >= 1 << 32:
            raise ValueError(f"'{cid}' is not the number of a machine (CID)")
        return msgspec.structs.replace(common, host=cid, port=DEFAULT_PORT if port is None else port)
    return msgspec.structs.replace(
        common, host=unquote(host) or "localhost", port=DEFAULT_PORT if port is None else port
    )


def _credentials(query: dict[str, str], user: str, *, tls: bool) -> Credentials:
    """Those of the parameters. Raises ValueError."""
    if unknown := set(query) - {"socket", *_PARAMETERS}:
        raise ValueError(f"unknown parameter '{min(unknown)}'; there are: socket, {', '.join(_PARAMETERS)}")
    given = set(query) & set(_PARAMETERS)
    if any("\0" in value for value in (user, *(query[name] for name in given))):
        raise ValueError("it has a NUL byte (%00)")
    if given and not tls:
        raise ValueError(f"the parameter {min(given)} goes with TLS only: begin with nbds")
    certificates, psk = query.get("tls-certificates"), query.get("tls-psk-file")
    if psk is not None and (certificates is not None or not user):
        raise ValueError("pre-shared keys need a user (nbds://USER@HOST), and no tls-certificates")
    verify = query.get("tls-verify-peer", "true")
    if verify not in _BOOLEANS:
        raise ValueError(f"tls-verify-peer is true or false, not '{verify}'")
    host = query.get("tls-hostname", "")
    return Credentials(certificates=certificates, psk=psk, user=user, verify=_BOOLEANS[verify], host=host)
