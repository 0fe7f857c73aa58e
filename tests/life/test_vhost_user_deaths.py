"""Processes that are killed at any step of a change at the disk of a virtual machine: no request is lost."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from blkloom.control.client import Client
from blkloom.errors import BlkloomError
from kill_points import KillPoints
from long_runs import LONG
from vhost_user_driver import SECTOR, WRITE, FrontEnd, Machine

from .conftest import Life, a_life, info, until
from .deaths import SUPERVISOR, killed_at
from .machine_load import BLOCK, SECTORS, Load

pytestmark = pytest.mark.timeout(1200 if LONG else 280)
WORKER = "fork of blkloom.worker"
EACH = 1 if LONG else 5
"""Every how many steps a process is killed; `make survival`: at each."""
REQUESTS = 60
"""After each death."""


class Deaths:
    """A supervisor with a device on a file, which is the disk of a virtual machine; and kill points."""

    def __init__(self, life: Life, points: KillPoints, file: Path) -> None:
        self.life, self.points, self.file = life, points, file
        self.path = life.run_dir / "vhost" / "disk"
        with life.client() as client:
            client.create("disk", table=self.table(SECTORS))
            client.export("disk", kind="vhost-user")
        self.load = Load(self.path)

    def table(self, sectors: int) -> str:
        return f"0 {sectors} loop {self.file}"

    def killed(self, change: Callable[[Client], None], role: str, step: int, victims: str) -> str:
        """See `killed_at`."""
        return killed_at(self.life, self.points, change, role, step, victims)

    def settle(self) -> None:
        """Completes or repeats what was interrupted; the requests go on."""
        with self.life.client() as client:
            until(client, "disk", lambda found: found.worker > 0)
            if info(client, "disk").state == "SUSPENDED":
                client.resume("disk")
            if all(export.kind != "vhost-user" for export in info(client, "disk").exports):
                client.export("disk", kind="vhost-user")
        self.load.wait_for(REQUESTS)

    def connect(self, _: Client) -> None:
        """The monitor loses its connection, and connects again."""
        before = self.load.connections
        with suppress(OSError):
            self.load.machine.control.socket.shutdown(socket.SHUT_RDWR)
        while self.load.connections == before and not self.points.is_reached:
            self.load.failed.wait(0.01)

    def upgrade(self, client: Client) -> None:
        client.upgrade()

    def resize(self, client: Client) -> None:
        """To the other of two sizes."""
        client.load("disk", table=self.table(SECTORS if info(client, "disk").size > SECTORS * SECTOR else 2 * SECTORS))
        client.resume("disk")

    def export(self, client: Client) -> None:
        """The disk is taken away and given back."""
        with suppress(BlkloomError):  # it was taken away before a death
            client.unexport("disk", "auto-vhost-user")
        client.export("disk", kind="vhost-user")


@pytest.fixture
def deaths(tmp_path: Path) -> Iterator[Deaths]:
    points = KillPoints(tmp_path)
    file = tmp_path / "disk.img"
    with file.open("wb") as made:
        made.truncate(2 * SECTORS * SECTOR)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in points.environment.items():
            patch.setenv(name, value)
        with a_life() as life:
            deaths = Deaths(life, points, file)
            try:
                yield deaths
            finally:
                points.disarm()
                deaths.load.finish()


@pytest.mark.parametrize(
    ("change", "role", "choices"),
    [
        ("connect", WORKER, ["itself", "supervisor itself", "supervisor"]),
        ("upgrade", WORKER, ["itself", "supervisor itself", "supervisor"]),
        ("upgrade", SUPERVISOR, ["worker", "itself", "worker itself"]),
        ("resize", WORKER, ["itself", "supervisor itself", "supervisor"]),
        ("resize", SUPERVISOR, ["worker", "itself", "worker itself"]),
        ("export", WORKER, ["itself", "supervisor itself", "supervisor"]),
        ("export", SUPERVISOR, ["worker", "itself", "worker itself"]),
    ],
)
def test_no_request_is_lost_after_a_death_at_any_step(
    deaths: Deaths, change: str, role: str, choices: list[str]
) -> None:
    thorough = LONG or "BLKLOOM_FUZZ_CASES" in os.environ
    for turn in range(len(choices) if thorough else 1):
        for number, step in enumerate(count(1, 1 if thorough else EACH)):
            victims = choices[(number + turn) % len(choices)]
            reached = ""
            try:
                reached = deaths.killed(getattr(deaths, change), role, step, victims)
                deaths.settle()
            except BaseException as error:
                error.add_note(f"step {step} of {change}, {reached or 'not reached'}: to be killed was {victims}")
                raise
            if not reached:
                assert step > 1
                break


class Died(Exception):
    """The program of the virtual machine is gone."""


def test_a_machine_that_dies_at_any_message_makes_way_for_the_next(deaths: Deaths) -> None:
    """Before its death, or after it, another worker takes over."""
    deaths.load.finish()

    def send(self: FrontEnd, *message: Any, flags: int = 1) -> None:
        nonlocal left
        if not left:
            raise Died
        left -= 1
        original(self, *message, flags=flags)

    original = FrontEnd.send
    with pytest.MonkeyPatch.context() as patch, deaths.life.client() as client:
        patch.setattr(FrontEnd, "send", send)
        for messages in count(0, EACH):
            left, upgrade_first = messages, bool(messages & 1)
            machine, died = Machine(queues=2), False
            try:
                machine.connect(deaths.path)
                for at in range(8):
                    machine.queues[0].submit(WRITE, 8 * at, 0, bytes([messages]) * BLOCK)
            except Died:
                died = True
            if upgrade_first:
                client.upgrade()
            machine.close()
            if not upgrade_first:
                client.upgrade()
            left = -1
            with Machine.connected(deaths.path, queues=2) as following:
                following.write(0, b"f" * BLOCK, queue=1)
                assert following.read(0, BLOCK) == b"f" * BLOCK, f"after {messages} messages"
            if not died:
                break
    assert messages > 10
