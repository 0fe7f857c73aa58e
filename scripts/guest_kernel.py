"""Linux kernels, udev and systemd for the tests under tests/kernel, unpacked into a directory and never installed.

`guest_kernel.py DIRECTORY` creates a directory for each series of `KERNELS`, with `vmlinuz` and `lib/modules/RELEASE`
with computed dependencies; `busybox`; `udev`, with the program and the rules of the release's package udev; and
`systemd`, the files of the package, for virtual machines, even if the machine has these packages. All come from Debian.
Existing files are kept. Needs no root; needs kmod. Exits 1 with the reason if something is not available.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from debian import DebianError, SuitesApt, codename, is_debian

KERNELS: Final = {"6.1": "{codename}", "6.12": "{codename}-backports", "7.3": "trixie-backports"}
"""The series of Linux that are wanted, and the suite of each. All have nbd, fuse and device-mapper as modules,
and ublk_drv from 6.12 on; the first is too old for FUSE_NOTIFY_RESEND, the last can resize a ublk device.
"""
SYSTEMD: Final = ("systemd", "libsystemd-shared", "libapparmor1", "libip4tc2", "libseccomp2")
"""systemd, with those of its libraries that a small system may lack."""


def fetch(directory: Path) -> list[str]:
    """Download and unpack missing parts; return their names. Raises DebianError."""
    directory.mkdir(parents=True, exist_ok=True)
    work = directory.with_name(f"{directory.name}.partial")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    got = []
    suites = {series: suite.format(codename=codename()) for series, suite in KERNELS.items()}
    apt = SuitesApt(work / "apt", list(dict.fromkeys([codename(), *suites.values()])))
    apt.update()
    for series, suite in suites.items():
        if not (directory / series / "vmlinuz").exists():
            got.append(f"Linux {_fetch_kernel(apt, series, suite, work, directory)}")
    if not (directory / "busybox").exists():
        unpacked = work / "busybox-unpacked"
        apt.unpack(["busybox-static"], unpacked)
        _either(unpacked, "bin/busybox").rename(directory / "busybox")
        got.append("busybox")
    if not _has_udev(directory):
        _fetch_udev(apt, work, directory)
        got.append("udev")
    if not _has_systemd(directory):
        apt.unpack(SYSTEMD, work / "systemd")
        shutil.rmtree(directory / "systemd", ignore_errors=True)
        (work / "systemd").rename(directory / "systemd")
        got.append("systemd")
    shutil.rmtree(work)
    return got


def _has_all(directory: Path) -> bool:
    kernels = all((directory / series / "vmlinuz").exists() for series in KERNELS)
    return kernels and (directory / "busybox").exists() and _has_udev(directory) and _has_systemd(directory)


def _has_udev(directory: Path) -> bool:
    return (directory / "udev" / "udevadm").exists()


def _has_systemd(directory: Path) -> bool:
    return _either(directory / "systemd", "lib/systemd/systemd").exists()


def _fetch_kernel(apt: SuitesApt, series: str, suite: str, work: Path, directory: Path) -> str:
    """Unpack the newest kernel of the series in the suite; return its release."""
    image = _image_package(apt, series, suite)
    release = image.removeprefix("linux-image-")
    unpacked = work / f"unpacked-{series}"
    apt.unpack([image, *_parts(apt, image, suite)], unpacked)
    result = work / f"result-{series}"
    modules = result / "lib" / "modules"
    modules.mkdir(parents=True)
    # Debian is moving /lib and /bin into /usr: both are looked in.
    _either(unpacked, f"lib/modules/{release}").rename(modules / release)
    beside_modules = modules / release / "vmlinuz"
    program = beside_modules if beside_modules.exists() else unpacked / "boot" / f"vmlinuz-{release}"
    program.rename(result / "vmlinuz")
    _work_out_dependencies(result, release)
    shutil.rmtree(directory / series, ignore_errors=True)
    result.rename(directory / series)
    return release


def _fetch_udev(apt: SuitesApt, work: Path, directory: Path) -> None:
    """Unpack the parts of udev that run in a virtual machine: the program and the rules."""
    unpacked, result = work / "udev-unpacked", work / "udev"
    apt.unpack(["udev"], unpacked)
    result.mkdir()
    _either(unpacked, "bin/udevadm").rename(result / "udevadm")
    _either(unpacked, "lib/udev/rules.d").rename(result / "rules.d")
    shutil.rmtree(directory / "udev", ignore_errors=True)
    result.rename(directory / "udev")


def _image_package(apt: SuitesApt, series: str, suite: str) -> str:
    """The package that the meta-package of the suite's newest kernel depends on."""
    depends = apt.field("linux-image-amd64", "Depends", suite)
    image = next((name for name in _names(depends) if name.startswith(f"linux-image-{series}.")), "")
    if not image:
        raise DebianError(f"{suite} has no Linux {series}: linux-image-amd64 there depends on {depends or 'nothing'}")
    return image


def _parts(apt: SuitesApt, image: str, suite: str) -> list[str]:
    """The packages of the kernel's program and modules, where the image's own package does not have them."""
    release = image.removeprefix("linux-image")
    return [name for name in _names(apt.field(image, "Depends", suite)) if name.endswith(release)]


def _names(depends: str | None) -> list[str]:
    """Of the packages in a field such as Depends."""
    return [one.split()[0] for one in (depends or "").split(",") if one.strip()]


def _either(root: Path, path: str) -> Path:
    merged = root / "usr" / path
    return merged if merged.exists() else root / path


def _work_out_dependencies(root: Path, release: str) -> None:
    depmod = shutil.which("depmod", path="/usr/sbin:/sbin:/usr/bin:/bin")
    if depmod is None:
        raise DebianError("depmod is missing: install the package kmod")
    subprocess.run([depmod, "--all", "--basedir", root, release], check=True)


def main(arguments: Sequence[str]) -> int:
    """Run `guest_kernel.py DIRECTORY`."""
    if len(arguments) != 1:
        print(f"usage: {Path(__file__).name} DIRECTORY", file=sys.stderr)
        return 2
    directory = Path(arguments[0]).absolute()
    if _has_all(directory):
        return 0
    if not is_debian() or platform.machine() != "x86_64":
        print("kernels for tests come from Debian's archive, for amd64: tests/kernel will be skipped here")
        return 0
    try:
        got = fetch(directory)
    except (DebianError, subprocess.CalledProcessError) as error:
        print(f"no kernels for the tests: {error}", file=sys.stderr)
        return 1
    print(f"in {directory} now: {', '.join(got)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
