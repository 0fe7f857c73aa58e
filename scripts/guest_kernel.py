"""A Linux kernel and udev for the tests under tests/kernel, unpacked into a directory and never installed.

`guest_kernel.py DIRECTORY` puts there `vmlinuz`, `lib/modules/RELEASE` with its dependencies worked
out, and `busybox`, from Debian's backports of the machine's release; and in `udev` the program and the
rules of the release's package of that name, for guests, whether or not the machine has it. What is
there already is kept. Needs no root; needs kmod. Exits 1 with the reason when something cannot be had.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from debian import BackportsApt, DebianError, is_debian

KERNEL = "6.12"
"""The series of Linux that is wanted: it has nbd, ublk_drv and device-mapper as modules."""


def fetch(directory: Path) -> str:
    """Puts what is missing there; returns what that was. Raises DebianError."""
    work = directory.with_name(f"{directory.name}.partial")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    apt = BackportsApt(work / "apt")
    apt.update()
    got = []
    if not _has_kernel(directory):
        got.append(f"Linux {_fetch_kernel(apt, work, directory)}")
    if not _has_udev(directory):
        _fetch_udev(apt, work, directory)
        got.append("udev")
    shutil.rmtree(work)
    return " and ".join(got)


def _has_kernel(directory: Path) -> bool:
    return (directory / "vmlinuz").exists()


def _has_udev(directory: Path) -> bool:
    return (directory / "udev" / "udevadm").exists()


def _fetch_kernel(apt: BackportsApt, work: Path, directory: Path) -> str:
    """The newest one of the series; returns its release."""
    image = _image_package(apt)
    release = image.removeprefix("linux-image-")
    unpacked = work / "unpacked"
    apt.unpack([image, "busybox-static"], unpacked)
    result = work / "result"
    modules = result / "lib" / "modules"
    modules.mkdir(parents=True)
    # Debian is moving /lib and /bin into /usr: both are looked in.
    _either(unpacked, f"lib/modules/{release}").rename(modules / release)
    _either(unpacked, "bin/busybox").rename(result / "busybox")
    (unpacked / "boot" / f"vmlinuz-{release}").rename(result / "vmlinuz")
    _work_out_dependencies(result, release)
    shutil.rmtree(directory, ignore_errors=True)
    result.rename(directory)
    return release


def _fetch_udev(apt: BackportsApt, work: Path, directory: Path) -> None:
    """What runs of it in a guest: the program and the rules."""
    unpacked, result = work / "udev-unpacked", work / "udev"
    apt.unpack(["udev"], unpacked)
    result.mkdir()
    _either(unpacked, "bin/udevadm").rename(result / "udevadm")
    _either(unpacked, "lib/udev/rules.d").rename(result / "rules.d")
    shutil.rmtree(directory / "udev", ignore_errors=True)
    result.rename(directory / "udev")


def _image_package(apt: BackportsApt) -> str:
    """The package behind the one that always names the newest kernel."""
    depends = apt.field("linux-image-amd64", "Depends")
    image = depends.split()[0] if depends else ""
    if not image.startswith(f"linux-image-{KERNEL}."):
        raise DebianError(
            f"{apt.suite} has no Linux {KERNEL}: linux-image-amd64 there depends on {depends or 'nothing'}"
        )
    return image


def _either(root: Path, path: str) -> Path:
    merged = root / "usr" / path
    return merged if merged.exists() else root / path


def _work_out_dependencies(root: Path, release: str) -> None:
    depmod = shutil.which("depmod", path="/usr/sbin:/sbin:/usr/bin:/bin")
    if depmod is None:
        raise DebianError("depmod is missing: install the package kmod")
    subprocess.run([depmod, "--all", "--basedir", root, release], check=True)


def main(arguments: Sequence[str]) -> int:
    """Runs `guest_kernel.py DIRECTORY`."""
    if len(arguments) != 1:
        print(f"usage: {Path(__file__).name} DIRECTORY", file=sys.stderr)
        return 2
    directory = Path(arguments[0]).absolute()
    if _has_kernel(directory) and _has_udev(directory):
        return 0
    if not is_debian() or platform.machine() != "x86_64":
        print("the kernel for tests comes from Debian's archive, for amd64: tests/kernel will be skipped here")
        return 0
    try:
        got = fetch(directory)
    except (DebianError, subprocess.CalledProcessError) as error:
        print(f"no kernel and udev for the tests: {error}", file=sys.stderr)
        return 1
    print(f"{got} is in {directory}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
