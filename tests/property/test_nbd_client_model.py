"""The target `nbd` on a server that loses connections at any point of a request, compared with a list of bytes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies as st

import blkloom
from nbd_by_hand import DISC, SIZE, ByHand, Connection, Honest

pytestmark = pytest.mark.timeout(300)

BLOCK = 512
BLOCKS = 32
FAULTS = ["none", "none", "none", "none", "unanswered", "not executed", "half answered", "garbage"]

operations = st.lists(
    st.tuples(
        st.sampled_from(["write", "write", "read", "zero", "flush", "batch", "extents"]),
        st.integers(0, BLOCKS - 1),
        st.integers(1, 8),
        st.integers(0, 255),
        st.booleans(),
    ),
    max_size=40,
)


class Losing(Honest):
    """Loses connections as the list says: one word for each request. Each loss ends the connection only after the
    requests before it have ended.
    """

    def __init__(self, faults: list[str]) -> None:
        super().__init__()
        self._faults: Iterator[str] = iter(faults)

    def serve(self, connection: Connection) -> None:
        while (request := connection.request()) is not None and request.kind != DISC:
            fault = next(self._faults, "none")
            if fault == "not executed":
                return
            reply = self.execute(connection, request)
            if fault == "unanswered":
                return
            if fault == "half answered":
                connection.send(reply[: len(reply) // 2])
                return
            if fault == "garbage":
                connection.send(b"garbage that is no reply")
                while (late := connection.request()) is not None and late.kind != DISC:
                    self.execute(connection, late)
                return
            connection.send(reply)


@hypothesis.settings(
    max_examples=30, deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
@hypothesis.given(
    work=operations, faults=st.lists(st.sampled_from(FAULTS), max_size=20), connections=st.sampled_from([1, 3])
)
def test_a_device_is_a_list_of_bytes_whatever_connections_are_lost(
    tmp_path_factory: pytest.TempPathFactory,
    work: list[tuple[str, int, int, int, bool]],
    faults: list[str],
    connections: int,
) -> None:
    folder: Path = tmp_path_factory.mktemp("nbd")
    server, model = Losing(faults), bytearray(SIZE)
    with (
        ByHand(folder, server.serve) as by_hand,
        blkloom.open(f"0 {SIZE // 512} nbd {by_hand.uri} 1 connections={connections}") as device,
    ):
        for kind, block, count, byte, fua in work:
            at, length = block * BLOCK, count * BLOCK
            match kind:
                case "write":
                    data = bytes([byte]) * length
                    device.pwrite(data, at, fua=fua)
                    model[at : at + length] = data
                case "zero":
                    device.write_zeroes(at, length)
                    model[at : at + length] = bytes(length)
                case "flush":
                    device.flush()
                case "extents":
                    assert sum(found[1] for found in device.extents(at, length)) == length
                case "batch":  # together, in no order
                    buffers = [bytes([byte ^ number]) * BLOCK for number in range(count)]
                    requests = [("w", data, at + number * BLOCK) for number, data in enumerate(buffers)]
                    assert device.batch(requests) == [BLOCK] * count
                    model[at : at + length] = b"".join(buffers)
                case _:
                    assert device.pread(length, at) == model[at : at + length]
        assert device.pread(BLOCKS * BLOCK * 2, 0) == model[: BLOCKS * BLOCK * 2]
    assert server.memory == model
