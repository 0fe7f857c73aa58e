"""Client of the NBD handshake without a socket: it encodes options and decodes replies."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from blkloom.export.nbd.codes import OPTION_MAGIC, REPLY_MAGIC, ClientFlag, Info, Option, Reply
from blkloom.export.nbd.events import Aborted, Answered, Event, Greeting, Transmission
from blkloom.export.nbd.handshake import Handshake
from blkloom.export.nbd.offer import Catalogue, Offer

DISK = Offer("disk", 1 << 30, "the system disk")
OTHER = Offer("other", 4096, read_only=True)
FIXED = ClientFlag.FIXED_NEWSTYLE
NO_ZEROES = ClientFlag.FIXED_NEWSTYLE | ClientFlag.NO_ZEROES


@dataclass
class Said:
    """One reply of the server."""

    option: int
    kind: Reply
    data: bytes


@dataclass
class Client:
    """Speaks to a Handshake and takes apart what it says."""

    handshake: Handshake = field(default_factory=lambda: Handshake(Catalogue.of(DISK, OTHER)))
    greeting: bytes = b""

    def greet(self, flags: int = NO_ZEROES) -> Client:
        (opened,) = self.send(b"")
        assert isinstance(opened, Greeting)
        self.greeting = opened.data
        self.send(struct.pack(">I", flags))
        return self

    def send(self, data: bytes) -> list[Event]:
        if data:
            self.handshake.receive_data(data)
        events = []
        while (event := self.handshake.next_event()) is not None:
            events.append(event)
        return events

    def option(self, option: int, data: bytes = b"", *, length: int | None = None) -> list[Event]:
        return self.send(struct.pack(">QII", OPTION_MAGIC, option, len(data) if length is None else length) + data)

    def ask(self, option: int, data: bytes = b"") -> list[Said]:
        """Send an option that is to be answered; its replies, the final one last."""
        (event,) = self.option(option, data)
        assert isinstance(event, Answered | Transmission | Aborted), event
        return replies(event.data)

    def answer(self, option: int, data: bytes = b"") -> Reply:
        return self.ask(option, data)[-1].kind

    def answer_or_abort(self, option: int, data: bytes = b"") -> Reply:
        """The final reply, if the option is answered; `Reply.ACK` otherwise."""
        (event,) = self.option(option, data)
        return replies(event.data)[-1].kind if isinstance(event, Answered | Aborted) else Reply.ACK

    def go(self, name: str = "disk", *infos: int) -> Transmission:
        (event,) = self.option(Option.GO, export_request(name, *infos))
        assert isinstance(event, Transmission)
        return event


def client(flags: int = NO_ZEROES, *offers: Offer) -> Client:
    return Client(Handshake(Catalogue.of(*offers or (DISK, OTHER)))).greet(flags)


def structured() -> Client:
    asking = client()
    assert asking.answer(Option.STRUCTURED_REPLY) == Reply.ACK
    return asking


def extended() -> Client:
    asking = client()
    assert asking.answer(Option.EXTENDED_HEADERS) == Reply.ACK
    return asking


def replies(data: bytes) -> list[Said]:
    found = []
    while data:
        magic, option, kind, length = struct.unpack_from(">QIII", data)
        assert magic == REPLY_MAGIC
        found.append(Said(option, Reply(kind), data[20 : 20 + length]))
        assert len(found[-1].data) == length
        data = data[20 + length :]
    return found


def string(text: str) -> bytes:
    return struct.pack(">I", len(text.encode())) + text.encode()


def export_request(name: str, *infos: int) -> bytes:
    return string(name) + struct.pack(f">H{len(infos)}H", len(infos), *infos)


def contexts(name: str, *queries: str) -> bytes:
    return string(name) + struct.pack(">I", len(queries)) + b"".join(map(string, queries))


def infos(said: list[Said]) -> dict[int, bytes]:
    return {int.from_bytes(one.data[:2]): one.data for one in said if one.kind == Reply.INFO}


def flags_of(said: list[Said]) -> int:
    return int.from_bytes(infos(said)[Info.EXPORT][10:12])


def select(asking: Client, *queries: str, name: str = "disk") -> list[Said]:
    return asking.ask(Option.SET_META_CONTEXT, contexts(name, *queries))
