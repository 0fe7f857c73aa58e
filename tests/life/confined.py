"""Program that a test starts as root in a mount namespace of its own: runs a command as in a container, in a user
namespace or as an ordinary user.

Arguments: KIND (a function below), DIRECTORY (for files of its own), COMMAND...
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

USER = 65534
ROOT_HOME = Path("/root")


def container_without_fuse(directory: Path) -> list[str]:
    """A new /dev with a few devices."""
    run("mount", "-t", "tmpfs", "none", "/dev")
    for number, name in ((3, "null"), (5, "zero"), (8, "random"), (9, "urandom")):
        os.mknod(f"/dev/{name}", 0o020666, os.makedev(1, number))
        os.chmod(f"/dev/{name}", 0o666)
    return []


def container_without_capabilities(directory: Path) -> list[str]:
    """Root with the capabilities that file access needs."""
    kept = "-all,+chown,+dac_override,+fowner"
    return ["setpriv", f"--bounding-set={kept}", f"--inh-caps={kept}"]


def user_namespace(directory: Path) -> list[str]:
    """Root of a user namespace, in a mount namespace that belongs to another."""
    return ["unshare", "--user", "--map-root-user"]


def user_and_mount_namespace(directory: Path) -> list[str]:
    """Root of a user namespace that may mount."""
    return ["unshare", "--user", "--map-root-user", "--mount"]


def ordinary_user(directory: Path) -> list[str]:
    """A user who may mount by fusermount3."""
    _replace_device(directory, 0o666)
    return _as_user(directory)


def ordinary_user_without_device(directory: Path) -> list[str]:
    """A user who may not open /dev/fuse."""
    _replace_device(directory, 0o600)
    return _as_user(directory)


def ordinary_user_without_helper(directory: Path) -> list[str]:
    """A user on a machine without fusermount3."""
    _replace_device(directory, 0o666)
    while helper := shutil.which("fusermount3"):
        run("mount", "--bind", "/dev/null", helper)
    return _as_user(directory)


def _replace_device(directory: Path, mode: int) -> None:
    device = directory / "fuse-device"
    os.mknod(device, 0o020000 | mode, os.stat("/dev/fuse").st_rdev)
    os.chmod(device, mode)
    run("mount", "--bind", device, "/dev/fuse")


def _as_user(directory: Path) -> list[str]:
    os.chown(directory, USER, USER)
    for path in directory.iterdir():
        if path.is_file():
            os.chown(path, USER, USER)
    python = Path(sys.executable).resolve()
    if python.is_relative_to(ROOT_HOME) and not ROOT_HOME.stat().st_mode & stat.S_IXOTH:
        # Python is installed where only root may go: that directory is put into another /root.
        part = ROOT_HOME / python.relative_to(ROOT_HOME).parts[0]
        aside = directory / "python"
        aside.mkdir()
        run("mount", "--bind", part, aside)
        run("mount", "-t", "tmpfs", "-o", "mode=755", "none", ROOT_HOME)
        part.mkdir()
        run("mount", "--bind", aside, part)
    return ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups"]


def run(*words: str | Path) -> None:
    """Runs a program, which must succeed."""
    subprocess.run([str(word) for word in words], check=True)


if __name__ == "__main__":
    kind, folder, *command = sys.argv[1:]
    command = [*globals()[kind](Path(folder)), *command]
    os.execvp(command[0], command)
