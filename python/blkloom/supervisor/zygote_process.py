"""Starting the zygote: a process of its own, with one end of a socket pair.

Imports little: a supervisor starts it before it imports the rest of itself, and both do so at the same time.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from typing import Final, NamedTuple

_NO_THREADS: Final = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
"""For the zygote, which must have one thread: NumPy's linear algebra, which nobody needs, would start some as soon as
it is imported.
"""


class ZygoteProcess(NamedTuple):
    """A zygote, and this end of its channel."""

    process: subprocess.Popen[bytes]
    connected: socket.socket

    def end(self) -> None:
        """Returns when the process has ended; it ends with its channel."""
        self.connected.close()
        self.process.wait()


def start_zygote() -> ZygoteProcess:
    """Raises OSError."""
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
