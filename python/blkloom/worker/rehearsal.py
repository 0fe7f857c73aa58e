"""A worker's first moments, lived in the zygote before any worker is forked.

What Python imports, compiles and adapts to on the way is then shared by all workers, in time and in
memory: a page that none of them writes to exists once. Leaves no thread and no file behind.
"""

from __future__ import annotations

import asyncio
import os
import socket
import tempfile

from blkloom.control.async_channel import AsyncChannel
from blkloom.control.failures import to_exception
from blkloom.control.messages import (
    Failure,
    FromWorker,
    Hello,
    Hold,
    Leave,
    Reply,
    Serve,
    WorkerCall,
    WorkerLoad,
    WorkerRequest,
    WorkerResume,
    WorkerStatus,
)
from blkloom.control.states import DeviceState, ExportState, Loaded
from blkloom.memory import LEAST_BUDGET
from blkloom.target.registry import Targets
from blkloom.worker.main import Worker


def rehearse(targets: Targets) -> None:
    """Lives them once. More than once is worth it: Python adapts its code to what it has seen some times."""
    with tempfile.TemporaryDirectory(prefix="blkloom-") as run_dir:
        os.mkdir(os.path.join(run_dir, "workers"))
        asyncio.run(_rehearsal(targets, run_dir))


async def _rehearsal(targets: Targets, run_dir: str) -> None:
    ours, theirs = socket.socketpair()
    channel = AsyncChannel(ours, FromWorker)
    life = asyncio.create_task(Worker("rehearsal", run_dir, targets, LEAST_BUDGET).live(theirs))
    device = DeviceState(name="rehearsal", minor=0)
    calls: list[WorkerCall] = [
        Hold(devices=[device]),
        WorkerLoad(minor=0, loaded=Loaded(load=1, table="0 8 zero")),
        WorkerResume(minor=0),
        Serve(minor=0, export=ExportState(id="1", name="rehearsal")),
        WorkerStatus(minor=0),
        Leave(),
    ]
    await channel.send(Hello())
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("")
        listening.listen()
        for number, call in enumerate(calls):
            descriptors = [listening.fileno()] if isinstance(call, Serve) else []
            await channel.send(WorkerRequest(id=number, call=call), descriptors)
            while not isinstance(message := (await channel.receive())[0], Reply):
                if isinstance(message, Failure):
                    raise to_exception(message)
    await life
    await channel.close()
