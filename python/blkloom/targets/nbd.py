"""`nbd`: the export of an NBD server.

Requests are the engine's (`_engine.NbdClient`): many in flight on each connection, and on several connections if the
server allows that. The handshakes are Python's (`nbd_client`). If a connection is lost, its requests wait for another
one, up to `reconnect` seconds without any.

What is guaranteed when requests are sent again is in docs/targets.md. Source: NetworkBlockDevice/nbd doc/proto.md,
doc/uri.md.
"""

from __future__ import annotations

import errno
import time
from typing import TYPE_CHECKING, ClassVar, Final

import msgspec
from typing_extensions import override

from blkloom._engine import Extent
from blkloom.errors import BackingError
from blkloom.nbd_client.handshake import SEND_WRITE_ZEROES
from blkloom.nbd_client.uri import parse_uri
from blkloom.printing import described, printable
from blkloom.table.arguments import Arguments
from blkloom.table.syntax import Syntax, Words, argument, number, options
from blkloom.targets.limits import BlockLimits
from blkloom.targets.load_context import LoadContext
from blkloom.targets.loaded import LoadedTarget
from blkloom.targets.spec import TargetSpec
from blkloom.units import SECTOR, Bytes, to_sectors

if TYPE_CHECKING:
    from blkloom.nbd_client.connecting import Connected
    from blkloom.nbd_client.handshake import ServerExport
    from blkloom.nbd_client.links import Links
    from blkloom.targets.saved_state import SavedState

_CONNECTIONS: Final = 4
_MOST_CONNECTIONS: Final = 16
_RECONNECT: Final = 60
_MOST_SECONDS: Final = 1_000_000
_SAVED: Final = "export"
_SHORT_SECONDS: Final = 1.0
"""How long the next process of a device tries to connect before it continues without a connection."""
_LARGEST_OPTIMAL: Final = 32 << 20
_ALIGNMENT: Final = 65536
"""The largest block size of the protocol."""


def _read_uri(arguments: Arguments) -> str:
    text = arguments.word("uri")
    try:
        parse_uri(text)
    except ValueError as error:
        raise arguments.error(f"Invalid NBD URI: {error}", value=text, cure="write nbd://HOST/NAME") from error
    return text


class Nbd(TargetSpec):
    """A segment that maps to the export of the NBD server at `uri`, from its beginning. connections: at most, if the
    server allows several. reconnect: seconds that requests wait without a connection. timeout: seconds after which a
    request without an answer cuts its connection; 0: never. reading: read_only, read_only=auto (if the server says so)
    or "".
    """

    uri: str
    connections: int = _CONNECTIONS
    reconnect: int = _RECONNECT
    timeout: int = 0
    reading: str = ""

    name: ClassVar[str] = "nbd"
    arguments: ClassVar[Syntax] = (
        argument("uri", "<uri>", _read_uri),
        options(
            number("connections", least=1, most=_MOST_CONNECTIONS),
            number("reconnect", "<seconds>", most=_MOST_SECONDS),
            number("timeout", "<seconds>", most=_MOST_SECONDS),
            Words("reading", ("read_only", "read_only=auto"), "[read_only[=auto]]"),
        ),
    )
    summary: ClassVar[str] = "the export of an NBD server"
    modules: ClassVar[tuple[str, ...]] = ("blkloom.nbd_client.links",)

    @override
    def load(self, context: LoadContext, start: Bytes, length: Bytes) -> LoadedTarget:
        return _LoadedNbd(self, context, length)


class _LoadedNbd(LoadedTarget):
    spec: Nbd

    def __init__(self, spec: Nbd, context: LoadContext, length: Bytes) -> None:
        from blkloom import _engine
        from blkloom.nbd_client.links import Links, Needs

        self._uri = parse_uri(spec.uri)
        self._links: Links | None = None
        saved = context.saved_state(if_lost="its server must be reachable")
        first, found = self._first(context, saved)
        read_only = context.read_only or spec.reading == "read_only" or (spec.reading != "" and found.read_only)
        try:
            self._check(context, found, length, read_only=read_only)
            saved.save({_SAVED: msgspec.to_builtins(found)})
            self._block = max(found.minimum, 1)
            self._preferred = found.preferred
            connections = spec.connections if found.multi_conn else 1
            longest = found.maximum // max(found.minimum, SECTOR) * max(found.minimum, SECTOR)
            self._client = _engine.NbdClient(
                connections=connections,
                longest=longest,
                longest_range=_longest_range(found, longest),
                block=found.minimum,
                timeout=spec.timeout or None,
                unflushed=not read_only,
            )
            needs = Needs(
                size=length,
                block=found.minimum,
                longest=longest,
                writable=not read_only,
                multi_conn=connections > 1,
                extended=found.extended and bool(found.flags & SEND_WRITE_ZEROES),
                write_zeroes=bool(found.flags & SEND_WRITE_ZEROES),
            )
            segment = context.segment()
            self._links = Links(
                self._client, context.engine, self._uri, needs, reconnect=spec.reconnect, tell=segment.event
            )
            try:
                if first is not None:
                    self._links.add(0, first)
                self._links.start()
            except BaseException:
                self._links.close()
                raise
        finally:
            if first is not None:
                first.close()
        super().__init__(spec, [(Bytes(0), length, Extent.backend(self._client, 0, read_only=read_only))])

    def _first(self, context: LoadContext, saved: SavedState) -> tuple[Connected | None, ServerExport]:
        """The first connection. If a former process of the device had one and there is none now, requests wait as for
        any lost connection. Raises BackingError.
        """
        from blkloom.nbd_client.connecting import connect
        from blkloom.nbd_client.handshake import HandshakeError, ServerExport
        from blkloom.nbd_client.links import CONNECT_SECONDS

        cure, number = "start the server, or correct the URI", errno.ECONNREFUSED
        former = saved.read() if context.restored else None
        try:
            first = connect(self._uri, time.monotonic() + (_SHORT_SECONDS if former else CONNECT_SECONDS))
        except ValueError as error:
            what, cure, number = str(error), "correct the file, or name another one", errno.EINVAL
        except HandshakeError as error:
            what, cure, number = str(error), error.cure or cure, errno.EPROTO
        except OSError as error:
            what, number = described(error), error.errno or number
        else:
            return first, first.found
        if former:
            context.warn(f"{self._uri}: {what}; requests wait for it")
            return None, msgspec.convert(former[_SAVED], ServerExport)
        raise BackingError(what, path=str(self._uri), errno=number, cure=cure)

    def _check(self, context: LoadContext, found: ServerExport, length: Bytes, *, read_only: bool) -> None:
        if found.size < length:
            raise context.refuse(
                "Target maps area after the end of the export",
                value=printable(str(self._uri)),
                cure=f"it has {to_sectors(Bytes(found.size // SECTOR * SECTOR))} sectors, not {to_sectors(length)}",
            )
        if length % found.minimum:
            raise context.refuse(
                f"Unaligned length: must be a multiple of the server's block size of {found.minimum} bytes",
                value=str(length),
                cure=f"make it {to_sectors(Bytes(length // found.minimum * found.minimum))} sectors",
            )
        if found.read_only and not read_only:
            raise context.refuse("the export is read-only", value=printable(str(self._uri)), cure="add read_only")

    @override
    def limits(self) -> BlockLimits:
        logical = max(self._block, SECTOR)
        preferred = self._preferred if self._preferred & (self._preferred - 1) == 0 else 0
        return BlockLimits(logical=logical, optimal=min(max(preferred, 4096, logical), _LARGEST_OPTIMAL))

    @override
    def status(self) -> str:
        if self._links is None:
            return ""
        report = self._links.report()
        up = report["links"].count("up")
        text = (
            f"{up}/{len(report['links'])} {printable(str(self._uri))} in_flight {report['in_flight']}"
            f" waiting {report['waiting']} reconnects {report['reconnects']}"
        )
        if report["failing"]:
            text += " failing"
        return f"{text} error: {self._links.error}" if self._links.error else text

    @override
    def close(self) -> None:
        if self._links is not None:
            self._links.close()
            self._links = None


def _longest_range(found: ServerExport, longest: int) -> int:
    """The longest discard, write zeroes or block status, in bytes."""
    if not found.flags & SEND_WRITE_ZEROES:
        return longest  # zeros are written
    most = (1 << 62) if found.extended else (1 << 32) - 1
    return most // _ALIGNMENT * _ALIGNMENT
