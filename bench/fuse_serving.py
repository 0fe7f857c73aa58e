"""Program that serves a table as a FUSE file: `fuse_serving.py PATH DESCRIPTORS [uring] < TABLE`.

It prints `fuse PATH` when it serves, and unmounts and ends on SIGTERM. DESCRIPTORS: number of the connection's
descriptors, each read by an event loop.
"""

from __future__ import annotations

import os
import select
import signal
import sys

import blkloom
from blkloom import _engine
from blkloom.export.fuse.mount import clone, mount, unmount


def main(path: str, descriptors: str, over: str = "") -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    with blkloom.open(sys.stdin.read()) as device:
        mounted, first = mount(path, source="bench")
        negotiated = _engine.fuse_init(first, uring=over == "uring")
        owner = (os.geteuid(), os.getegid(), 0o600)
        file = _engine.FuseFile(_engine.Export(device, name="bench"), negotiated, owner)
        notices = _engine.Notices()
        connection = [first, *(clone(first) for _ in range(int(descriptors) - 1))]
        for token, descriptor in enumerate(connection):
            _engine.serve_fuse(device.engine, file, descriptor, notices, token)
        print(f"fuse {mounted.path}", flush=True)
        signal.sigwait({signal.SIGTERM})
        unmount(mounted, lazy=True)
        ended = 0
        while ended < len(connection):
            select.select([notices], [], [])
            ended += sum(not isinstance(result, int) for _, result, _ in notices.take())  # ints: users


main(*sys.argv[1:])
