"""Channels: every message with its own descriptors, however the bytes arrive; nothing leaks, nothing hangs."""

from __future__ import annotations

import array
import asyncio
import os
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blkloom.control import channel as channels
from blkloom.control import messages as m
from blkloom.control.channel import AsyncChannel, BadMessage, Channel, ChannelClosed
from blkloom.errors import UsageError

Pair = tuple[socket.socket, socket.socket]
LABEL = m.Label(device=0, load=0, role="file", key="r-/x")


@pytest.fixture(autouse=True)
def all_descriptors_closed() -> Iterator[None]:
    before = sorted(os.listdir("/proc/self/fd"))
    yield
    assert sorted(os.listdir("/proc/self/fd")) == before


@pytest.fixture
def pair() -> Iterator[Pair]:
    here, there = socket.socketpair()
    with here, there:
        yield here, there


@pytest.fixture
def ends() -> Iterator[tuple[Channel, Channel]]:
    here, there = socket.socketpair()
    left, right = Channel(here, m.FromWorker), Channel(there, m.FromWorker)
    yield left, right
    left.close()
    right.close()


def memfd(content: bytes) -> int:
    fd = os.memfd_create("test", os.MFD_CLOEXEC)
    os.write(fd, content)
    return fd


def content_of(fds: list[int]) -> list[bytes]:
    """What is in them; they are closed."""
    found = []
    for fd in fds:
        found.append(os.pread(fd, 100, 0))
        os.close(fd)
    return found


def keep(key: str) -> m.Keep:
    return m.Keep(labels=[m.Label(device=1, load=2, role="memory", key=key)])


def send(channel: Channel, message: object, *contents: bytes) -> None:
    fds = [memfd(content) for content in contents]
    try:
        channel.send(message, fds)
    finally:
        for fd in fds:
            os.close(fd)


# what arrives is what was sent


def test_a_message_arrives_with_its_descriptors(ends: tuple[Channel, Channel]) -> None:
    send(ends[0], keep("0"), b"first", b"second")
    message, fds = ends[1].receive(10)
    assert message == m.Keep(labels=keep("0").labels, fds=2)
    assert content_of(fds) == [b"first", b"second"]


def test_what_is_received_does_not_survive_an_exec(ends: tuple[Channel, Channel]) -> None:
    send(ends[0], keep("0"), b"x")
    _, fds = ends[1].receive(10)
    assert [os.get_inheritable(fd) for fd in fds] == [False]
    content_of(fds)


def test_messages_received_at_once_have_each_their_own_descriptors(ends: tuple[Channel, Channel]) -> None:
    for number in range(20):
        send(ends[0], keep(str(number)), *(b"%d.%d" % (number, at) for at in range(number % 3)))
    for number in range(20):
        message, fds = ends[1].receive(10)
        assert message.labels[0].key == str(number)
        assert content_of(fds) == [b"%d.%d" % (number, at) for at in range(number % 3)]


@given(st.data())
def test_a_message_in_pieces_is_the_message(data: st.DataObject) -> None:
    line = msgspec.json.encode(keep("é" * 5)) + b"\n" + msgspec.json.encode(m.Drop(labels=[])) + b"\n"
    cuts = sorted(data.draw(st.sets(st.integers(1, len(line) - 1), max_size=6)))
    here, there = socket.socketpair()
    with here:
        channel = Channel(there, m.FromWorker)
        for start, end in zip([0, *cuts], [*cuts, len(line)], strict=True):
            here.sendall(line[start:end])
        assert channel.receive(10) == (keep("é" * 5), [])
        assert channel.receive(10) == (m.Drop(labels=[]), [])
        channel.close()


def test_as_many_descriptors_as_a_message_may_have_arrive(ends: tuple[Channel, Channel]) -> None:
    send(ends[0], m.Keep(labels=[LABEL] * m.MOST_DESCRIPTORS), *(b"%d" % n for n in range(m.MOST_DESCRIPTORS)))
    _, fds = ends[1].receive(10)
    assert content_of(fds) == [b"%d" % n for n in range(m.MOST_DESCRIPTORS)]


def test_more_descriptors_than_a_message_may_have_are_refused_before_anything_is_sent(
    ends: tuple[Channel, Channel],
) -> None:
    with pytest.raises(ValueError, match=str(m.MOST_DESCRIPTORS)):
        ends[0].send(keep("0"), [0] * (m.MOST_DESCRIPTORS + 1))
    ends[0].send(m.Drop(labels=[]))
    assert ends[1].receive(10) == (m.Drop(labels=[]), [])


def test_text_that_is_not_utf8_is_refused_before_anything_is_sent(ends: tuple[Channel, Channel]) -> None:
    with pytest.raises(UsageError, match="UTF-8"):
        ends[0].send(keep(os.fsdecode(b"\xff")))
    ends[0].send(m.Drop(labels=[]))
    assert ends[1].receive(10) == (m.Drop(labels=[]), [])


def test_a_message_longer_than_the_sockets_buffers_arrives_whole(ends: tuple[Channel, Channel]) -> None:
    message = m.Reply(id=1, result="x" * (4 << 20))
    thread = threading.Thread(target=send, args=(ends[0], message))
    thread.start()
    received, _ = ends[1].receive(60)
    thread.join()
    assert received.result == message.result


def test_unknown_fields_of_a_newer_peer_are_ignored(pair: Pair) -> None:
    pair[0].sendall(b'{"kind":"hello","protocol":1,"mood":"good"}\n')
    channel = Channel(pair[1], m.FromClient)
    assert channel.receive(10) == (m.Hello(), [])
    channel.close()


# what goes wrong


def test_the_other_sides_end_is_an_error_after_everything_it_said(ends: tuple[Channel, Channel]) -> None:
    ends[0].send(m.Drop(labels=[]))
    ends[0].close()
    assert ends[1].receive(10) == (m.Drop(labels=[]), [])
    with pytest.raises(ChannelClosed):
        ends[1].receive(10)
    with pytest.raises(ChannelClosed):
        ends[1].send(m.Drop(labels=[]))


def test_an_end_within_a_message_is_an_end(pair: Pair) -> None:
    pair[0].sendall(b'{"kind":"hel')
    pair[0].close()
    channel = Channel(pair[1], m.FromClient)
    with pytest.raises(ChannelClosed):
        channel.receive(10)
    channel.close()


def test_no_answer_in_time_is_an_error_and_leaves_the_channel_whole(ends: tuple[Channel, Channel]) -> None:
    with pytest.raises(TimeoutError, match=r"0\.01 s"):
        ends[1].receive(0.01)
    ends[0].send(m.Drop(labels=[]))
    assert ends[1].receive(10) == (m.Drop(labels=[]), [])


def test_a_channel_closed_here_says_so(ends: tuple[Channel, Channel]) -> None:
    ends[1].close()
    with pytest.raises(ChannelClosed):
        ends[1].receive(10)


@pytest.mark.parametrize(
    "line",
    [
        b"not json\n",
        b"[]\n",
        b'{"kind":"sing"}\n',
        b'{"id":1}\n',
        b'{"kind":"request","id":"one","call":{"verb":"reap"}}\n',
        b'{"kind":"request","id":1,"call":{"verb":"sing"}}\n',
        b"\xff\xfe\n",
        b"\n",
    ],
    ids=["text", "list", "unknown kind", "no kind", "wrong type", "unknown verb", "no UTF-8", "empty"],
)
def test_what_is_no_message_is_refused(pair: Pair, line: bytes) -> None:
    channel = Channel(pair[1], m.FromClient)
    pair[0].sendall(line)
    with pytest.raises(BadMessage):
        channel.receive(10)
    channel.close()


@pytest.mark.parametrize("count", [-1, 1, 10**9])
def test_promised_descriptors_must_come(pair: Pair, count: int) -> None:
    channel = Channel(pair[1], m.FromWorker)
    pair[0].sendall(b'{"kind":"keep","labels":[],"fds":%d}\n' % count)
    with pytest.raises(BadMessage, match="descriptors"):
        channel.receive(10)
    channel.close()


def test_a_line_without_end_is_cut_off(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channels, "LONGEST_LINE", 1000)
    channel = Channel(pair[1], m.FromClient)
    pair[0].sendall(b" " * 1001)
    with pytest.raises(BadMessage, match="longer than 1000"):
        channel.receive(10)
    channel.close()


def test_descriptors_nobody_asked_for_are_closed_with_the_channel(pair: Pair) -> None:
    channel = Channel(pair[1], m.FromWorker)
    fd = memfd(b"x")
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd, fd, fd]))]
    pair[0].sendmsg([b'{"kind":"hello"}\n{"kind":"keep"'], rights)
    os.close(fd)
    assert channel.receive(10) == (m.Hello(), [])
    channel.close()  # the fixture looks


# the same on an event loop

Scene = Callable[[AsyncChannel, AsyncChannel], Awaitable[None]]


def play(scene: Scene, *, buffer: int = 0) -> None:
    async def whole() -> None:
        here, there = socket.socketpair()
        if buffer:
            for end in (here, there):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
        left, right = AsyncChannel(here, m.FromWorker), AsyncChannel(there, m.FromWorker)
        try:
            async with asyncio.timeout(60):
                await scene(left, right)
        finally:
            await left.close()
            await right.close()

    asyncio.run(whole())


def test_async_a_message_arrives_with_its_descriptors() -> None:
    async def scene(left: AsyncChannel, right: AsyncChannel) -> None:
        fd = memfd(b"x")
        await left.send(keep("0"), [fd])
        os.close(fd)
        message, fds = await right.receive()
        assert message.labels == keep("0").labels
        assert content_of(fds) == [b"x"]

    play(scene)


def test_async_long_messages_of_many_senders_do_not_mix_and_keep_their_descriptors() -> None:
    async def scene(left: AsyncChannel, right: AsyncChannel) -> None:
        async def say(number: int) -> None:
            fd = memfd(b"%d" % number)
            try:
                await left.send(m.Keep(labels=[m.Label(device=number, load=0, role="file", key="x" * 50_000)]), [fd])
            finally:
                os.close(fd)

        async with asyncio.TaskGroup() as group:
            for number in range(10):
                group.create_task(say(number))
            for _ in range(10):
                message, fds = await right.receive()
                assert content_of(fds) == [b"%d" % message.labels[0].device]

    play(scene, buffer=4096)


def test_async_both_sides_may_send_more_than_the_buffers_hold_at_once() -> None:
    async def scene(left: AsyncChannel, right: AsyncChannel) -> None:
        long = m.Reply(id=1, result="x" * 500_000)
        async with asyncio.TaskGroup() as group:
            for one, other in ((left, right), (right, left)):
                group.create_task(one.send(long))
                group.create_task(other.receive())

    play(scene, buffer=4096)


def test_async_closing_wakes_who_waits() -> None:
    async def scene(left: AsyncChannel, right: AsyncChannel) -> None:
        receiving = asyncio.create_task(right.receive())
        sending = asyncio.create_task(right.send(m.Reply(id=1, result="x" * 500_000)))
        await asyncio.sleep(0)  # both wait now
        await right.close()
        for waiting in (receiving, sending):
            with pytest.raises(ChannelClosed):
                await waiting
        with pytest.raises(ChannelClosed):
            await right.send(m.Drop(labels=[]))

    play(scene, buffer=4096)


def test_async_a_send_cancelled_half_way_ends_the_channel_and_not_the_next_message() -> None:
    async def scene(left: AsyncChannel, right: AsyncChannel) -> None:
        sending = asyncio.create_task(left.send(m.Reply(id=1, result="x" * 500_000)))
        await asyncio.sleep(0)
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending
        with pytest.raises(ChannelClosed):
            await left.send(m.Drop(labels=[]))
        with pytest.raises(ChannelClosed):
            await right.receive()

    play(scene, buffer=4096)


def test_async_a_receive_that_is_cancelled_loses_nothing() -> None:
    async def scene(left: AsyncChannel, right: AsyncChannel) -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await right.receive()
        await left.send(m.Drop(labels=[]))
        assert await right.receive() == (m.Drop(labels=[]), [])

    play(scene)


def test_async_the_other_sides_end_is_an_error() -> None:
    async def scene(left: AsyncChannel, right: AsyncChannel) -> None:
        await left.close()
        with pytest.raises(ChannelClosed):
            await right.receive()

    play(scene)
