"""The handshake over arbitrary streams: cutting changes nothing, garbage raises nothing else, memory is bounded."""

from __future__ import annotations

import itertools
import struct

from hypothesis import example, given
from hypothesis import strategies as st
from msgspec.structs import replace

from blkloom.export.nbd.codes import OPTION_MAGIC, REPLY_MAGIC, Option, Reply
from blkloom.export.nbd.events import Aborted, Answered, Event, Transmission
from blkloom.export.nbd.handshake import OPTION_HEADER, OPTION_LIMIT, SKIP_LIMIT, Handshake
from blkloom.export.nbd.offer import Catalogue, Offer
from blkloom.export.nbd.state import TRANSITIONS, ProtocolError, State

CATALOGUE = Catalogue.of(
    Offer("disk", 1 << 30, "a disk", contexts=("qemu:allocation-depth", "qemu:dirty-bitmap:b")),
    Offer("ü", 512, read_only=True),
)
FLAGS = [struct.pack(">I", flags) for flags in range(4)]

names = st.sampled_from(["disk", "ü", "", "nosuch", "x" * 5000])
queries = st.sampled_from(
    ["base:", "base:allocation", "base:x", "x-y:z", "nonsense", "", "qemu:", "qemu:dirty-bitmap:b"]
)


def string(text: str) -> bytes:
    return struct.pack(">I", len(text.encode())) + text.encode()


def option(number: int, data: bytes) -> bytes:
    return struct.pack(">QII", OPTION_MAGIC, number, len(data)) + data


requests = st.builds(
    lambda name, infos: string(name) + struct.pack(f">H{len(infos)}H", len(infos), *infos),
    names,
    st.lists(st.integers(0, 6), max_size=5),
)
contexts = st.builds(
    lambda name, asked: string(name) + struct.pack(">I", len(asked)) + b"".join(map(string, asked)),
    names,
    st.lists(queries, max_size=4),
)
numbers = st.one_of(st.sampled_from([int(number) for number in Option]), st.integers(0, 0xFFFFFFFF))
contents = st.one_of(
    st.just(b""),
    requests,
    contexts,
    st.binary(max_size=40),
    names.map(str.encode),
    st.sampled_from([OPTION_LIMIT, OPTION_LIMIT + 1, 100_000]).map(bytes),
)
plausible = st.builds(option, numbers, contents)
well_formed = st.one_of(
    plausible,
    st.builds(option, st.sampled_from([6, 7]), requests),
    st.builds(option, st.sampled_from([9, 10]), contexts),
    st.sampled_from([option(8, b""), option(11, b""), option(3, b"")]),
)
streams = st.one_of(
    st.binary(max_size=200),
    st.builds(
        lambda flags, options, tail: flags + b"".join(options) + tail,
        st.sampled_from(FLAGS),
        st.lists(well_formed, max_size=6),
        st.binary(max_size=30),
    ),
)


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


TRANSITIONS_FROM: dict[type, set[State]] = {}
for row in TRANSITIONS.values():
    for event_type, after in row.items():
        TRANSITIONS_FROM.setdefault(event_type, set()).add(after)


def cut(stream: bytes, at: list[int]) -> list[bytes]:
    edges = [0, *sorted({position % (len(stream) + 1) for position in at}), len(stream)]
    return [piece for piece in (stream[a:b] for a, b in itertools.pairwise(edges)) if piece]


@given(streams, st.lists(st.integers(0, 1 << 20), max_size=12))
@example(FLAGS[3] + option(7, string("disk") + b"\0\0") + b"first request", [4, 20])
def test_any_splitting_of_a_stream_gives_the_same_events(stream: bytes, at: list[int]) -> None:
    assert run(cut(stream, at)) == run([stream] if stream else [])


@given(st.lists(well_formed.filter(lambda sent: len(sent) < 300), max_size=3), st.binary(max_size=20))
def test_a_stream_in_single_bytes_gives_the_same_events(options: list[bytes], tail: bytes) -> None:
    stream = FLAGS[1] + b"".join(options) + tail
    assert run([bytes([byte]) for byte in stream]) == run([stream])


@given(st.lists(st.binary(min_size=1, max_size=100), max_size=20))
def test_garbage_raises_only_protocol_errors_and_stays_bounded(pieces: list[bytes]) -> None:
    run(pieces)
    run([FLAGS[0], *pieces])


@given(numbers, st.integers(0, SKIP_LIMIT), st.integers(1, 1 << 16))
def test_whatever_an_option_announces_little_of_it_is_held(number: int, announced: int, piece: int) -> None:
    header = struct.pack(">QII", OPTION_MAGIC, number, announced)
    run([FLAGS[1], header, *[bytes(piece)] * min(8, announced // piece)], end=False)


@given(st.lists(well_formed, max_size=8))
@example([option(Option.ABORT, b""), option(Option.EXPORT_NAME, bytes(OPTION_LIMIT))])
def test_every_answer_is_well_formed_and_ends_with_one_final_reply(options: list[bytes]) -> None:
    for event in run([FLAGS[3] + b"".join(options)]):
        if isinstance(event, Answered | Aborted) or (isinstance(event, Transmission) and event.data[:8] == MAGIC):
            kinds = reply_kinds(event.data)
            final = [kind for kind in kinds if kind == Reply.ACK or kind.is_error]
            assert final == [kinds[-1]]
            if isinstance(event, Answered):
                assert event.reply == kinds[-1]


MAGIC = struct.pack(">Q", REPLY_MAGIC)


def reply_kinds(data: bytes) -> list[Reply]:
    kinds = []
    while data:
        magic, _, kind, length = struct.unpack_from(">QIII", data)
        assert magic == REPLY_MAGIC
        assert len(data) >= 20 + length
        kinds.append(Reply(kind))
        data = data[20 + length :]
    return kinds
