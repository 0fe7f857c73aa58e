"""Starts the zygote process, with one end of a socket pair.

This module imports little: a supervisor starts the zygote before its own imports, and both then import in parallel.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from typing import Final, NamedTuple

_NO_THREADS: Final = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
"""Environment of the zygote, which must have only one thread: without this, NumPy's linear algebra starts threads when
it is imported.
"""


class ZygoteProcess(NamedTuple):
    """A zygote process, and this end of its channel."""

    process: subprocess.Popen[bytes]
    connected: socket.socket

    def end(self) -> None:
        """Waits until the process has ended. It ends when its channel closes."""
        self.connected.close()
        self.process.wait()


def start_zygote() -> ZygoteProcess:
    """Starts the process. Raises OSError."""
    ours, theirs = socket.socketpair()
    with theirs:
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", "blkloom.worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=os.environ | _NO_THREADS,
                start_new_session=True,
                cwd="/",
            )
        except BaseException:
            ours.close()
            raise
    return ZygoteProcess(process, ours)
