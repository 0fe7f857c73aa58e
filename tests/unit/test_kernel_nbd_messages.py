"""Messages to the kernel's NBD client, compared with those of pyroute2."""

from __future__ import annotations

import struct

import pytest
from pyroute2.netlink import genlmsg, nla

from blkloom.export.kernel_nbd import driver
from blkloom.export.kernel_nbd.netlink import attribute, message, parse_attributes, parse_messages


class _Theirs(genlmsg):  # type: ignore[misc]
    nla_map = (
        ("UNSPEC", "none"),
        ("INDEX", "uint32"),
        ("SIZE_BYTES", "uint64"),
        ("BLOCK_SIZE_BYTES", "uint64"),
        ("TIMEOUT", "uint64"),
        ("SERVER_FLAGS", "uint64"),
        ("CLIENT_FLAGS", "uint64"),
        ("SOCKETS", "sockets"),
        ("DEAD_CONN_TIMEOUT", "uint64"),
        ("DEVICE_LIST", "hex"),
        ("BACKEND_IDENTIFIER", "asciiz"),
    )

    class sockets(nla):  # type: ignore[misc]
        nla_map = (("UNSPEC", "none"), ("ITEM", "item"))

        class item(nla):  # type: ignore[misc]
            nla_map = (("UNSPEC", "none"), ("FD", "uint32"))


def _encoded_by_pyroute2(command: driver.Command, attributes: list[tuple[str, object]]) -> bytes:
    theirs = _Theirs()
    theirs["header"] = {"type": 42, "flags": 5, "sequence_number": 7, "pid": 0}
    theirs["cmd"], theirs["version"] = int(command), 1
    theirs["attrs"] = attributes
    theirs.encode()
    return bytes(theirs.data)


@pytest.mark.parametrize("sockets", [1, 2, 8])
def test_connect_is_encoded_as_pyroute2_encodes_it(sockets: int) -> None:
    descriptors = list(range(10, 10 + sockets))
    given = driver.given(
        number=3,
        size=0,
        block_size=4096,
        flags=driver.WRITABLE,
        timeout=30,
        dead_timeout=300,
        tag="blkloom-0123-45",
        sockets=descriptors,
    )
    assert message(42, driver.Command.CONNECT, given, version=1, sequence=7) == _encoded_by_pyroute2(
        driver.Command.CONNECT,
        [
            ("INDEX", 3),
            ("SIZE_BYTES", 0),
            ("BLOCK_SIZE_BYTES", 4096),
            ("TIMEOUT", 30),
            ("SERVER_FLAGS", 0b1_0110_1101),
            ("DEAD_CONN_TIMEOUT", 300),
            ("BACKEND_IDENTIFIER", "blkloom-0123-45"),
            ("SOCKETS", {"attrs": [("ITEM", {"attrs": [("FD", fd)]}) for fd in descriptors]}),
        ],
    )


def test_only_what_is_given_is_sent() -> None:
    assert driver.given(number=0, size=1 << 40) == [(1, bytes(4)), (2, struct.pack("=Q", 1 << 40))]
    assert driver.given(tag="x") == [(10, b"x\0")]


@pytest.mark.parametrize("payload", [b"", b"a", b"abcd", b"abcde"])
def test_attributes_are_read_as_they_are_written(payload: bytes) -> None:
    data = attribute(1, payload) + attribute(9, b"after")
    assert parse_attributes(data) == [(1, payload), (9, b"after")]


def test_the_flag_of_a_nested_attribute_is_no_part_of_its_number() -> None:
    assert parse_attributes(attribute(9 | 1 << 15, b"")) == [(9, b"")]


@pytest.mark.parametrize("cut", [1, 3, 5, 7])
def test_what_is_cut_off_is_refused(cut: int) -> None:
    with pytest.raises(ValueError, match="netlink"):
        parse_attributes(attribute(1, b"abcd")[:cut])
    with pytest.raises(ValueError, match="netlink"):
        parse_messages(message(42, 1, [], version=1, sequence=7)[:cut])


def test_messages_are_read_as_they_are_written() -> None:
    data = message(42, 1, [(1, bytes(4))], version=1, sequence=7)
    assert parse_messages(data * 2) == [(42, 7, data[16:])] * 2
