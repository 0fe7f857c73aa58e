"""Checks of the NBD handshake for a whole stream: the events of the stream, and the conditions that each must meet.

Used by the property tests and by the fuzzer (fuzz/nbd_handshake.py), which imports no other test module.
"""

from __future__ import annotations

import itertools
import struct
from typing import Final

from msgspec.structs import replace

from blkloom.export.nbd.codes import REPLY_MAGIC, Reply
from blkloom.export.nbd.events import Aborted, Answered, Event, Transmission
from blkloom.export.nbd.handshake import OPTION_HEADER, OPTION_LIMIT, Handshake
from blkloom.export.nbd.offer import Catalogue, Offer
from blkloom.export.nbd.state import TRANSITIONS, ProtocolError, State

CATALOGUE: Final = Catalogue.of(
    Offer("disk", 1 << 30, "a disk", contexts=("qemu:allocation-depth", "qemu:dirty-bitmap:b")),
    Offer("ü", 512, read_only=True),
)
MAGIC: Final = struct.pack(">Q", REPLY_MAGIC)
TRANSITIONS_FROM: Final[dict[type, set[State]]] = {}
for row in TRANSITIONS.values():
    for event_type, after in row.items():
        TRANSITIONS_FROM.setdefault(event_type, set()).add(after)


def run(pieces: list[bytes], *, end: bool = True) -> list[Event | str]:
    """Every event of a stream given in pieces; a Transmission's initial bytes are all that was left."""
    handshake = Handshake(CATALOGUE)
    events: list[Event | str] = []
    waiting = [*pieces, *([b""] if end else [])]
    try:
        while True:
            while (event := handshake.next_event()) is not None:
                before = TRANSITIONS_FROM.get(type(event), set())
                assert handshake.state in before
                events.append(event)
            assert handshake.buffered < OPTION_HEADER + OPTION_LIMIT
            if handshake.state in {State.TRANSMISSION, State.CLOSED} or not waiting:
                break
            handshake.receive_data(waiting.pop(0))
    except ProtocolError as error:
        assert handshake.state is State.CLOSED
        assert handshake.buffered == 0
        events.append(str(error))
    if events and isinstance(last := events[-1], Transmission):
        events[-1] = replace(last, initial=last.initial + b"".join(waiting))
    return events


def cut(stream: bytes, at: list[int]) -> list[bytes]:
    edges = [0, *sorted({position % (len(stream) + 1) for position in at}), len(stream)]
    return [piece for piece in (stream[a:b] for a, b in itertools.pairwise(edges)) if piece]


def check_answers(events: list[Event | str]) -> None:
    """Every answer is well-formed and ends with its one final reply."""
    for event in events:
        if isinstance(event, Answered | Aborted) or (isinstance(event, Transmission) and event.data[:8] == MAGIC):
            kinds = reply_kinds(event.data)
            final = [kind for kind in kinds if kind == Reply.ACK or kind.is_error]
            assert final == [kinds[-1]]
            if isinstance(event, Answered):
                assert event.reply == kinds[-1]


def reply_kinds(data: bytes) -> list[Reply]:
    kinds = []
    while data:
        magic, _, kind, length = struct.unpack_from(">QIII", data)
        assert magic == REPLY_MAGIC
        assert len(data) >= 20 + length
        kinds.append(Reply(kind))
        data = data[20 + length :]
    return kinds
