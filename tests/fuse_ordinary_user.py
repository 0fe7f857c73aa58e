"""Program that a test starts as root in a mount namespace: it changes to an ordinary user and mounts FUSE files.

Arguments: DIRECTORY (of that user), SERVER (a program that serves a file of SIZE bytes), CASE (a function below). In
the namespace, all users may open /dev/fuse, and the case sets the contents of /etc/fuse.conf.
"""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from blkloom.errors import MountError
from blkloom.export.fuse.mount import Mount, answers, mount, unmount

USER = 65534
SIZE = 1 << 20
CONFIGURATION = Path("/etc/fuse.conf")


def main(directory: Path, server: str, case: str) -> None:
    """In the namespace, as root."""
    configurations = {"a_limit_of_mounts": "mount_max = 1\n", "others_allowed": "user_allow_other\n"}
    replacement = directory / "fuse.conf"
    replacement.write_text(configurations.get(case, ""))
    device = directory / "fuse"
    os.mknod(device, 0o020666, os.stat("/dev/fuse").st_rdev)
    os.chmod(device, 0o666)
    for new, old in ((replacement, CONFIGURATION), (device, Path("/dev/fuse"))):
        subprocess.run(["mount", "--bind", new, old], check=True)
    os.setgroups([])
    os.setresgid(USER, USER, USER)
    os.setresuid(USER, USER, USER)
    globals()[case](directory / "node", server)


def served(path: Path, server: str, *, allow_other: bool = False) -> tuple[Mount, subprocess.Popen[bytes]]:
    """Mounted and served."""
    mounted, device = mount(path, source="a,b\\c", allow_other=allow_other)
    process = subprocess.Popen([server, str(SIZE), str(device)], pass_fds=[device])
    os.close(device)
    return mounted, process


def refused(path: Path, *, allow_other: bool = False) -> MountError:
    """The error of a mount."""
    with pytest.raises(MountError) as caught:
        mount(path, source="refused", allow_other=allow_other)
    assert not path.exists(), "what was made for the mount is removed"
    return caught.value


def a_file(path: Path, server: str) -> None:
    """Mounted, used, unmounted."""
    mounted, process = served(path, server)
    status = path.stat()
    assert (status.st_size, status.st_uid, status.st_mode) == (SIZE, USER, 0o100600)
    with path.open("r+b", buffering=0) as file:
        os.pwrite(file.fileno(), b"hello", 4096)
        with pytest.raises(MountError) as caught:
            unmount(mounted)
        assert caught.value.errno == errno.EBUSY, caught.value
        unmount(mounted, lazy=True)
        assert not path.exists()
        assert os.pread(file.fileno(), 5, 4096) == b"hello", "who has it open goes on"
    assert process.wait() == 0
    mounted, process = served(path, server)
    unmount(mounted)
    assert process.wait() == 0
    with pytest.raises(MountError) as caught:
        unmount(mounted)
    assert caught.value.errno == errno.EINVAL, caught.value


def a_stale_mount(path: Path, server: str) -> None:
    """The mount of a server that has ended is replaced."""
    _, device = mount(path, source="stale")
    os.close(device)
    assert answers(str(path)) is False
    mounted, process = served(path, server)
    assert answers(str(path)) is True
    unmount(mounted)
    assert process.wait() == 0


def others_not_allowed(path: Path, server: str) -> None:
    """Without user_allow_other."""
    error = refused(path, allow_other=True)
    assert (error.errno, "user_allow_other" in error.cure) == (errno.EPERM, True), error


def others_allowed(path: Path, server: str) -> None:
    """With user_allow_other."""
    mounted, process = served(path, server, allow_other=True)
    assert "allow_other" in Path("/proc/self/mountinfo").read_text().partition(f"{path} ")[2].partition("\n")[0]
    unmount(mounted)
    assert process.wait() == 0


def a_limit_of_mounts(path: Path, server: str) -> None:
    """mount_max = 1"""
    mounted, process = served(path, server)
    error = refused(path.with_name("second"))
    assert (error.errno, "mount_max" in error.cure) == (errno.EMFILE, True), error
    unmount(mounted)
    assert process.wait() == 0


def a_directory_of_others(path: Path, server: str) -> None:
    """Where the user may not write."""
    error = refused(Path("/etc/blkloom-node"))
    assert error.errno == errno.EACCES, error


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
