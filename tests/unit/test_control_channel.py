"""Messages and descriptors over a socket: each message gets its own descriptors, with any split of the stream, and none
leaks.
"""

from __future__ import annotations

import array
import asyncio
import os
import resource
import socket
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blkloom.control import framing
from blkloom.control.async_channel import AsyncChannel
from blkloom.control.channel import Channel
from blkloom.control.framing import Arrivals, BadMessage, ChannelClosed
from blkloom.control.messages import MOST_DESCRIPTORS, FromWorker, Keep, Reply
from blkloom.control.states import Label
from blkloom.errors import UsageError
from left_behind import no_descriptor_left

Receive = Callable[[socket.socket, int], list[tuple[Any, list[int]]]]


@pytest.fixture(autouse=True)
def all_descriptors_closed() -> Iterator[None]:
    with no_descriptor_left():
        yield


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def receive_blocking(connected: socket.socket, count: int) -> list[tuple[Any, list[int]]]:
    """That many messages; the channel is closed, whatever happens."""
    channel = Channel(connected, FromWorker)
    try:
        return [channel.receive(30) for _ in range(count)]
    finally:
        channel.close()


def receive_async(connected: socket.socket, count: int) -> list[tuple[Any, list[int]]]:
    """The same on an event loop."""

    async def receive() -> list[tuple[Any, list[int]]]:
        channel = AsyncChannel(connected, FromWorker)
        try:
            return [await channel.receive() for _ in range(count)]
        finally:
            await channel.close()

    return asyncio.run(receive())


@pytest.fixture(params=[receive_blocking, receive_async], ids=["blocking", "asyncio"])
def receive(request: pytest.FixtureRequest) -> Receive:
    found: Receive = request.param
    return found


def pipe_with(text: bytes) -> int:
    """A descriptor that can be told from others by what is in it."""
    reading, writing = os.pipe()
    os.write(writing, text)
    os.close(writing)
    return reading


def read_and_close(descriptor: int) -> bytes:
    with open(descriptor, "rb") as file:
        return file.read()


def line(number: int, count: int = 0) -> bytes:
    return msgspec.json.encode(Reply(id=number, fds=count)) + b"\n"


def send(connected: socket.socket, data: bytes, *texts: bytes) -> None:
    """Raw, with a descriptor for every text."""
    descriptors = [pipe_with(text) for text in texts]
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors).tobytes())] * bool(texts)
    assert connected.sendmsg([data], ancillary) == len(data)
    for descriptor in descriptors:
        os.close(descriptor)


def contents(received: list[tuple[Any, list[int]]]) -> list[tuple[int, list[bytes]]]:
    return [(message.id, [read_and_close(fd) for fd in fds]) for message, fds in received]


def test_lines_that_come_at_once_are_messages_of_their_own(
    pair: tuple[socket.socket, socket.socket], receive: Receive
) -> None:
    send(pair[1], line(1) + line(2, 1) + line(3) + line(4, 2), b"a", b"b", b"c")
    assert contents(receive(pair[0], 4)) == [(1, []), (2, [b"a"]), (3, []), (4, [b"b", b"c"])]


def test_a_line_in_pieces_is_one_message_with_the_descriptors_of_its_first_byte(receive: Receive) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        whole = line(7, 1)
        send(theirs, whole[:1], b"mine")
        rest = threading.Thread(target=lambda: [theirs.sendall(bytes([byte])) for byte in whole[1:]])
        rest.start()
        assert contents(receive(ours, 1)) == [(7, [b"mine"])]
        rest.join()


@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.integers(0, 3), min_size=1, max_size=12),
    cuts=st.lists(st.integers(1, 60), min_size=1, max_size=30),
    asynchronous=st.booleans(),
)
def test_descriptors_go_with_their_own_message_however_the_stream_is_cut(
    counts: list[int], cuts: list[int], asynchronous: bool
) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        for number, count in enumerate(counts):
            whole, at = line(number, count), 0
            texts = [b"%d/%d" % (number, which) for which in range(count)]
            for cut in [*cuts, len(whole)]:
                if at < len(whole):
                    send(theirs, whole[at : at + cut], *(texts if at == 0 else ()))
                at += cut
        found = contents((receive_async if asynchronous else receive_blocking)(ours, len(counts)))
    assert found == [(n, [b"%d/%d" % (n, which) for which in range(count)]) for n, count in enumerate(counts)]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_one_channel_sends_another_receives(
    pair: tuple[socket.socket, socket.socket], receive: Receive, asynchronous: bool
) -> None:
    labels = [Label(device=1, load=2, role="file", key="w-/a b\n")]
    descriptor = pipe_with(b"file")

    async def send_async() -> None:
        channel = AsyncChannel(pair[1], FromWorker)
        await channel.send(Keep(labels=labels), [descriptor])
        await channel.send(Reply(id=5, result={"deps": ["x" * 300_000]}))
        await channel.close()

    def send_blocking() -> None:
        channel = Channel(pair[1], FromWorker)
        channel.send(Keep(labels=labels), [descriptor])
        channel.send(Reply(id=5, result={"deps": ["x" * 300_000]}))
        channel.close()

    sender = threading.Thread(target=lambda: asyncio.run(send_async()) if asynchronous else send_blocking())
    sender.start()
    (kept, fds), (reply, none) = receive(pair[0], 2)
    sender.join()
    assert (kept.labels, [read_and_close(fd) for fd in fds]) == (labels, [b"file"])
    assert (reply.result, none) == ({"deps": ["x" * 300_000]}, [])
    assert read_and_close(descriptor) == b"", "the sender's descriptor is the sender's still"


def test_as_many_descriptors_as_a_message_may_have_go_in_one(
    pair: tuple[socket.socket, socket.socket], receive: Receive
) -> None:
    descriptor = pipe_with(b"")
    sending = Channel(pair[1], FromWorker)
    sending.send(Keep(labels=[]), [descriptor] * MOST_DESCRIPTORS)
    with pytest.raises(ValueError, match="251 descriptors in a message, 250 are the most"):
        sending.send(Keep(labels=[]), [descriptor] * (MOST_DESCRIPTORS + 1))
    ((_, fds),) = receive(pair[0], 1)
    assert len(set(fds)) == MOST_DESCRIPTORS
    for fd in [*fds, descriptor]:
        os.close(fd)
    sending.close()


def test_received_descriptors_are_not_inherited(pair: tuple[socket.socket, socket.socket], receive: Receive) -> None:
    send(pair[1], line(1, 1), b"")
    ((_, (fd,)),) = receive(pair[0], 1)
    assert not os.get_inheritable(fd)
    os.close(fd)


# What goes wrong


@pytest.mark.parametrize(
    ("garbage", "complaint"),
    [
        (b"GET / HTTP/1.1\n", "not understood"),
        (b'{"kind":"order","id":1}\n', "kind is 'order': Invalid value 'order'"),
        (b'{"kind":"reply"}\n', "missing required field `id`"),
        (b'{"kind":"reply","id":1,"fds":3}\n', "promises 3 descriptors, 1 have come"),
        (b'{"kind":"reply","id":1,"fds":-1}\n', "promises -1 descriptors"),
        (b"\xff\xfe\n", "not understood"),
        (b"\n", "not understood"),
    ],
)
def test_garbage_is_a_bad_message_and_its_descriptors_are_closed(
    pair: tuple[socket.socket, socket.socket], receive: Receive, garbage: bytes, complaint: str
) -> None:
    send(pair[1], garbage, b"lost")
    with pytest.raises(BadMessage, match=complaint):
        receive(pair[0], 1)


def test_descriptors_that_find_no_room_are_missing_from_their_own_message_and_no_other(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    send(pair[1], line(1, 3), b"a", b"b", b"c")
    arrivals = Arrivals(FromWorker)
    free = os.dup(pair[0].fileno())
    os.close(free)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + 1, hard))
    try:
        arrivals.receive(pair[0])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    send(pair[1], line(2) + line(3, 1), b"d")
    arrivals.receive(pair[0])
    received = [found for _ in range(3) if (found := arrivals.next()) is not None]
    assert contents(received) == [(1, [b"a"]), (2, []), (3, [b"d"])]
    arrivals.close()


def test_a_line_that_does_not_end_is_given_up(
    pair: tuple[socket.socket, socket.socket], receive: Receive, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(framing, "LONGEST_LINE", 1000)
    send(pair[1], b"x" * 1001, b"a", b"b")
    with pytest.raises(BadMessage, match="longer than 1000 bytes"):
        receive(pair[0], 1)


def test_the_other_side_leaving_in_the_middle_of_a_line_closes_its_descriptors(
    pair: tuple[socket.socket, socket.socket], receive: Receive
) -> None:
    send(pair[1], line(1, 1)[:-1], b"never whole")
    pair[1].close()
    with pytest.raises(ChannelClosed, match="the other side has closed"):
        receive(pair[0], 1)


def test_what_was_sent_before_the_other_side_left_is_received(
    pair: tuple[socket.socket, socket.socket], receive: Receive
) -> None:
    send(pair[1], line(1) + line(2, 1), b"x")
    pair[1].close()
    assert contents(receive(pair[0], 2)) == [(1, []), (2, [b"x"])]


def test_unread_messages_do_not_keep_their_descriptors_open(
    pair: tuple[socket.socket, socket.socket], receive: Receive
) -> None:
    send(pair[1], line(1) + line(2, 2), b"x", b"y")
    assert contents(receive(pair[0], 1)) == [(1, [])]


def test_text_that_is_no_unicode_is_refused_before_anything_is_sent(pair: tuple[socket.socket, socket.socket]) -> None:
    channel = Channel(pair[1], FromWorker)
    with pytest.raises(UsageError, match="not Unicode"):
        channel.send(Reply(id=1, result="/disk\ud800"))
    channel.send(Reply(id=2))
    channel.close()
    assert contents(receive_blocking(pair[0], 1)) == [(2, [])]


def test_sending_to_one_who_left_says_so(pair: tuple[socket.socket, socket.socket]) -> None:
    pair[0].close()
    channel = Channel(pair[1], FromWorker)
    with pytest.raises(ChannelClosed, match="Broken pipe"):
        channel.send(Reply(id=1))
    channel.close()


def test_a_closed_channel_says_so_and_may_be_closed_again(pair: tuple[socket.socket, socket.socket]) -> None:
    channel = Channel(pair[0], FromWorker)
    channel.close()
    channel.close()
    with pytest.raises(ChannelClosed):
        channel.send(Reply(id=1))
    for timeout in (None, 1.0):
        with pytest.raises(ChannelClosed):
            channel.receive(timeout)


def test_waiting_has_an_end_and_the_channel_goes_on(pair: tuple[socket.socket, socket.socket]) -> None:
    channel = Channel(pair[0], FromWorker)
    whole = line(3, 1)
    send(pair[1], whole[:5], b"late")
    with pytest.raises(TimeoutError, match=r"no answer within 0\.01 s"):
        channel.receive(0.01)
    pair[1].sendall(whole[5:])
    assert contents([channel.receive(30)]) == [(3, [b"late"])]
    channel.close()


def test_threads_that_send_at_once_do_not_mix_their_lines(pair: tuple[socket.socket, socket.socket]) -> None:
    channel = Channel(pair[1], FromWorker)
    senders = [
        threading.Thread(target=lambda who=who: [channel.send(Reply(id=who, result="x" * 50_000)) for _ in range(20)])
        for who in range(4)
    ]
    for sender in senders:
        sender.start()
    found = receive_blocking(pair[0], 80)
    for sender in senders:
        sender.join()
    channel.close()
    assert sorted(message.id for message, _ in found) == [who for who in range(4) for _ in range(20)]


# asyncio only


def on_loop(scenario: Callable[[AsyncChannel, socket.socket], Coroutine[Any, Any, None]]) -> None:
    """Runs it with a channel and the other end of its socket."""

    async def run() -> None:
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        with theirs:
            channel = AsyncChannel(ours, FromWorker)
            try:
                async with asyncio.timeout(60):
                    await scenario(channel, theirs)
            finally:
                await channel.close()

    asyncio.run(run())


def test_closing_wakes_a_waiting_receiver() -> None:
    async def scenario(channel: AsyncChannel, _theirs: socket.socket) -> None:
        waiting = asyncio.create_task(channel.receive())
        await asyncio.sleep(0)
        await channel.close()
        with pytest.raises(ChannelClosed, match="has been closed"):
            await waiting

    on_loop(scenario)


def test_closing_wakes_a_waiting_sender() -> None:
    async def scenario(channel: AsyncChannel, _theirs: socket.socket) -> None:
        waiting = asyncio.create_task(channel.send(Reply(id=1, result="x" * (4 << 20))))
        behind = asyncio.create_task(channel.send(Reply(id=2)))
        await asyncio.sleep(0)
        await channel.close()
        for sending in (waiting, behind):
            with pytest.raises(ChannelClosed):
                await sending

    on_loop(scenario)


def test_a_new_socket_with_the_number_of_a_closed_one_is_left_alone() -> None:
    async def scenario(channel: AsyncChannel, _theirs: socket.socket) -> None:
        former = channel.fileno()
        waiting = asyncio.create_task(channel.receive())
        await asyncio.sleep(0)
        await channel.close()
        ours, theirs = socket.socketpair()
        assert ours.fileno() == former
        successor = AsyncChannel(ours, FromWorker)
        received = asyncio.create_task(successor.receive())
        await asyncio.sleep(0)
        with pytest.raises(ChannelClosed):
            await waiting
        theirs.sendall(line(9))
        assert (await received)[0].id == 9
        await successor.close()
        theirs.close()

    on_loop(scenario)


def test_tasks_that_send_at_once_do_not_mix_their_lines() -> None:
    async def scenario(channel: AsyncChannel, theirs: socket.socket) -> None:
        other = AsyncChannel(theirs.dup(), FromWorker)
        sending = [asyncio.create_task(channel.send(Reply(id=who, result="x" * 400_000))) for who in range(8)]
        assert [(await other.receive())[0].id for _ in range(8)] == list(range(8))
        await asyncio.gather(*sending)
        await other.close()

    on_loop(scenario)


def test_a_send_cancelled_half_way_ends_the_channel() -> None:
    async def scenario(channel: AsyncChannel, _theirs: socket.socket) -> None:
        sending = asyncio.create_task(channel.send(Reply(id=1, result="x" * (4 << 20))))
        await asyncio.sleep(0)
        sending.cancel()
        await asyncio.wait([sending])
        assert sending.cancelled()
        with pytest.raises(ChannelClosed):
            await channel.send(Reply(id=2))

    on_loop(scenario)


def test_a_send_cancelled_before_its_turn_does_no_harm() -> None:
    async def scenario(channel: AsyncChannel, theirs: socket.socket) -> None:
        other = AsyncChannel(theirs.dup(), FromWorker)
        first = asyncio.create_task(channel.send(Reply(id=1, result="x" * (4 << 20))))
        second = asyncio.create_task(channel.send(Reply(id=2)))
        await asyncio.sleep(0)
        second.cancel()
        assert (await other.receive())[0].id == 1
        await first
        await channel.send(Reply(id=3))
        assert (await other.receive())[0].id == 3
        await other.close()

    on_loop(scenario)


def test_a_receive_that_is_cancelled_loses_nothing() -> None:
    async def scenario(channel: AsyncChannel, theirs: socket.socket) -> None:
        whole = line(4, 1)
        send(theirs, whole[:6], b"kept")
        waiting = asyncio.create_task(channel.receive())
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait([waiting])
        theirs.sendall(whole[6:])
        assert contents([await channel.receive()]) == [(4, [b"kept"])]

    on_loop(scenario)


def test_both_sides_may_send_more_than_the_buffers_hold_at_once() -> None:
    async def scenario(channel: AsyncChannel, theirs: socket.socket) -> None:
        other = AsyncChannel(theirs.dup(), FromWorker)
        long = Reply(id=1, result="x" * (4 << 20))
        try:
            async with asyncio.TaskGroup() as group:
                sent = [group.create_task(one.send(long)) for one in (channel, other)]
                got = [group.create_task(one.receive()) for one in (channel, other)]
            assert all(task.done() for task in sent)
            assert [task.result() for task in got] == [(long, []), (long, [])]
        finally:
            await other.close()

    on_loop(scenario)


def test_what_a_newer_peer_adds_is_ignored(pair: tuple[socket.socket, socket.socket], receive: Receive) -> None:
    pair[1].sendall(b'{"kind":"reply","id":1,"mood":"good"}\n')
    assert receive(pair[0], 1) == [(Reply(id=1), [])]
