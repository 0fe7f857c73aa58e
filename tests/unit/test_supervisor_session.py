"""Requests of one client: the limit of concurrent ones, and errors for invalid ones."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import socket
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from blkloom.control import messages as m
from blkloom.control.async_channel import AsyncChannel
from blkloom.control.endpoint import Opener
from blkloom.supervisor import session as sessions
from blkloom.supervisor.session import AT_ONCE, Session
from left_behind import no_descriptor_left

pytestmark = pytest.mark.timeout(60)

Answer = Callable[[m.ClientCall, Opener], Awaitable[Any]]
MANY = 20_000


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """The supervisor's end and the client's."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def begin(ours: socket.socket, answer: Answer, *, stall: float | None = None) -> asyncio.Task[None]:
    """A session whose calls are answered so."""

    async def answered(call: m.ClientCall, opener: Opener, _session: Session, _request: int) -> Any:
        return await answer(call, opener)

    channel = AsyncChannel(ours, m.FromClient, stall=stall)
    return asyncio.create_task(Session(channel, m.Hello(), answered, greet=False).run())


def line(call: dict[str, Any], request: int = 1) -> bytes:
    return json.dumps({"kind": "request", "id": request, "call": call}).encode() + b"\n"


async def reader_of(theirs: socket.socket) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_unix_connection(sock=theirs.dup())


async def told(reader: asyncio.StreamReader) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(await reader.readline())
    return found


def test_a_few_requests_of_a_client_are_worked_on_and_the_others_wait_unread(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    async def run() -> None:
        begun: list[asyncio.Future[None]] = []
        full = asyncio.Event()

        async def answer(call: m.ClientCall, _opener: Opener) -> None:
            begun.append(asyncio.get_running_loop().create_future())
            if len(begun) == AT_ONCE:
                full.set()
            await begun[-1]

        session = begin(pair[0], answer)
        reader, writer = await reader_of(pair[1])
        writer.write(line({"verb": "info"}) * MANY)
        await full.wait()
        assert len(asyncio.all_tasks()) <= AT_ONCE + 3
        for done in range(100):
            begun[done].set_result(None)
            assert (await told(reader))["kind"] == "reply"
            assert len(begun) <= done + 1 + AT_ONCE
        session.cancel()
        writer.close()

    asyncio.run(run())


def test_what_waits_for_events_keeps_no_other_request_waiting(pair: tuple[socket.socket, socket.socket]) -> None:
    async def run() -> None:
        never = asyncio.Event()

        async def answer(call: m.ClientCall, _opener: Opener) -> str:
            if isinstance(call, m.Wait):
                await never.wait()
            return "here"

        session = begin(pair[0], answer)
        reader, writer = await reader_of(pair[1])
        writer.write(line({"verb": "wait", "device": "a"}) * (4 * AT_ONCE) + line({"verb": "info"}, 7))
        assert await told(reader) == {"kind": "reply", "id": 7, "result": "here"}
        session.cancel()
        writer.close()

    asyncio.run(run())


def test_waits_beyond_the_limit_are_refused(
    pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "MOST_WAITS", 3)

    async def run() -> None:
        async def answer(call: m.ClientCall, _opener: Opener) -> None:
            await asyncio.Event().wait()

        session = begin(pair[0], answer)
        reader, writer = await reader_of(pair[1])
        for request in range(1, 5):
            writer.write(line({"verb": "wait", "device": "a"}, request))
        refused = await told(reader)
        assert (refused["id"], refused["errno"]) == (4, errno.EAGAIN)
        assert "waits for 3 events already" in refused["what"]
        session.cancel()
        writer.close()

    asyncio.run(run())


def test_files_are_opened_although_more_requests_than_are_worked_on_stand_before_the_answer(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    count = 10 * AT_ONCE

    async def run() -> None:
        async def answer(call: m.ClientCall, opener: Opener) -> None:
            os.close(await opener(m.OpenFile(id=0, request=0, path="x"), ()))

        session = begin(pair[0], answer)
        pair[1].sendall(line({"verb": "info"}) * count)
        left = count
        with pair[1].dup() as client:
            client.setblocking(False)
            loop = asyncio.get_running_loop()
            text = b""
            while left:
                text += await loop.sock_recv(client, 65536)
                *lines, text = text.split(b"\n")
                for said in map(json.loads, lines):
                    if said["kind"] == "reply":
                        left -= 1
                        continue
                    opened = json.dumps({"kind": "opened", "id": said["id"], "fds": 1}).encode() + b"\n"
                    with open(os.devnull, "rb") as file:
                        socket.send_fds(client, [opened], [file.fileno()])
        session.cancel()

    asyncio.run(run())


def test_a_client_that_reads_no_answers_is_bounded_and_cut(
    pair: tuple[socket.socket, socket.socket], caplog: pytest.LogCaptureFixture
) -> None:
    calls = 0

    async def run() -> None:
        async def answer(call: m.ClientCall, _opener: Opener) -> str:
            nonlocal calls
            calls += 1
            return "x" * (1 << 20)

        session = begin(pair[0], answer, stall=0.05)
        pair[1].sendall(line({"verb": "info"}) * 1000)
        await session

    asyncio.run(run())
    assert calls <= AT_ONCE
    assert "a client that reads no answers was dropped: the other side has taken nothing for 0.05 s" in caplog.text


BIG = 10**30


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ({"verb": "export", "device": "a", "port": 65536}, "port is 65536: Expected `int` <= 65535"),
        ({"verb": "export", "device": "a", "port": -1}, "port is -1: Expected `int` >= 0"),
        ({"verb": "suspend", "device": "a", "timeout": -0.5}, "timeout is -0.5: Expected `float` >= 0"),
        ({"verb": "resume", "device": "a", "timeout": 1e300}, "timeout is 1e+300: Expected `float` <= 1000000000"),
        ({"verb": "message", "device": "a", "sector": -1, "text": "x"}, "sector is -1: Expected `int` >= 0"),
        ({"verb": "message", "device": "a", "sector": 1 << 63, "text": "x"}, f"sector is {1 << 63}"),
        ({"verb": "message", "device": "a", "sector": BIG, "text": "x"}, f"sector is {BIG}"),
        ({"verb": "message", "device": "a", "sector": 10**4000, "text": "x"}, "sector is 1000"),
        ({"verb": "read", "device": "a", "offset": -1, "length": 1}, "offset is -1"),
        ({"verb": "read", "device": "a", "offset": 0, "length": BIG}, f"length is {BIG}"),
        ({"verb": "wait", "device": "a", "event": -1}, "event is -1"),
        ({"verb": "create", "name": "a", "loop": {"sizelimit": -1}}, "sizelimit is -1"),
        ({"verb": "create", "name": 5}, "name is 5: Expected `str`, got `int`"),
        ({"verb": "suspend", "device": "a", "timeout": "soon"}, "timeout is 'soon'"),
        ({"verb": "dance"}, "verb is 'dance': Invalid value 'dance'"),
        ({"verb": "remove"}, "missing required field `device`"),
    ],
)  # fmt: skip
def test_a_value_that_is_none_or_out_of_range_is_a_failure_of_its_request(
    pair: tuple[socket.socket, socket.socket], call: dict[str, Any], says: str
) -> None:
    async def run() -> None:
        async def answer(call: m.ClientCall, _opener: Opener) -> str:
            assert call == m.GetInfo()
            return "fine"

        session = begin(pair[0], answer)
        reader, writer = await reader_of(pair[1])
        writer.write(line(call, 3) + line({"verb": "info"}, 4))
        failure = await told(reader)
        assert (failure["kind"], failure["id"], failure["type"]) == ("failure", 3, "UsageError")
        assert says in failure["what"]
        assert await told(reader) == {"kind": "reply", "id": 4, "result": "fine"}
        session.cancel()
        writer.close()

    asyncio.run(run())


@pytest.mark.parametrize("number", [0, -5, 4096, BIG])
def test_an_errno_that_is_none_harms_nothing(pair: tuple[socket.socket, socket.socket], number: int) -> None:
    async def run() -> None:
        async def answer(call: m.ClientCall, _opener: Opener) -> str:
            return "fine"

        session = begin(pair[0], answer)
        reader, writer = await reader_of(pair[1])
        writer.write(
            json.dumps({"kind": "refused", "id": 1, "errno": number}).encode() + b"\n" + line({"verb": "info"})
        )
        assert f"errno is {number}" in (await told(reader))["what"]
        assert (await told(reader))["result"] == "fine"
        session.cancel()
        writer.close()

    asyncio.run(run())


def test_descriptors_that_no_message_promises_end_the_conversation(pair: tuple[socket.socket, socket.socket]) -> None:
    async def run() -> None:
        async def answer(call: m.ClientCall, _opener: Opener) -> None:
            raise AssertionError("nothing was asked")

        with no_descriptor_left():
            session = begin(pair[0], answer)
            with open(os.devnull, "rb") as file:
                for _ in range(3):
                    socket.send_fds(pair[1], [b" "], [file.fileno()] * m.MOST_DESCRIPTORS)
                await session
        assert pair[0].fileno() == -1
        assert b"that no message promises" in pair[1].recv(65536)

    asyncio.run(run())
