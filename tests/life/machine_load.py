"""`Load`: requests of a virtual machine that go on while processes die, and are checked."""

from __future__ import annotations

import random
import select
import threading
import time
from collections.abc import Callable
from pathlib import Path

from vhost_user_driver import READ, SECTOR, WRITE, FrontEndError, Machine

SECTORS = 32768
BLOCK = 4096
PATIENCE = 60.0


class Load:
    """Writes and reads of a machine, and its monitor, which connects again when the back-end has hung up. Each request
    has a block of its own, whose contents are known. hang_ups, connections: how often it lost the connection, and how
    often it connected again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.machine = Machine.connected(path, queues=2)
        self.hang_ups = self.requests = self.connections = 0
        self._blocks = [bytes(BLOCK)] * (SECTORS * SECTOR // BLOCK)
        self._ends = threading.Event()
        self.failed = threading.Event()
        self._failed: list[BaseException] = []
        self._threads = [threading.Thread(target=self._checked, args=(self._watch,), name="monitor")]
        for index in range(2):
            self._threads.append(threading.Thread(target=self._checked, args=(self._drive, index), name="driver"))
        for thread in self._threads:
            thread.start()

    def _checked(self, function: Callable[..., None], *arguments: int) -> None:
        try:
            function(*arguments)
        except BaseException as error:
            self._failed.append(error)
            self.failed.set()

    def _watch(self) -> None:
        while not self._ends.is_set():
            control = self.machine.control.socket
            if select.select([control], [], [], 0.05)[0]:
                self.machine.hang_up()
                self.hang_ups += 1
                while not self._ends.is_set():
                    try:
                        self.machine.connect(self.path)
                        self.connections += 1
                        break
                    except (FrontEndError, ConnectionError, FileNotFoundError):
                        # The worker was killed during the start of the queues, or there is no socket at present.
                        self.machine.hang_up()
                        self.hang_ups += 1
                        self._ends.wait(0.01)

    def _drive(self, index: int) -> None:
        queue, chosen = self.machine.queues[index], random.Random(index)
        flying: dict[int, tuple[int, bytes | None]] = {}
        used: set[int] = set()
        while not self._ends.is_set() or flying:
            while len(flying) < Machine.SLOTS and not self._ends.is_set():
                block = chosen.randrange(index, len(self._blocks), 2)
                if block in used:
                    continue
                used.add(block)
                data = None if chosen.random() < 0.4 else chosen.randbytes(8) * (BLOCK // 8)
                sector = block * BLOCK // SECTOR
                asked = (READ, sector, BLOCK) if data is None else (WRITE, sector, 0, data)
                slot = queue.submit(*asked)
                flying[slot] = (block, data)
            slot, status, _ = queue.wait()
            block, data = flying.pop(slot)
            assert status == 0, f"block {block} has status {status}"
            if data is None:
                assert queue.data_of(slot, BLOCK) == self._blocks[block], f"block {block}"
            else:
                self._blocks[block] = data
            used.remove(block)
            self.requests += 1

    def finish(self) -> None:
        """Ends the load, if that was not done, and compares all blocks."""
        if self._ends.is_set():
            return
        self._ends.set()
        for thread in self._threads:
            thread.join(120)
            assert not thread.is_alive(), "a request was lost"
        if self._failed:
            raise self._failed[0]
        found = self.machine.read(0, SECTORS * SECTOR)
        for block, expected in enumerate(self._blocks):
            assert found[block * BLOCK : (block + 1) * BLOCK] == expected, f"block {block}"
        self.machine.close()

    def wait_for(self, requests: int) -> None:
        """Waits for so many more requests."""
        end = self.requests + requests
        deadline = time.monotonic() + PATIENCE
        while self.requests < end and not self.failed.wait(0.01):
            assert time.monotonic() < deadline, "requests wait for ever"
