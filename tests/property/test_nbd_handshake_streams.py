"""The NBD handshake with arbitrary streams: splits change nothing, garbage raises no other errors, memory is
bounded.
"""

from __future__ import annotations

import struct

from hypothesis import example, given
from hypothesis import strategies as st

from blkloom.export.nbd.codes import OPTION_MAGIC, Option
from blkloom.export.nbd.handshake import OPTION_LIMIT, SKIP_LIMIT
from handshake_streams import check_answers, cut, run

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
    check_answers(run([FLAGS[3] + b"".join(options)]))
