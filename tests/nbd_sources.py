"""NBD servers as processes, which tests kill, stop and start again.

The test makes the listening socket and passes it to the server (socket activation), so clients can connect at any time:
their connections wait in the socket until a server accepts them.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

_ACTIVATE = 'export LISTEN_PID=$$ LISTEN_FDS=1; exec "$@" 3<&"$FD"'


class Source:
    """A server on a Unix socket in `folder`. command: of a server that takes its socket from LISTEN_FDS."""

    def __init__(self, folder: Path, *command: str | Path) -> None:
        self.path = folder / "source.sock"
        self._command = list(map(str, command))
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(os.fspath(self.path))
        self._socket.listen(64)
        self._log = folder / "source.log"
        self._process: subprocess.Popen[bytes] | None = None

    def uri(self, export: str = "") -> str:
        return f"nbd+unix:///{export}?socket={self.path}"

    def start(self) -> None:
        fd = self._socket.fileno()
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                ["bash", "-c", _ACTIVATE, "bash", *self._command],
                pass_fds=(fd,),
                env=os.environ | {"FD": str(fd)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        """Kills the server and waits until it has ended. The socket stays."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        self._socket.close()
        if value is not None:
            sys.stderr.write(self.log())
