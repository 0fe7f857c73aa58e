"""Programs of QEMU and libvirt for the benchmark and for tests, unpacked into a directory and never installed.

`qemu_peer.py DIRECTORY` unpacks `qemu-storage-daemon`, `qemu-img`, `qemu-io` and `virsh` of Debian 13, with that
release's libraries, into `root`. The FUSE export of QEMU 10.0.2, the version in Debian 12's backports, corrupts data
under concurrent direct writes; this version does not. These programs also have libblkio, a client of disks over
vhost-user, which Debian 12 does not have. virsh has libvirt's driver for QEMU, and needs no daemon. Existing files are
kept. Needs no root. Exits 1 with the reason if something is not available.
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
_PACKAGES = ("qemu-utils", "libblkio1", "libvirt-clients", "libvirt-common")
_MODULES = ("qemu-block-extra", "libvirt-daemon-driver-qemu")
"""Packages with loadable modules. What some of these modules need is not wanted."""
_PROGRAMS = ("qemu-storage-daemon", "qemu-img", "qemu-io", "virsh")
_PROGRAM = """#!/bin/sh
root=$(dirname "$(readlink -f "$0")")/root
libraries=$root/{libraries}
export QEMU_MODULE_DIR="$libraries/qemu" LIBVIRT_DRIVER_DIR="$libraries/libvirt/connection-driver"
exec "$libraries/ld-linux-x86-64.so.2" --library-path "$libraries" "$root/usr/bin/{name}" "$@"
"""


def fetch(directory: Path) -> None:
    """Download and unpack the programs. Raises DebianError."""
    work = directory.with_name(f"{directory.name}.partial")
    shutil.rmtree(work, ignore_errors=True)
    result = work / "result"
    result.mkdir(parents=True)
    ReleaseApt(work / "apt", RELEASE).unpack(_PACKAGES, result / "root", alone=_MODULES)
    for name in _PROGRAMS:
        program = result / name
        program.write_text(_PROGRAM.format(libraries=_LIBRARIES, name=name))
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
    if all((directory / name).exists() for name in _PROGRAMS):
        return 0
    if not is_debian() or platform.machine() != "x86_64":
        print("QEMU and libvirt for the tests and the benchmark come from Debian's archive, for amd64: none here")
        return 0
    try:
        fetch(directory)
    except DebianError as error:
        print(f"no programs of QEMU and libvirt to measure and test with: {error}", file=sys.stderr)
        return 1
    print(f"in {directory} now: {', '.join(_PROGRAMS)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
