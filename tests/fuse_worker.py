"""Process that serves a device as a FUSE file: `fuse_worker.py TABLE NEGOTIATED DESCRIPTOR...`.

NEGOTIATED is hexadecimal. The kernel first sends again the requests that another process has read through the
descriptors and not answered. The process prints a line when it serves, and ends when the file is unmounted.
"""

from __future__ import annotations

import os
import select
import sys

import blkloom
from blkloom import _engine


def main(table: str, negotiated: str, *descriptors: str) -> None:
    with blkloom.open(table, shared=True) as device:
        export = _engine.Export(device, name="file")
        file = _engine.FuseFile(export, bytes.fromhex(negotiated), (os.geteuid(), os.getegid(), 0o600))
        notices = _engine.Notices()
        _engine.fuse_resend(int(descriptors[0]))
        for token, descriptor in enumerate(descriptors):
            _engine.serve_fuse(device.engine, file, int(descriptor), notices, token)
        print(f"{len(descriptors)} descriptors", flush=True)
        reasons: list[object] = []
        while len(reasons) < len(descriptors):
            select.select([notices], [], [])
            reasons += [reason for _, reason, _ in notices.take() if not isinstance(reason, int)]  # ints: users
        if set(reasons) != {"unmounted"}:
            sys.exit(f"it ends with {reasons}")


main(*sys.argv[1:])
