"""Checks of this machine for `blkloom doctor`: ways to attach, kernel features, rights, limits.

Each check reads /proc and /sys, or opens a device for a moment, and changes nothing. It says what is missing, and what
to install or change.
"""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from blkloom import _engine
from blkloom.attach import registry
from blkloom.errors import MountError
from blkloom.export import memory_pressure
from blkloom.export.fuse import uring

_RESEND_FROM: Final = (6, 9)
_FEW_DESCRIPTORS: Final = 4096


class Finding(NamedTuple):
    """Result of one check. state: "yes", "no" or "limited". cure: what to change; "" for nothing."""

    topic: str
    state: str
    text: str
    cure: str = ""


def findings() -> Iterator[Finding]:
    """The results of all checks, by topic."""
    for name in registry.names():
        way = registry.way(name)
        why = way.lacks()
        yield Finding(f"attach --via {name}", "no" if why else "yes", why or way.summary)
    for check in (_fuse_survival, _fuse_uring, _io_uring, _partitions, _udev, _memory, _file_systems, _descriptors):
        yield from check()


def kernel_release() -> tuple[int, int]:
    """Major and minor number of the kernel; (0, 0) if it has another form."""
    major, _, rest = os.uname().release.partition(".")
    minor = rest.partition(".")[0].partition("-")[0]
    return (int(major), int(minor)) if major.isdecimal() and minor.isdecimal() else (0, 0)


def _fuse_survival() -> Iterator[Finding]:
    topic, release = "nodes survive a killed worker", kernel_release()
    if release >= _RESEND_FROM:
        yield Finding(topic, "yes", f"Linux {os.uname().release} sends FUSE requests again")
    else:
        what = f"Linux {os.uname().release} cannot send FUSE requests again: users get errors when a worker is killed"
        yield Finding(topic, "no", what, "use Linux 6.9 or later")


def _fuse_uring() -> Iterator[Finding]:
    topic = "FUSE over io_uring"
    try:
        uring.check_available("")
    except MountError as error:
        yield Finding(topic, "no", error.what, error.cure)
    else:
        yield Finding(topic, "yes", f"{uring.ENABLE} is Y")


def _io_uring() -> Iterator[Finding]:
    topic = "io_uring"
    engine = _engine.Engine(io="auto", loops=1)
    try:
        if engine.io == "io_uring":
            yield Finding(topic, "yes", "file I/O goes through it")
        else:
            cure = f"as root: echo 0 > {uring.FORBIDDEN}; a container's seccomp profile may forbid it, too"
            yield Finding(topic, "no", "file I/O goes through threads", cure)
    finally:
        engine.close()


def _partitions() -> Iterator[Finding]:
    topic = "partitions of nodes"
    if not Path("/proc/config.gz").exists():
        return
    import gzip

    with gzip.open("/proc/config.gz", "rt", encoding="ascii", errors="replace") as lines:
        options = {line.strip() for line in lines}
    if missing := [name for name in ("EFI_PARTITION", "MSDOS_PARTITION") if f"CONFIG_{name}=y" not in options]:
        what = f"this kernel was built without {', '.join(missing)}: attach --partscan finds no such partitions"
        yield Finding(topic, "no", what, "blkloom loop -P makes devices of partitions")
    else:
        yield Finding(topic, "yes", "the kernel reads GPT and MBR")


def _udev() -> Iterator[Finding]:
    if Path("/run/udev/control").exists():
        found = [folder for folder in _RULES if (folder / RULE).exists()]
        if found:
            yield Finding("udev", "yes", f"{found[0] / RULE}: units can wait for /dev/blkloom/NAME")
        else:
            what = "runs without blkloom's rule: systemd units cannot wait for /dev/blkloom/NAME"
            yield Finding("udev", "limited", what, f"install udev/{RULE} in /etc/udev/rules.d")
    else:
        yield Finding("udev", "yes", "does not run: blkloom makes the links in /dev/blkloom by itself")


RULE: Final = "60-blkloom.rules"
_RULES: Final = tuple(Path(folder) for folder in ("/etc/udev/rules.d", "/run/udev/rules.d", "/usr/lib/udev/rules.d"))


def _memory() -> Iterator[Finding]:
    topic = "nodes when memory runs out"
    missing = [
        f"{name} ({what})"
        for number, name, what in (
            (memory_pressure.CAP_SYS_RESOURCE, "CAP_SYS_RESOURCE", "to be an I/O flusher"),
            (memory_pressure.CAP_IPC_LOCK, "CAP_IPC_LOCK", "to lock memory"),
        )
        if not memory_pressure.is_capable(number)
    ]
    if not missing:
        yield Finding(topic, "yes", "workers are I/O flushers and lock their memory")
    else:
        what = f"missing: {', '.join(missing)}: the machine may hang with a file system on a node"
        cure = "give the supervisor these capabilities" if os.geteuid() == 0 else "only root has them, as a rule"
        yield Finding(topic, "limited", what, cure)


def _file_systems() -> Iterator[Finding]:
    missing = [f"{tool} (Debian: {package})" for tool, package in _TOOLS.items() if shutil.which(tool) is None]
    found = [tool for tool in _TOOLS if shutil.which(tool) is not None]
    cure = f"install {', '.join(missing)}" if missing else ""
    yield Finding("mkfs", "limited" if missing else "yes", f"there: {', '.join(found) or 'none'}", cure)


_TOOLS: Final = {"mkfs.ext4": "e2fsprogs", "mkfs.xfs": "xfsprogs", "mkfs.btrfs": "btrfs-progs"}


def _descriptors() -> Iterator[Finding]:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY or hard >= _FEW_DESCRIPTORS:
        yield Finding("open files", "yes", f"a process may have {hard}")
    else:
        what = f"a process may have {hard}: every device, export and client needs some"
        yield Finding("open files", "limited", what, "raise it: ulimit -Hn, or LimitNOFILE= of the unit")
