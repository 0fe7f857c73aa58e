"""Nodes whose worker does not answer: no command waits for the node, and its users can always be freed."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from blkloom.control.client import Client
from conformance.file_systems import run

from .attached import disk, life, said, writing
from .conftest import Life, info, until

__all__ = ["disk", "life"]
pytestmark = pytest.mark.timeout(200)


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """The process does nothing meanwhile."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@pytest.mark.parametrize("via", ["loop", "fuse"])
def test_users_of_a_node_whose_worker_does_not_answer_are_freed(
    blkloom: str, client: Client, disk: str, life: Life, via: str
) -> None:
    node = client.attach(disk, via=via).node
    with writing(node.path) as process, stopped(info(client, disk).worker):
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
        for verb in ("ls", "ls --tree", "info", "info -c", "table", "deps", "stats", "mknodes", "export --list"):
            said(blkloom, life, *verb.split())
        client.detach(disk, force=True)
        assert process.stdout is not None
        assert process.stdout.read().strip() in (os.strerror(errno.EIO), os.strerror(errno.ECONNABORTED))
        assert info(client, disk).node is None
        assert client.reap() == []
    until(client, disk, lambda found: found.connections == 0)  # the worker tells that when it runs again
    client.attach(disk, via=via)
    run("dd", f"if={node.link}", "of=/dev/null", "count=1", "status=none")
    client.detach(disk)
