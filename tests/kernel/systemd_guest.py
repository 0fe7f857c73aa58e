"""Machines that systemd boots: the host's files with a layer in memory, and a disk of their own. One kind is a virtual
machine, the other consists of namespaces (processes, mounts, control groups) on the host's kernel: it is as fast as the
host, and shares its loop devices.

systemd and udev are those that scripts/guest_kernel.py unpacked, with only the units that the test needs.
`guest_systemd.sh` and `namespaces_systemd.sh` make the root. A service runs the script of the test; then the machine is
powered off.
"""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from guest import Guest, GuestError, has_ended

_HERE = Path(__file__).parent
_UNITS = {
    "systemd-udevd.service": """\
[Unit]
DefaultDependencies=no
Before=sysinit.target
[Service]
Type=notify
ExecStart=/lib/systemd/systemd-udevd
ExecStartPost=/usr/local/bin/udevadm trigger --action=add --name-match={disk}
KillMode=mixed
""",
    "test.service": """\
[Unit]
After=remote-fs.target blkloom-devices.service
[Service]
Type=oneshot
Environment=PATH={path} HOME=/run LC_ALL=C TZ=UTC PYTHONDONTWRITEBYTECODE=1
WorkingDirectory={work}
ExecStart=/bin/bash -euo pipefail {work}/script
StandardOutput=append:{work}/output
StandardError=append:{work}/output
# As `systemctl poweroff`, which would look for D-Bus first.
ExecStopPost=/usr/local/bin/systemctl start --no-block --job-mode=replace-irreversibly poweroff.target
TimeoutStartSec=infinity
""",
}
_PATIENT = """\
[Manager]
DefaultDeviceTimeoutSec=600
DefaultTimeoutStartSec=600
DefaultTimeoutStopSec=600
"""
"""/etc/systemd/system.conf: on a busy machine the guest is slow."""
_WANTED = ("remote-fs.target", "systemd-udevd.service", "test.service", "blkloom.socket", "blkloom-devices.service")


@dataclass
class SystemdMachine(ABC):
    """A machine whose disk and files in `guest.directory` stay from one boot to the next. etc: text of files in /etc,
    by path; DISK in it is replaced by the path of the disk. units: directory of further units. disk: its image.
    """

    seconds: ClassVar[float]
    guest: Guest
    etc: dict[str, str]
    units: Path
    disk: Path

    @abstractmethod
    def boot(self, script: str) -> tuple[str, str]:
        """Boots, runs the bash script as root with `-euo pipefail` and powers off. Returns what the script printed, and
        the messages on the console. Raises GuestError, also when it takes longer than `seconds` after the boot.
        """

    def _prepare(self, script: str, disk: str) -> None:
        work = self.guest.directory
        (work / "script").write_text(script)
        (work / "output").write_text("")
        self._write_etc(work / "etc", disk)

    def _write_etc(self, folder: Path, disk: str) -> None:
        units = folder / "systemd" / "system"
        wants = units / "multi-user.target.wants"
        wants.mkdir(parents=True, exist_ok=True)
        path = f"{Path(sys.executable).parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        values = {"path": path, "work": self.guest.directory, "disk": disk}
        texts = {name: text.format(**values) for name, text in _UNITS.items()}
        texts |= {unit.name: unit.read_text() for unit in self.units.glob("blkloom*") if "user" not in unit.name}
        for name, text in texts.items():
            (units / name).write_text(text)
            if name.startswith("blkloom") and name.endswith(".service"):
                added = units / f"{name}.d"
                added.mkdir(exist_ok=True)
                to = f"append:{self.guest.directory}/{name}.log"
                (added / "log.conf").write_text(f"[Service]\nStandardOutput={to}\nStandardError={to}\n")
        for name in _WANTED:
            if not (wants / name).is_symlink():
                (wants / name).symlink_to(f"{'/etc' if name in texts else '/lib'}/systemd/system/{name}")
        (folder / "systemd" / "system.conf").write_text(_PATIENT)
        default = units / "default.target"
        if not default.is_symlink():
            default.symlink_to("/lib/systemd/system/multi-user.target")
        for name, text in self.etc.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text.replace("DISK", disk))

    @property
    def _arguments(self) -> list[str]:
        """Arguments of guest_systemd.sh."""
        kernels = self.guest.kernels
        blkloom = Path(sys.executable).with_name("blkloom")
        words = [self.guest.directory, self.guest.kernel, kernels / "systemd", kernels / "udev", blkloom]
        return list(map(str, words))

    def _printed(self) -> str:
        logs = [self.guest.directory / name for name in ("output", "console")]
        logs += sorted(self.guest.directory.glob("*.log"))
        return "\n".join(f"--- {log.name}\n{log.read_text(errors='replace')}" for log in logs if log.exists())


class VirtualMachine(SystemdMachine):
    """In QEMU, with the kernel of the guest."""

    seconds: ClassVar[float] = 1800.0

    def boot(self, script: str) -> tuple[str, str]:
        """See `SystemdMachine`."""
        self._prepare(script, "/dev/vda")
        if not any(self._begins() for _ in range(2)):
            raise GuestError(f"the guest did not come up, twice\n{self._printed()}")
        return (self.guest.directory / "output").read_text(), (self.guest.directory / "console").read_text(
            errors="replace"
        )

    def _begins(self) -> bool:
        """Boots and waits for the end; returns whether the guest has come up (see `Guest`)."""
        begun = self.guest.directory / "begun"
        begun.unlink(missing_ok=True)
        first = " ".join(f'"{word}"' for word in [str(_HERE / "guest_systemd.sh"), *self._arguments])
        with (self.guest.directory / "console").open("wb") as console:
            process = subprocess.Popen(
                self._command(),
                env=os.environ | {"GUEST_FIRST": first},
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                if not (has_ended(process, self.guest.boot) or (begun.exists() and has_ended(process, self.seconds))):
                    if begun.exists():
                        raise GuestError(f"not done after {self.guest.boot + self.seconds:g} s\n{self._printed()}")
                    warnings.warn(f"a guest did not come up\n{self._printed()}", stacklevel=3)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        return begun.exists()

    def _command(self) -> list[str]:
        drive = f"file={self.disk},format=raw,if=virtio,cache=unsafe"
        shared = f"local,id=work,path={self.guest.directory},security_model=none,multidevs=remap"
        options = ["-fsdev", shared, "-device", "virtio-9p-pci,fsdev=work,mount_tag=work", "-drive", drive]
        status = [
            "--show-boot-console",
            "-a",
            "systemd.show_status=true",
            "-a",
            "systemd.log_target=console",
            "-a",
            "printk.devkmsg=on",
        ]
        command = self.guest.command("true")
        at = command.index("--qemu-opts")
        return [*command[:at], *status, *command[at:], *options]


class Namespaces(SystemdMachine):
    """In namespaces, with the kernel of the host. Needs root."""

    seconds: ClassVar[float] = 300.0

    def boot(self, script: str) -> tuple[str, str]:
        """See `SystemdMachine`."""
        with self._attached() as disk, _terminal(self.guest.directory / "console") as console:
            self._prepare(script, disk)
            unshare = ["unshare", "--mount", "--pid", "--cgroup", "--fork", "--kill-child", "--propagation", "private"]
            process = subprocess.Popen(
                [*unshare, "bash", str(_HERE / "namespaces_systemd.sh"), console, *self._arguments],
                stdin=subprocess.DEVNULL,
            )
            try:
                if not has_ended(process, self.seconds):
                    raise GuestError(f"not done after {self.seconds:g} s\n{self._printed()}")
            finally:
                process.kill()
                process.wait()
        return (self.guest.directory / "output").read_text(), (self.guest.directory / "console").read_text(
            errors="replace"
        )

    @contextmanager
    def _attached(self) -> Iterator[str]:
        """The path of a loop device on the disk's image."""
        losetup = subprocess.run(
            ["losetup", "--find", "--show", str(self.disk)], check=True, capture_output=True, text=True
        )
        path = losetup.stdout.strip()
        try:
            yield path
        finally:
            subprocess.run(["losetup", "--detach", path], check=True)


@contextmanager
def _terminal(log: Path) -> Iterator[str]:
    """The path of a terminal whose output goes to a file."""
    master, slave = pty.openpty()

    def copy() -> None:
        with log.open("wb") as file:
            while True:
                try:
                    file.write(os.read(master, 4096))
                    file.flush()
                except OSError:  # its last user has left
                    return

    thread = threading.Thread(target=copy, name="console")
    thread.start()
    try:
        yield os.ttyname(slave)
    finally:
        os.close(slave)
        thread.join()
        os.close(master)
