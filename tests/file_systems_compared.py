"""Runs `file_systems_compared.sh` with dmsetup or with blkloom; see there."""

from __future__ import annotations

from pathlib import Path

SCRIPT = Path(__file__).with_suffix(".sh")
MODULES = ["dm-mod", "dm-flakey", "dm-delay", "dm-log-writes", "loop", "ext4", "xfs", "btrfs"]
PACKAGES = {"mkfs.ext4": "e2fsprogs", "mkfs.xfs": "xfsprogs", "mkfs.btrfs": "btrfs-progs"}

WITH_DMSETUP = """
W=/run/work
mkdir $W
echo 360000 > /proc/sys/vm/dirty_expire_centisecs  # an emulated machine takes long
dm() { dmsetup "$@"; }
backing() { losetup -f --show "$1"; }
released() { losetup -j "$1" | cut -d: -f1 | xargs losetup -d; }
attached() { echo /dev/mapper/disk; }
"""
WITH_BLKLOOM = """
dm() { blkloom "$@"; }
backing() { echo "$1"; }
released() { :; }
attached() { blkloom attach disk --via loop; }
"""


def with_dmsetup() -> str:
    """The script for a virtual machine."""
    return WITH_DMSETUP + SCRIPT.read_text()


def with_blkloom(work: Path) -> str:
    """The script for this machine, as root; for a run directory that is set in the environment."""
    return f"W={work}\n" + WITH_BLKLOOM + SCRIPT.read_text()


def verdicts(system: str) -> list[str]:
    """What the script says of a file system."""
    return [
        "drop_writes: synced yes, fsynced yes, not synced no",
        "drop_writes: check yes",
        "delay: fsync done, fsync done",
        f"error: fsync EIO, fsync EIO, open or write {'EROFS' if system == 'ext4' else 'EIO'}",
        "error: read no",
        "error: synced yes, delayed yes",
        "error: check yes",
        "error_writes: fsync EIO, fsync EIO",
        "error_writes: check after mount yes",
        "log-writes after 1: files yes no no check yes",
        "log-writes after 2: files yes yes no check yes",
        "log-writes after 3: files yes yes yes check yes",
    ]


def said_of(system: str, printed: str) -> list[str]:
    """The lines of a file system."""
    return [line.removeprefix(f"{system}: ") for line in printed.splitlines() if line.startswith(f"{system}: ")]
