"""Runs tasks that may wait for a node in separate processes (`tasks.py`).

Such a task may wait for a worker that the supervisor must replace, so it must not block the supervisor. A thread that
hangs in the kernel cannot be killed without its process, so a separate process is needed.
"""

from __future__ import annotations

import asyncio
import errno
import json
import sys
from asyncio.subprocess import Process
from collections.abc import Callable
from typing import Any, Final

import msgspec

from blkloom.control.failures import to_exception
from blkloom.control.messages import Failure
from blkloom.errors import AttachError

SECONDS: Final = 30.0
"""How long a task may take after its process has started. Then it is killed, and ends as soon as the kernel lets it."""
_START_SECONDS: Final = 120.0
"""How long the start may take: Python is read from storage, and a machine may have little memory."""


async def in_process(
    task: str, *, seconds: float = SECONDS, late: Callable[[Process], None] | None = None, **arguments: Any
) -> Any:
    """Runs the function `task` of `tasks.TASKS`; returns its result. Raises its exception, AttachError. late: called
    with the process of a task that exceeds the time limit or is cancelled; the task may still succeed until this
    process ends.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "blkloom.attach.tasks",
        task,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        start_new_session=True,  # a signal of the terminal is for the caller, which may be about to detach
        cwd="/",
    )
    assert process.stdout is not None, "it is a pipe"
    has_started = False
    try:
        async with asyncio.timeout(_START_SECONDS):
            has_started = bool(await process.stdout.readline())
        async with asyncio.timeout(seconds):
            printed, _ = await process.communicate(json.dumps(arguments).encode())
    except TimeoutError as error:
        process.kill()
        if late is not None:
            late(process)
        what = f"{task} takes longer than {seconds:g} s: the device does not answer"
        cure = "see `blkloom info`; `blkloom detach --force` lets the I/O of its users fail"
        if not has_started:
            what = f"the process for {task} has not started in {_START_SECONDS:g} s"
            cure = "see whether the machine has memory, and reads its root file system"
        raise AttachError(what, path=_path(arguments), errno=errno.ETIMEDOUT, cure=cure) from error
    except BaseException:
        process.kill()
        if late is not None:
            late(process)
        raise
    try:
        answer = json.loads(printed)
    except ValueError as error:
        what = f"the process for {task} ended with status {process.returncode} and no answer"
        raise AttachError(what, path=_path(arguments), errno=errno.EIO, cure="see the supervisor's log") from error
    if "failure" in answer:
        raise to_exception(msgspec.convert(answer["failure"], Failure))
    return answer["result"]


def _path(arguments: dict[str, Any]) -> str:
    return str(arguments.get("file") or arguments.get("link") or f"/dev/loop{arguments.get('number', '')}")
