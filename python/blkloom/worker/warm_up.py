"""Warm-up of the zygote: it runs one worker and one device in its own process, before it forks any worker.

Everything that Python imports, compiles and specializes during the warm-up is then there in every worker. This saves
time and memory: all workers share the pages that none of them writes to. Leaves no thread and no file behind.
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
from blkloom.targets.registry import Targets
from blkloom.worker.main import Worker


def warm_up(targets: Targets) -> None:
    """One run. Several runs help: Python specializes code that has run a few times."""
    with tempfile.TemporaryDirectory(prefix="blkloom-") as run_dir:
        os.mkdir(os.path.join(run_dir, "workers"))
        asyncio.run(_run(targets, run_dir))


async def _run(targets: Targets, run_dir: str) -> None:
    ours, theirs = socket.socketpair()
    channel = AsyncChannel(ours, FromWorker)
    running = asyncio.create_task(Worker("warm-up", run_dir, targets, LEAST_BUDGET).run(theirs))
    device = DeviceState(name="warm-up", minor=0)
    calls: list[WorkerCall] = [
        Hold(devices=[device]),
        WorkerLoad(minor=0, loaded=Loaded(load=1, table="0 8 zero")),
        WorkerResume(minor=0),
        Serve(minor=0, export=ExportState(id="1", name="warm-up")),
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
    await running
    await channel.close()
