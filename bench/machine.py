"""Describes the machine and the versions of the contenders, for the report."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Final

_ASK: Final = {
    "fio": ["fio", "--version"],
    "qemu-nbd": ["qemu-nbd", "--version"],
    "qemu-storage-daemon": [str(Path(__file__).parents[1] / ".cache/qemu/qemu-storage-daemon"), "--version"],
    "nbdkit": ["nbdkit", "--version"],
    "commit": ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"],
}


def facts() -> dict[str, str]:
    """Kernel, CPU, memory, load; nothing that identifies the machine."""
    cpuinfo = _fields(Path("/proc/cpuinfo"))
    memory = int(_fields(Path("/proc/meminfo"))["MemTotal"].split()[0])
    return {
        "kernel": platform.release(),
        "cpu": cpuinfo.get("model name", platform.machine()),
        "cpus": str(len(os.sched_getaffinity(0))),
        "virtual": "yes" if "hypervisor" in cpuinfo.get("flags", "").split() else "no",
        "memory": f"{memory / (1 << 20):.1f} GiB",
        "load before": f"{os.getloadavg()[0]:.2f}",
    }


def versions(blkloom: str, before: str | None = None) -> dict[str, str]:
    """Versions of blkloom, Python and every installed peer, as they print them. before: the command of an older
    build.
    """
    said = {"python": platform.python_version()}
    asked = {"blkloom": [blkloom, "--version"], **_ASK}
    if before is not None:
        asked["before"] = ["git", "-C", str(Path(before).parent), "describe", "--always", "--dirty"]
    for name, command in asked.items():
        if shutil.which(command[0]):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            said[name] = done.stdout.partition("\n")[0].strip()
    return {name: text for name, text in said.items() if text}


def _fields(path: Path) -> dict[str, str]:
    """Dictionary of `key : value` lines, with the first value of each key."""
    found: dict[str, str] = {}
    for line in path.read_text().splitlines():
        key, _, value = line.partition(":")
        found.setdefault(key.strip(), value.strip())
    return found
