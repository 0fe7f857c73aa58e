"""Only the supervisor's user and root may connect to a supervisor."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from blkloom.control import messages as m
from blkloom.control.channel import Channel
from blkloom.control.framing import ChannelClosed

from .conftest import Life

NOBODY = 65534


@contextmanager
def another_user() -> Iterator[None]:
    """Another user, for what is connected meanwhile (unix(7): SO_PEERCRED has the effective user)."""
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be another user for a moment")
def test_another_user_is_told_why_and_hung_up_on_even_where_files_let_him_in(life: Life) -> None:
    for path, mode in ((life.run_dir.parent, 0o711), (life.run_dir, 0o711), (life.run_dir / "control.sock", 0o666)):
        path.chmod(mode)
    connected = socket.socket(socket.AF_UNIX)
    with another_user():
        connected.connect(str(life.run_dir / "control.sock"))
    channel = Channel(connected, m.ToClient)
    refused, _ = channel.receive(30)
    assert isinstance(refused, m.Failure)
    assert f"you are user {NOBODY}" in refused.what
    with pytest.raises(ChannelClosed):
        channel.receive(30)
    channel.close()
    life.run_dir.chmod(0o700)
    with life.client() as client:
        assert client.info() == []


def test_the_control_socket_is_the_owners_alone(life: Life) -> None:
    assert (life.run_dir / "control.sock").stat().st_mode & 0o777 == 0o600
    assert life.run_dir.stat().st_mode & 0o777 == 0o700
