"""Mounts of FUSE connections on regular files.

`mount` opens /dev/fuse, mounts it on a file and returns the mount with its descriptor; this module does not serve it.
A missing file is made, and removed again with the mount. The root of the mount is a
regular file, too (`rootmode=100000`), so it covers one file and nothing around it.

Root mounts with mount(2). It is called through the engine, because Python has no call for it, and mount(8) would look
for helpers and keep tables of its own. Ordinary users mount with fusermount3 (Debian package fuse3), which is
set-user-ID root, and sends the descriptor over a socket (_FUSE_COMMFD). Either way the mount is nosuid and nodev, and
the kernel checks owner and mode (`default_permissions`).

Only `answers` waits for the mounted file system, for a limited time. Any thread. Errors are `MountError`.

Source: mount(2), umount(2), mount.fuse3(8), fusermount3(1), Linux Documentation/filesystems/fuse.rst.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import socket
import stat
import struct
import subprocess
import threading
from typing import Final

import msgspec

from blkloom import _engine
from blkloom.errors import MountError
from blkloom.export.fuse.mountinfo import Mounted, mounted_at

DEVICE: Final = "/dev/fuse"
SUBTYPE: Final = "blkloom"
KIND: Final = f"fuse.{SUBTYPE}"
"""Type of the file system in the output of `findmnt` and df(1)."""
_HELPER: Final = "fusermount3"
_HELPER_TIMEOUT: Final = 30.0
"""Seconds for fusermount3, which waits only for the kernel and for other instances of itself."""
_ANSWER_TIMEOUT: Final = 2.0
"""Seconds after which a mount whose server does not answer counts as in use."""
_CLOSE_FIRST: Final = "end what has it open (`fuser -m` lists that), or unmount lazily"
_CONNECTIONS: Final = "/sys/fs/fuse/connections"
"""Where systemd mounts the control file system of FUSE. Source: Linux Documentation/filesystems/fuse.rst."""
_IOC_CLONE: Final = 0x8004_E500
"""FUSE_DEV_IOC_CLONE."""


class Mount(msgspec.Struct, frozen=True):
    """A mount that `mount` made; a value that another process may unmount. path: absolute, without symbolic links.
    made: (device, inode) of the file that was made for it.
    """

    path: str
    made: tuple[int, int] | None = None


def mount(
    path: str | os.PathLike[str],
    *,
    source: str,
    allow_other: bool = False,
    read_only: bool = False,
) -> tuple[Mount, int]:
    """Mounts a new FUSE connection on the regular file `path`. Returns the mount, and the descriptor of the connection.

    source: what df(1) shows as the file system. allow_other: other users may use the file, as owner and mode allow;
    without it only processes of this user may. A file that exists must be empty, and stays when it is unmounted. The
    mount of a blkloom server that has ended is replaced.
    """
    where = _resolved(path)
    _make_room(where)
    made = _make_file(where)
    try:
        if os.geteuid() == 0:
            device = _mount_as_root(where, source=source, allow_other=allow_other, read_only=read_only)
        else:
            device = _mount_by_helper(where, source=source, allow_other=allow_other, read_only=read_only)
    except BaseException:
        _remove_file(where, made)
        raise
    return Mount(where, made), device


def unmount(mounted: Mount, *, lazy: bool = False, abort: bool = False) -> None:
    """Unmounts, and removes the file if it was made for the mount.

    lazy: also while the file is open; without it, that is EBUSY. The path is free at once, and programs that have the
    file open can use it as long as it is served. abort: all waiting requests fail at once (for root; otherwise when
    the last descriptor of the connection is closed).
    """
    _unmount_path(mounted.path, lazy=lazy, abort=abort)
    _remove_file(mounted.path, mounted.made)


def abort(mounted: Mount, number: str) -> bool:
    """Makes all requests to the file fail, now and later, even if a process has a descriptor of the connection; the
    mount stays. number: of the file system, "major:minor". Returns False if this user may not: root may, and others
    where the control file system of FUSE is mounted. Does not wait. Raises OSError.
    """
    try:
        with open(f"{_CONNECTIONS}/{number.rpartition(':')[2]}/abort", "wb", buffering=0) as control:
            control.write(b"1")
    except FileNotFoundError:
        if os.geteuid() != 0:
            return False
        busy = os.open(mounted.path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)  # so that it is not unmounted
        try:
            _engine.unmount(mounted.path, lazy=False, force=True)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
        finally:
            os.close(busy)
    return True


def remove_file(mounted: Mount) -> None:
    """Removes the file that was made for a mount which does not exist any more."""
    _remove_file(mounted.path, mounted.made)


def clone(device: int) -> int:
    """A further descriptor of the connection that `device` belongs to (FUSE_DEV_IOC_CLONE)."""
    new = _open_device(DEVICE)
    try:
        fcntl.ioctl(new, _IOC_CLONE, struct.pack("=I", device))
    except BaseException:
        os.close(new)
        raise
    return new


def answers(path: str, *, timeout: float = _ANSWER_TIMEOUT) -> bool | None:
    """Whether the server of the mount at `path` answers; None: not within `timeout` seconds.

    False: the server has ended, and the mount remains (ENOTCONN, "Transport endpoint is not connected").
    """
    found: list[bool] = []

    def ask() -> None:
        try:
            os.stat(path, follow_symlinks=False)
        except OSError as error:
            found.append(error.errno not in {errno.ENOTCONN, errno.ECONNABORTED})
        else:
            found.append(True)

    # A call that waits for a server cannot be cancelled: the thread ends when the server answers or ends.
    thread = threading.Thread(target=ask, name="fuse-answers", daemon=True)
    thread.start()
    thread.join(timeout)
    return found[0] if found else None


def _resolved(path: str | os.PathLike[str]) -> str:
    """The absolute path, without symbolic links in its directories. Does not access the file: it may be mounted."""
    directory, name = os.path.split(os.path.abspath(os.fspath(path)))
    if not name:
        raise MountError(
            "is a directory", path=os.fspath(path), errno=errno.EISDIR, cure="name a file, which need not exist"
        )
    return os.path.join(os.path.realpath(directory), name)


def _make_room(where: str) -> None:
    """Unmounts a stale mount of blkloom at the path. Raises MountError if another file system is mounted there."""
    while found := mounted_at(where):
        if found.kind != KIND:
            raise MountError(
                f"{_kind_of(found)} is mounted there", path=where, errno=errno.EBUSY, cure="choose another path"
            )
        if answers(where) is not False:
            raise MountError(
                "another export is mounted there",
                path=where,
                errno=errno.EBUSY,
                cure=f"end that one, or choose another path (if nothing serves it any more: {_advice(where)})",
            )
        _unmount_path(where, lazy=True)


def _make_file(where: str) -> tuple[int, int] | None:
    """Makes the file to mount on. Returns its identity, or None if it existed. It must be regular and empty: the mount
    would hide its contents.
    """
    try:
        descriptor = os.open(where, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        status = os.lstat(where)
        if not stat.S_ISREG(status.st_mode):
            raise MountError(
                "exists and is not a regular file", path=where, errno=errno.EEXIST, cure="choose another path"
            ) from None
        if status.st_size:
            raise MountError(
                "exists and is not empty; a mount would hide what is in it",
                path=where,
                errno=errno.EEXIST,
                cure="choose another path",
            ) from None
        return None
    except OSError as error:
        raise MountError(
            f"cannot be made: {os.strerror(error.errno or errno.EIO)}",
            path=where,
            errno=error.errno or errno.EIO,
            cure="choose a path in a directory this user may write to",
        ) from error
    try:
        status = os.fstat(descriptor)
    finally:
        os.close(descriptor)
    return status.st_dev, status.st_ino


def _remove_file(where: str, made: tuple[int, int] | None) -> None:
    """Removes the file that was made, if it is still the same one and nothing is mounted on it."""
    if made is None or mounted_at(where):
        return
    try:
        status = os.lstat(where)
    except FileNotFoundError:
        return
    if (status.st_dev, status.st_ino) == made:
        os.unlink(where)


def _mount_as_root(where: str, *, source: str, allow_other: bool, read_only: bool) -> int:
    device = _open_device(where)
    # The file is opened first and mounted on by descriptor: its name may be made a link to another meanwhile.
    try:
        target = os.open(where, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if not stat.S_ISREG(os.fstat(target).st_mode):
                raise MountError("is not a regular file", path=where, errno=errno.EEXIST, cure="choose another path")
            options = f"fd={device},rootmode=100000,user_id={os.geteuid()},group_id={os.getegid()},default_permissions"
            options += ",allow_other" * allow_other
            _engine.mount(source, f"/proc/self/fd/{target}", KIND, options, read_only=read_only)
        finally:
            os.close(target)
    except MountError:
        os.close(device)
        raise
    except OSError as error:
        os.close(device)
        number = error.errno or errno.EIO
        cures = {
            errno.EPERM: "CAP_SYS_ADMIN is needed for the mount namespace; containers and sandboxes may lack it",
            errno.ENODEV: "load the kernel's FUSE: modprobe fuse",
        }
        raise MountError(
            f"cannot be mounted on: {os.strerror(number)}", path=where, errno=number, cure=cures.get(number, "")
        ) from error
    return device


def _mount_by_helper(where: str, *, source: str, allow_other: bool, read_only: bool) -> int:
    if not os.path.exists(DEVICE):
        raise _no_device(where, errno.ENOENT)
    escaped = re.sub(r"([\\,])", r"\\\1", source)
    options = f"fsname={escaped},subtype={SUBTYPE},nosuid,nodev,default_permissions"
    options += ",allow_other" * allow_other + ",ro" * read_only
    ours, theirs = socket.socketpair()
    with ours, theirs:
        environment = os.environ | {"_FUSE_COMMFD": str(theirs.fileno())}
        _run_helper(where, ["-o", options], environment=environment, pass_fds=(theirs.fileno(),))
        theirs.close()
        _, descriptors, _, _ = socket.recv_fds(ours, 1, 1, socket.MSG_CMSG_CLOEXEC)
    if not descriptors:
        raise MountError(f"{_HELPER} mounted it and sent no descriptor", path=where, errno=errno.EPROTO)
    return descriptors[0]


def _unmount_path(where: str, *, lazy: bool, abort: bool = False) -> None:
    if os.geteuid() != 0:
        _run_helper(where, ["-u", "-z"] if lazy else ["-u"])
        return
    try:
        _engine.unmount(where, lazy=lazy, force=abort)
    except OSError as error:
        number = error.errno or errno.EIO
        cures = {errno.EBUSY: _CLOSE_FIRST, errno.EINVAL: "it may have been unmounted before"}
        raise MountError(
            f"cannot be unmounted: {os.strerror(number)}", path=where, errno=number, cure=cures.get(number, "")
        ) from error


def _open_device(where: str) -> int:
    try:
        return os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise _no_device(where, error.errno or errno.EIO) from error


def _no_device(where: str, number: int) -> MountError:
    missing = number in {errno.ENOENT, errno.ENXIO, errno.ENODEV}
    return MountError(
        f"cannot be served: {DEVICE}: {os.strerror(number)}",
        path=where,
        errno=number,
        cure="load the kernel's FUSE: modprobe fuse" if missing else f"allow this user to read and write {DEVICE}",
    )


def _run_helper(
    where: str, words: list[str], *, environment: dict[str, str] | None = None, pass_fds: tuple[int, ...] = ()
) -> None:
    """Runs fusermount3 on the path. Raises MountError with its error message."""
    helper = shutil.which(_HELPER)
    if helper is None:
        raise MountError(
            f"{_HELPER} is needed to mount as an ordinary user, and is not installed",
            path=where,
            errno=errno.ENOENT,
            cure="install it (Debian: apt install fuse3)",
        )
    try:
        done = subprocess.run(
            [helper, *words, "--", where],
            env=environment,
            pass_fds=pass_fds,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            timeout=_HELPER_TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise MountError(f"{helper} does not end", path=where, errno=errno.ETIMEDOUT) from error
    if done.returncode:
        raise helper_error(where, done.stderr)


def helper_error(where: str, said: str) -> MountError:
    """The error for what fusermount3 has printed."""
    message = said.strip().rpartition("\n")[2].removeprefix(f"{_HELPER}: ") or f"{_HELPER} failed and said nothing"
    known = (
        ("user_allow_other", errno.EPERM, "as root add the line `user_allow_other` to /etc/fuse.conf"),
        ("too many FUSE filesystems", errno.EMFILE, "unmount some, or as root raise `mount_max` in /etc/fuse.conf"),
        ("device not found", errno.ENODEV, "load the kernel's FUSE: modprobe fuse"),
        (f"failed to open {DEVICE}", errno.EACCES, f"allow this user to read and write {DEVICE}"),
        ("no write access to mountpoint", errno.EACCES, "choose a path this user may write to"),
        ("mounting over filesystem type", errno.EPERM, "choose a path on another file system"),
        ("not found in", errno.EINVAL, "it may have been unmounted before, or be another user's"),
        ("Device or resource busy", errno.EBUSY, _CLOSE_FIRST),
        ("Operation not permitted", errno.EPERM, f"{_HELPER} must be set-user-ID root, which some sandboxes forbid"),
    )
    for words, number, cure in known:
        if words in message:
            return MountError(message, path=where, errno=number, cure=cure)
    return MountError(message, path=where, errno=errno.EIO)


def _kind_of(found: Mounted) -> str:
    return f"{found.source} ({found.kind})" if found.source else f"a file system ({found.kind})"


def _advice(where: str) -> str:
    return f"umount -l {where}" if os.geteuid() == 0 else f"{_HELPER} -u -z {where}"
