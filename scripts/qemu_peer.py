"""QEMU's storage daemon for the benchmark, unpacked into a directory and never installed.

`qemu_peer.py DIRECTORY` unpacks `qemu-storage-daemon` of Debian 13, with that release's libraries, into `root`. The
FUSE export of QEMU 10.0.2, the version in Debian 12's backports, corrupts data under concurrent direct writes; this
version does not. Existing files are kept. Needs no root. Exits 1 with the reason if it is not available.
"""

from __future__ import annotations

import platform
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from debian import DebianError, ReleaseApt, is_debian

RELEASE = "trixie"
_LIBRARIES = "usr/lib/x86_64-linux-gnu"
_PROGRAM = """#!/bin/sh
root=$(dirname "$(readlink -f "$0")")/root
libraries=$root/{libraries}
exec "$libraries/ld-linux-x86-64.so.2" --library-path "$libraries" "$root/usr/bin/qemu-storage-daemon" "$@"
"""


def fetch(directory: Path) -> None:
    """Download and unpack the program. Raises DebianError."""
    work = directory.with_name(f"{directory.name}.partial")
    shutil.rmtree(work, ignore_errors=True)
    result = work / "result"
    result.mkdir(parents=True)
    ReleaseApt(work / "apt", RELEASE).unpack(["qemu-utils"], result / "root")
    program = result / "qemu-storage-daemon"
    program.write_text(_PROGRAM.format(libraries=_LIBRARIES))
    program.chmod(0o755)
    shutil.rmtree(directory, ignore_errors=True)
    result.rename(directory)
    shutil.rmtree(work)


def main(arguments: Sequence[str]) -> int:
    """Run `qemu_peer.py DIRECTORY`."""
    if len(arguments) != 1:
        print(f"usage: {Path(__file__).name} DIRECTORY", file=sys.stderr)
        return 2
    directory = Path(arguments[0]).absolute()
    if (directory / "qemu-storage-daemon").exists():
        return 0
    if not is_debian() or platform.machine() != "x86_64":
        print("qemu-storage-daemon comes from Debian's archive, for amd64: it is not measured here")
        return 0
    try:
        fetch(directory)
    except DebianError as error:
        print(f"no qemu-storage-daemon to measure: {error}", file=sys.stderr)
        return 1
    print(f"qemu-storage-daemon is in {directory}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
