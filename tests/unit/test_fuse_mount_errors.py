"""Errors of FUSE mounts name what is missing, and mountinfo is parsed as the kernel writes it."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from blkloom.errors import MountError
from blkloom.export.fuse import mount as module
from blkloom.export.fuse.mountinfo import Mounted, parse

MOUNTINFO = r"""22 27 0:21 / /proc rw,relatime shared:5 - proc proc rw
95 22 0:40 / /run/blkloom/fuse/a\040b\134c rw,nosuid,nodev - fuse.blkloom blkloom:disk\0541 rw,user_id=0,allow_other
96 22 0:41 / /mnt ro master:1 propagate_from:2 - tmpfs  rw
"""


def test_mountinfo_is_read_with_its_escapes_and_optional_fields() -> None:
    assert parse(MOUNTINFO.splitlines(keepends=True)) == [
        Mounted("/proc", "proc", "proc", frozenset({"rw", "relatime"}), "0:21"),
        Mounted(
            "/run/blkloom/fuse/a b\\c",
            "fuse.blkloom",
            "blkloom:disk,1",
            frozenset({"rw", "nosuid", "nodev", "user_id=0", "allow_other"}),
            "0:40",
        ),
        Mounted("/mnt", "tmpfs", "", frozenset({"ro", "rw"}), "0:41"),
    ]


def test_a_missing_helper_is_named_with_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(module, "DEVICE", "/dev/null")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MountError, match=r"fusermount3 is needed.*apt install fuse3"):
        module.mount(tmp_path / "node", source="test")
    assert list(tmp_path.iterdir()) == [], "the file that was made for it is removed"


@pytest.mark.parametrize("user", [0, 1000])
def test_a_missing_device_is_told_with_what_to_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, user: int) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: user)
    monkeypatch.setattr(module, "DEVICE", str(tmp_path / "missing"))
    with pytest.raises(MountError, match=r"missing: No such file or directory; load.*modprobe fuse") as caught:
        module.mount(tmp_path / "node", source="test")
    assert (caught.value.errno, caught.value.exit_code) == (errno.ENOENT, 69)


@pytest.mark.parametrize(
    ("said", "number", "cure"),
    [
        (
            "fusermount3: option allow_other only allowed if 'user_allow_other' is set in /etc/fuse.conf\n",
            errno.EPERM,
            "user_allow_other",
        ),
        (
            "fusermount3: too many FUSE filesystems mounted; mount_max=N can be set in /etc/fuse.conf\n",
            errno.EMFILE,
            "mount_max",
        ),
        ("fusermount3: fuse device not found, try 'modprobe fuse' first\n", errno.ENODEV, "modprobe fuse"),
        ("fusermount3: failed to open /dev/fuse: Permission denied\n", errno.EACCES, "/dev/fuse"),
        ("fusermount3: user has no write access to mountpoint /node\n", errno.EACCES, "may write"),
        ("fusermount3: mounting over filesystem type 0x00009fa0 is forbidden\n", errno.EPERM, "file system"),
        ("fusermount3: entry for /node not found in /etc/mtab\n", errno.EINVAL, "unmounted before"),
        ("warning\nfusermount3: failed to unmount /node: Device or resource busy\n", errno.EBUSY, "open"),
        ("fusermount3: mount failed: Operation not permitted\n", errno.EPERM, "set-user-ID"),
        ("fusermount3: something new\n", errno.EIO, ""),
        ("", errno.EIO, ""),
    ],
)
def test_what_the_helper_says_becomes_an_error_with_a_cure(said: str, number: int, cure: str) -> None:
    error = module.helper_error("/node", said)
    assert (error.errno, error.path, cure in error.cure) == (number, "/node", True)
    assert "fusermount3: " not in error.what
    assert str(error).startswith(f"/node: {error.what}")
