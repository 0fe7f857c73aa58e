"""Devices as FUSE files that the engine serves: a device of this process (`FuseServed`) or of another (`FuseProcess`).

    with FuseServed(tmp_path / "node", blkloom.open("8192 ram")) as served:   # also closes the device
        served.path.read_bytes()

`FuseServed` can do in one process what several do with the descriptors of a connection one after the other: `detach`
stops serving, `serve` starts again. Python keeps the GIL while a mapping is read, written or synced, so a device whose
target needs Python for these must be in another process.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

from blkloom import Device, _engine
from blkloom.export.fuse.mount import clone, mount, unmount
from faulty_fs import needs_fuse, needs_fuse_uring

_WORKER = Path(__file__).with_name("fuse_worker.py")
_TIMEOUT = 60.0
"""Seconds after which a notice that does not come is taken never to come."""


class FuseServed:
    """Mounted and served from `__enter__` to `__exit__`, which unmounts lazily if the test has not. Skips without FUSE.

    clones: descriptors besides the mount's. keep: leaves the device open. uring: requests come over io_uring; skips
    where they cannot.
    """

    def __init__(
        self,
        path: Path,
        device: Device,
        *,
        clones: int = 0,
        read_only: bool = False,
        mode: int = 0o600,
        keep: bool = False,
        uring: bool = False,
    ) -> None:
        self._where = path
        self.device = device
        self._clones = clones
        self._read_only = read_only
        self._mode = mode
        self._keep = keep
        self._uring = uring
        self._notices = _engine.Notices()
        self._transports: list[_engine.Transport] = []
        self._is_mounted = True
        self.descriptors: list[int] = []
        """Those of the connection, copies of which the engine has; the first is that of the mount."""
        self.unserved: list[bytes] = []
        """Of each, once they are detached."""

    def __enter__(self) -> Self:
        (needs_fuse_uring if self._uring else needs_fuse)()
        self._mount, mounted = mount(self._where, source="served", read_only=self._read_only)
        self.descriptors.append(mounted)
        self.negotiated = _engine.fuse_init(mounted, uring=self._uring)
        assert _engine.fuse_is_over_uring(self.negotiated) == self._uring
        self.descriptors += [clone(mounted) for _ in range(self._clones)]
        self.unserved = [b""] * len(self.descriptors)
        self._record = os.memfd_create("record")
        self.serve()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if self._is_mounted and self._keep:
                self.detach()  # a mount namespace that was made meanwhile may have it mounted yet
                unmount(self._mount, lazy=True)
            elif self._is_mounted:
                self.unmount(lazy=True)
        finally:
            for descriptor in [*self.descriptors, self._record]:
                os.close(descriptor)
            if not self._keep:
                self.device.close()

    @property
    def path(self) -> Path:
        """Of the file."""
        return Path(self._mount.path)

    def serve(self, *, resend: bool = False) -> None:
        """Serve all descriptors. resend: what was read and not answered is asked again first."""
        self.export = _engine.Export(self.device, name="file", read_only=self._read_only)
        owner = (os.geteuid(), os.getegid(), self._mode)
        self.file = _engine.FuseFile(self.export, self.negotiated, owner, record=self._record)
        if resend:
            _engine.fuse_resend(self.descriptors[0])
        self._transports = [
            _engine.serve_fuse(self.device.engine, self.file, descriptor, self._notices, token, unserved=unserved)
            for token, (descriptor, unserved) in enumerate(zip(self.descriptors, self.unserved, strict=True))
        ]

    def detach(self) -> None:
        """Let go of all descriptors; what waits stays with the kernel, or in `unserved`."""
        for transport in self._transports:
            transport.detach()
        for token, left in self.ends():
            assert isinstance(left, _engine.DetachedFuse), left
            self.unserved[token] = left.unserved
            os.close(left.take_descriptor())

    def ends(self) -> list[tuple[int, object]]:
        """What became of each descriptor that is served, once none is."""
        ended: list[tuple[int, object]] = []
        while len(ended) < len(self._transports):
            assert select.select([self._notices], [], [], _TIMEOUT)[0], "a descriptor is served for ever"
            ended += [(token, result) for token, result, _ in self._notices.take() if not isinstance(result, int)]
        self._transports = []
        return ended

    def unmount(self, *, lazy: bool = False) -> None:
        """Unmount, and wait until nothing is served. OSError EBUSY: the file is open, and not `lazy`."""
        unmount(self._mount, lazy=lazy)
        self._is_mounted = False
        assert {reason for _, reason in self.ends()} <= {"unmounted"}
        assert not self._where.exists(), "the file that was made for the mount goes with it"


class FuseProcess:
    """A device of another process, mounted and served from `__enter__` to `__exit__`. table: what it serves; `kill` and
    `start` replace the process. clones: descriptors besides the mount's. uring: requests come over io_uring. Skips
    without FUSE.
    """

    def __init__(self, path: Path, table: str, *, clones: int = 0, uring: bool = False) -> None:
        self._uring = uring
        self._where = path
        self._table = table
        self._clones = clones
        self._descriptors: list[int] = []
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        (needs_fuse_uring if self._uring else needs_fuse)()
        self._mount, mounted = mount(self._where, source="process")
        self._descriptors.append(mounted)
        try:
            self._negotiated = _engine.fuse_init(mounted, uring=self._uring)
            self._descriptors += [clone(mounted) for _ in range(self._clones)]
            self.start()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        process = self._process
        self._end()
        if process is not None:
            try:
                process.communicate(timeout=_TIMEOUT)
            finally:
                process.kill()
            assert process.returncode == 0

    @property
    def path(self) -> Path:
        """Of the file."""
        return Path(self._mount.path)

    def start(self) -> None:
        """Start a process; returns when it serves."""
        words = [sys.executable, _WORKER, self._table, self._negotiated.hex(), *map(str, self._descriptors)]
        self._process = subprocess.Popen(words, pass_fds=self._descriptors, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == f"{len(self._descriptors)} descriptors\n"

    def kill(self) -> None:
        """Kill the process; returns when it has ended."""
        assert self._process is not None, "none was started"
        self._process.kill()
        self._process.communicate()
        self._process = None

    def _end(self) -> None:
        unmount(self._mount, lazy=True)
        for descriptor in self._descriptors:
            os.close(descriptor)
