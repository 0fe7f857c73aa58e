"""The server's side of NBD's fixed newstyle handshake, with no I/O in it.

The caller passes bytes to `receive_data` and gets events from `next_event`, one at a time, so that a client
that sends many options at once is answered one by one and replies do not accumulate. One thread at a time.

Guarantees: how a stream is cut into pieces does not change the events, except where it goes on after a STARTTLS that
is accepted (see below); arbitrary bytes raise `ProtocolError` or nothing; once `next_event` returned None, less than
OPTION_HEADER + OPTION_LIMIT bytes are held (data of unknown, oversized or dataless options is dropped as it arrives).

TLS: see `TlsMode`. Nothing that was said before TLS counts after it, and a client that sends bytes after STARTTLS
before it has the reply is disconnected: they would be plain text that counts as encrypted.

Choices the specification leaves open: options are accepted from
clients that did not set FIXED_NEWSTYLE (but no TLS); repeating STRUCTURED_REPLY or EXTENDED_HEADERS is
acknowledged, because a client that understands an error as "off" would misread every reply.
Source: proto.md "Handshake", "Option types"; extension-ext-header for EXTENDED_HEADERS.
"""

from __future__ import annotations

import struct
from typing import Final

import msgspec

from blkloom.export.nbd import replies
from blkloom.export.nbd.access import Admit, RefusedError, Verdict
from blkloom.export.nbd.codes import (
    BASE_ALLOCATION,
    OPTION_MAGIC,
    STRING_LIMIT,
    ClientFlag,
    Info,
    Option,
    Reply,
    option_name,
)
from blkloom.export.nbd.events import (
    Aborted,
    Answered,
    ClientGreeted,
    Disconnected,
    Dropped,
    Event,
    Greeting,
    Secured,
    StartTls,
    Transmission,
)
from blkloom.export.nbd.offer import Catalogue, Offer
from blkloom.export.nbd.options import (
    ExportRequest,
    MalformedOptionError,
    find_contexts,
    parse_context_request,
    parse_export_name,
    parse_export_request,
)
from blkloom.export.nbd.state import TRANSITIONS, ProtocolError, State
from blkloom.export.nbd.tls import TlsMode

OPTION_HEADER: Final = 16
"""Bytes before an option's data: magic, option, length."""
OPTION_LIMIT: Final = 72 * 1024
"""Bytes of option data read; more is skipped and answered with ERR_TOO_BIG."""
SKIP_LIMIT: Final = 32 * 1024 * 1024
"""Most bytes of option data that are skipped; a client that announces more is disconnected."""
OPTION_COUNT: Final = 4096
"""Most options of one handshake, besides `OPTIONS_AN_EXPORT`; more count as denial of service."""
OPTIONS_AN_EXPORT: Final = 8
"""Further options for each export: a client that lists exports asks several times about each."""
CONTEXT_COUNT: Final = 64
"""Most metadata contexts of one connection."""
CONTEXT_BYTES: Final = 16 * 1024
"""Most bytes of their names together: the names are handed over with the connection."""

_WITH_DATA: Final = frozenset(
    {Option.EXPORT_NAME, Option.INFO, Option.GO, Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT}
)
_WITHOUT_DATA: Final = frozenset({Option.LIST, Option.STARTTLS, Option.STRUCTURED_REPLY, Option.EXTENDED_HEADERS})


class Handshake:
    """The handshake of one connection, for the exports of `catalogue`. Send the `data` of an event before the next
    call. admit: called with the name of an export that the client asks for, may refuse it.
    """

    def __init__(self, catalogue: Catalogue, *, tls: TlsMode = "off", admit: Admit | None = None) -> None:
        self._catalogue = catalogue
        self._tls = tls
        self._admit = admit
        self._encrypted = False
        self._refused: str | None = None
        self._secured = False
        """The next event is `Secured`."""
        self._state = State.GREETING
        self._buffer = bytearray()
        self._ended = False
        self._header: tuple[int, int] | None = None
        self._to_skip = 0
        self._options = 0
        self._flags = ClientFlag(0)
        self._structured = False
        self._extended = False
        self._selected: tuple[str, tuple[tuple[int, str], ...]] = ("", ())
        """An export's name and the contexts selected for it, by id."""
        self._told: tuple[ExportRequest, Offer] | None = None
        self._refusal: tuple[Reply, str] | None = None

    @property
    def state(self) -> State:
        """The state of the handshake."""
        return self._state

    @property
    def refused(self) -> str | None:
        """Why a rule has refused the client an export; None: it has not."""
        return self._refused

    @property
    def buffered(self) -> int:
        """Number of buffered bytes."""
        return len(self._buffer)

    def receive_data(self, data: bytes) -> None:
        """Adds bytes from the client; b"": it has closed its side. Raises ProtocolError after the end."""
        if self._state in {State.TLS, State.TRANSMISSION, State.CLOSED}:
            raise ProtocolError("data for a handshake that is over")
        self._ended |= not data
        self._buffer += data

    def refuse(self, kind: Reply, reason: str) -> None:
        """Answers every later option except ABORT with this error (ERR_SHUTDOWN, ERR_POLICY)."""
        self._refusal = (kind, reason)

    def secured(self) -> None:
        """The TLS handshake, which `StartTls` has asked for, has succeeded: data comes from TLS from now on."""
        if self._state is not State.TLS:
            raise ProtocolError("a TLS handshake that was not agreed")
        self._secured = True

    def next_event(self) -> Event | None:
        """The next event; None if more data is needed or the handshake is over.

        Raises ProtocolError if the client has broken the protocol; the connection must then be closed.
        """
        try:
            event = self._parse()
        except ProtocolError:
            self._advance(ProtocolError)
            raise
        if event is not None:
            self._advance(type(event))
        return event

    def _advance(self, event: type) -> None:
        self._state = TRANSITIONS[self._state][event]
        if self._state is State.CLOSED:
            self._buffer.clear()

    def _parse(self) -> Event | None:
        match self._state:
            case State.GREETING:
                return Greeting(replies.greeting())
            case State.FLAGS:
                event = self._client_flags()
            case State.OPTIONS:
                event = self._option()
            case State.TLS:
                return self._begin_again() if self._secured else None
            case State.TRANSMISSION | State.CLOSED:
                return None
        if event is None and self._ended:
            return Disconnected(midway=bool(self._buffer) or self._header is not None)
        return event

    def _begin_again(self) -> Event:
        """Forgets what was negotiated without TLS: "the server MUST NOT preserve any negotiation state"."""
        self._secured, self._encrypted = False, True
        self._structured = self._extended = False
        self._selected = ("", ())
        self._told = None
        return Secured()

    def _client_flags(self) -> Event | None:
        if len(self._buffer) < 4:
            return None
        number = int.from_bytes(self._take(4))
        if unknown := number & ~int(ClientFlag.FIXED_NEWSTYLE | ClientFlag.NO_ZEROES):  # ~ of a flag knows no others
            raise ProtocolError(f"unknown client flags {unknown:#x}")
        self._flags = ClientFlag(number)
        return ClientGreeted(self._flags)

    def _option(self) -> Event | None:
        """Collects the header, then the data. Data that is not needed is dropped as it arrives."""
        if self._header is None and not self._option_header():
            return None
        assert self._header is not None
        option, length = self._header
        skipped = min(self._to_skip, len(self._buffer))
        del self._buffer[:skipped]
        self._to_skip -= skipped
        kept = length if _is_kept(option, length) else 0
        if self._to_skip or len(self._buffer) < kept:
            return None
        self._header = None
        return self._answer(option, length, self._take(kept))

    def _option_header(self) -> bool:
        if len(self._buffer) >= 8 and (magic := int.from_bytes(self._buffer[:8])) != OPTION_MAGIC:
            raise ProtocolError(f"option begins with {magic:#018x}, not with IHAVEOPT")
        if len(self._buffer) < OPTION_HEADER:
            return False
        option, length = struct.unpack(">8xII", self._take(OPTION_HEADER))
        self._options += 1
        most = OPTION_COUNT + OPTIONS_AN_EXPORT * len(self._catalogue)
        if self._options > most:
            raise ProtocolError(f"more than {most} options in one handshake")
        if length > SKIP_LIMIT:
            raise ProtocolError(f"{option_name(option)} announces {length} bytes of data")
        if option == Option.EXPORT_NAME and length > STRING_LIMIT:
            raise ProtocolError(f"export name of {length} bytes is longer than {STRING_LIMIT}")
        self._header = (option, length)
        self._to_skip = 0 if _is_kept(option, length) else length
        return True

    def _answer(self, option: int, length: int, data: bytes) -> Event:
        told, self._told = self._told, None
        if option == Option.SET_META_CONTEXT:
            self._selected = ("", ())  # "including when this command fails"
        if option == Option.ABORT:
            return Aborted(replies.reply(option, Reply.ACK))
        if (kind := self._lacks_tls(option)) is not None:
            reason = f"this server requires TLS: begin with {option_name(Option.STARTTLS)}"
            return Dropped(reason) if option == Option.EXPORT_NAME else _error(option, kind, reason)
        if option == Option.EXPORT_NAME:
            return self._export_name(data)
        if self._refusal is not None:
            return _error(option, *self._refusal)
        if option in _WITH_DATA and not _is_kept(option, length):
            return _error(option, Reply.ERR_TOO_BIG, f"{length} bytes of data; at most {OPTION_LIMIT} are read")
        if option in _WITHOUT_DATA and length:
            return _error(option, Reply.ERR_INVALID, f"{option_name(option)} takes no data; {length} bytes came")
        try:
            match option:
                case Option.LIST:
                    admitted = [offer for offer in self._catalogue if self._admitted(offer).reason is None]
                    return _done(option, b"".join(replies.server(option, offer) for offer in admitted))
                case Option.INFO | Option.GO:
                    return self._info(option, parse_export_request(data), told)
                case Option.STRUCTURED_REPLY:
                    return self._structured_reply(option)
                case Option.EXTENDED_HEADERS:
                    self._structured = self._extended = True
                    return _done(option)
                case Option.LIST_META_CONTEXT | Option.SET_META_CONTEXT:
                    return self._contexts(option, data)
                case Option.STARTTLS:
                    return self._start_tls(option)
                case _:
                    return _error(option, Reply.ERR_UNSUP, f"{option_name(option)} is not known here")
        except MalformedOptionError as error:
            return _error(option, Reply.ERR_INVALID, str(error))
        except RefusedError as error:
            return _error(option, Reply.ERR_POLICY, str(error))

    def _lacks_tls(self, option: int) -> Reply | None:
        """The error for an option that needs TLS."""
        if self._tls != "require" or self._encrypted or option == Option.STARTTLS:
            return None
        # "The server MUST operate in NOTLS mode unless ...", in which this error MUST NOT be sent.
        return Reply.ERR_TLS_REQD if ClientFlag.FIXED_NEWSTYLE in self._flags else Reply.ERR_POLICY

    def _start_tls(self, option: int) -> Event:
        if self._encrypted:
            return _error(option, Reply.ERR_INVALID, "this connection has TLS already")
        if self._tls == "off":
            return _error(option, Reply.ERR_UNSUP, "this server has no TLS")
        if ClientFlag.FIXED_NEWSTYLE not in self._flags:
            return _error(option, Reply.ERR_POLICY, "TLS needs NBD_FLAG_C_FIXED_NEWSTYLE")
        if self._buffer:
            raise ProtocolError(f"{len(self._buffer)} bytes after {option_name(option)}, before its reply")
        return StartTls(replies.reply(option, Reply.ACK))

    def _find(self, name: str) -> Offer | None:
        """The offer of an export for this client. Raises RefusedError."""
        offer = self._catalogue.find(name)
        if offer is None:
            return None
        verdict = self._admitted(offer)
        if verdict.reason is not None:
            self._refused = verdict.reason
            raise RefusedError(verdict.reason)
        return msgspec.structs.replace(offer, read_only=True) if verdict.read_only else offer

    def _admitted(self, offer: Offer) -> Verdict:
        return Verdict() if self._admit is None else self._admit(offer.name)

    def _export_name(self, data: bytes) -> Event:
        if self._extended:
            raise ProtocolError("NBD_OPT_EXPORT_NAME after extended headers were agreed")
        if self._refusal is not None:
            return Dropped(self._refusal[1])
        try:
            name = parse_export_name(data)
        except MalformedOptionError as error:
            raise ProtocolError(str(error)) from error
        try:
            offer = self._find(name)
        except RefusedError as error:
            return Dropped(str(error))
        if offer is None:
            return Dropped(_unknown(name))
        flags = offer.flags(structured=self._structured)
        zeroes = ClientFlag.NO_ZEROES not in self._flags
        return self._transmission(offer, replies.export_name(offer, flags, zeroes=zeroes))

    def _info(self, option: int, request: ExportRequest, told: tuple[ExportRequest, Offer] | None) -> Event:
        # INFO followed directly by the same GO must give the same information, even if the device
        # was resized in between; the engine checks requests against the size it has then.
        remembered = told is not None and option == Option.GO and told[0] == request
        offer = told[1] if told is not None and remembered else self._find(request.name)
        if offer is None:
            return _error(option, Reply.ERR_UNKNOWN, _unknown(request.name))
        parts = [replies.info_export(option, offer, offer.flags(structured=self._structured))]
        if Info.NAME in request.infos:
            parts.append(replies.info_text(option, Info.NAME, offer.name))
        if Info.DESCRIPTION in request.infos and offer.description:
            parts.append(replies.info_text(option, Info.DESCRIPTION, offer.description))
        if Info.BLOCK_SIZE in request.infos:
            parts.append(replies.info_block_size(option, offer))
        if option == Option.GO:
            return self._transmission(offer, b"".join([*parts, replies.reply(option, Reply.ACK)]))
        self._told = (request, offer)
        return _done(option, b"".join(parts))

    def _structured_reply(self, option: int) -> Event:
        if self._extended:
            return _error(option, Reply.ERR_EXT_HEADER_REQD, "extended headers are agreed and take precedence")
        self._structured = True
        return _done(option)

    def _contexts(self, option: int, data: bytes) -> Event:
        request = parse_context_request(data)
        if not self._structured:
            raise MalformedOptionError("ask for structured replies or extended headers first")
        offer = self._find(request.name)
        if offer is None:
            return _error(option, Reply.ERR_UNKNOWN, _unknown(request.name))
        listing = option == Option.LIST_META_CONTEXT
        names = (BASE_ALLOCATION, *offer.contexts)
        found = names if listing and not request.queries else find_contexts(request.queries, names, wildcards=listing)
        if listing:
            return _done(option, b"".join(replies.meta_context(option, 0, name) for name in found))
        if len(found) > CONTEXT_COUNT or sum(len(name.encode()) for name in found) > CONTEXT_BYTES:
            most = f"at most {CONTEXT_COUNT} contexts with {CONTEXT_BYTES} bytes of names can be selected"
            return _error(option, Reply.ERR_TOO_BIG, f"{len(found)} contexts at once; {most}")
        selected = tuple(enumerate(found, 1))
        self._selected = (offer.name, selected)
        return _done(option, b"".join(replies.meta_context(option, number, name) for number, name in selected))

    def _transmission(self, offer: Offer, data: bytes) -> Transmission:
        return Transmission(
            offer=offer,
            structured=self._structured,
            extended=self._extended,
            contexts=self._selected[1] if self._selected[0] == offer.name else (),
            data=data,
            initial=self._take(len(self._buffer)),
            read_only=self._admitted(offer).read_only,
        )

    def _take(self, length: int) -> bytes:
        taken = bytes(self._buffer[:length])
        del self._buffer[:length]
        return taken


def _is_kept(option: int, length: int) -> bool:
    """Whether an option's data is collected; all other data is dropped as it arrives."""
    return option in _WITH_DATA and length <= OPTION_LIMIT


def _done(option: int, data: bytes = b"") -> Answered:
    return Answered(option, Reply.ACK, "", data + replies.reply(option, Reply.ACK))


def _error(option: int, kind: Reply, message: str) -> Answered:
    return Answered(option, kind, message, replies.error(option, kind, message))


def _unknown(name: str) -> str:
    return f"there is no export '{name[:64]}'{'...' if len(name) > 64 else ''}; NBD_OPT_LIST names those there are"
