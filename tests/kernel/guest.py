"""Virtual machine that boots a given kernel on the host's files, for one script.

virtme-ng boots the kernel in QEMU with the host's root as a read-only root, so that the guest runs the host's programs
and this environment's blkloom. Only the guest's `directory` is writable. guest_init.sh, which runs first, gives that
root a cache, because virtme-ng's own mount asks the host for every page of every program that starts. Without KVM, a
boot takes about ten seconds, and a start of Python some more.

The programs that start in the guest do not depend on the host's packages. virtme-ng's init would start the host's
systemd-udevd and apply its tmpfiles.d, so guest_init.sh hides them. A guest with udev uses
the one that scripts/guest_kernel.py unpacked.

The guest has no network and shares only files with the host: it cannot connect to a Unix socket of the host, so servers
run in the guest. /run is memory of the guest.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# Seconds. A boot takes ten, and a multiple of that where the machine is busy.
_BOOT = 75.0

_HERE = Path(__file__).parent

_UDEV_START = """\
mkdir -p /run/udev/rules.d
cp {udev}/rules.d/* {rules}/* /run/udev/rules.d
PATH={udev}:$PATH
export SYSTEMD_IGNORE_CHROOT=1
(exec -a systemd-udevd udevadm --daemon) >/run/udevd.log 2>&1
udevadm trigger --action=add --subsystem-match=block --subsystem-match=misc
udevadm settle
"""

_NO_UDEV = """\
# dmsetup is to make the nodes itself.
export DM_DISABLE_UDEV=1
"""

_PRELUDE = """\
export PATH={path} HOME=/run TMPDIR=/run LC_ALL=C TZ=UTC PYTHONDONTWRITEBYTECODE=1
umask 022
{udev}
trap 'echo "--- the kernel"; dmesg | tail -n 15' ERR
cd {directory}
{modprobe}

# kernel_is_content [MORE]: fails if the kernel has warned, or printed what matches MORE. A virtual machine that gets no
# processor for long sees soft lockups. The kernel's command line contains any letters (base64), but no colon there.
kernel_is_content() {{
    ! dmesg | grep -v 'soft lockup' | grep -E "WARNING: |BUG(:| at) |hung_task${{1:+|$1}}"
}}

# serve URI_VARIABLE ARGUMENT...: starts blkloom in the guest; returns when clients can connect.
serve() {{
    local -n _uri=$1
    coproc SERVER {{ exec blkloom serve "${{@:2}}"; }}
    server=$SERVER_PID
    read -r _uri <&"${{SERVER[0]}}"
}}

# stop: ends what serve started; fails when it does not end well.
stop() {{
    kill "$server"
    wait "$server"
}}

{script}
"""


class GuestError(Exception):
    """The script failed, did not end in time, or the guest did not come up; with what was printed."""


@dataclass(frozen=True)
class Guest:
    """How to boot. kernels: a folder made by scripts/guest_kernel.py. directory: shared, and where scripts run.
    series: which kernel. udev: whether udev runs in it. counts: one processor, whose clock advances by a nanosecond for
    each instruction: times in the guest are numbers of instructions. boot: seconds for a boot. disk: bytes of its disk
    /dev/vda, which begins as zeros; 0 for none (needs the module virtio_blk). options: further ones of QEMU.
    """

    virtme_run: Path
    kernels: Path
    directory: Path
    series: str = "6.12"
    memory: str = "1G"
    udev: bool = False
    counts: bool = False
    boot: float = _BOOT
    disk: int = 0
    options: Sequence[str] = ()

    def run(self, script: str, *, modules: Sequence[str] = (), timeout: float = 150.0) -> str:
        """Boots, loads modules, runs the bash script as root with `-euo pipefail`, and powers off.

        Returns what the script printed. timeout: seconds for all that comes after the boot's. Raises GuestError.
        """
        work = self.directory / ".guest"
        work.mkdir(exist_ok=True)
        files = {name: work / name for name in ("script", "output", "status", "console")}
        quoted = {name: shlex.quote(str(path)) for name, path in files.items()}
        if self.udev:
            self._copy_rules()
        files["script"].write_text(self._script(script, modules))
        if self.disk:
            with self._disk.open("wb") as file:
                file.truncate(self.disk)
        inside = f"bash -euo pipefail {quoted['script']} >{quoted['output']} 2>&1; echo $? >{quoted['status']}"
        if not any(self._begins(inside, files, timeout) for _ in range(2)):
            raise GuestError(f"the guest did not come up, twice\n{_printed(files)}")
        if not files["status"].exists():
            raise GuestError(f"the guest ended before the script did\n{_printed(files)}")
        if (status := files["status"].read_text().strip()) != "0":
            raise GuestError(f"the script ended with status {status}\n{_printed(files)}")
        return files["output"].read_text()

    def _begins(self, inside: str, files: dict[str, Path], timeout: float) -> bool:
        """Boots and waits for the end; returns whether the script was begun.

        QEMU aborts or hangs once in some hundred boots on a busy machine ("iotlb_to_section: Assertion ..."). Before
        the script has begun that says nothing about what is tested, so the caller may try again.
        """
        for name in ("output", "status"):
            files[name].unlink(missing_ok=True)
        with files["console"].open("wb") as console:
            # A session of its own, so that QEMU goes too when the time is up.
            process = subprocess.Popen(
                self.command(inside),
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                ended = has_ended(process, self.boot * _crowd())
                begun = files["output"].exists()
                if begun and not ended and not has_ended(process, timeout):
                    raise GuestError(f"not done after {self.boot + timeout} s\n{_printed(files)}")
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        if not begun:
            warnings.warn(f"a guest did not come up\n{_printed(files)}", stacklevel=3)
        return begun

    @property
    def _disk(self) -> Path:
        """The sparse file behind /dev/vda."""
        return self.directory / ".guest" / "disk"

    @property
    def kernel(self) -> Path:
        """The folder of `vmlinuz` and its modules."""
        return self.kernels / self.series

    @property
    def _udev(self) -> str:
        """Its folder, as a shell has it."""
        return shlex.quote(str(self.kernels / "udev"))

    @property
    def _rules(self) -> Path:
        """A folder for the rules of dmsetup, which belong to its version; what the host has is hidden in the guest."""
        return self.directory / ".guest" / "rules"

    def _copy_rules(self) -> None:
        self._rules.mkdir(exist_ok=True)
        for name in ("55-dm", "60-persistent-storage-dm", "95-dm-notify"):
            shutil.copy(f"/usr/lib/udev/rules.d/{name}.rules", self._rules)

    def _script(self, script: str, modules: Sequence[str]) -> str:
        path = [str(Path(sys.executable).parent), "/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin"]
        modprobe = ["modprobe", "-d", str(self.kernel), "-a", *modules] if modules else ["true"]
        return _PRELUDE.format(
            path=shlex.quote(":".join([*path, "/sbin", "/bin"])),
            directory=shlex.quote(str(self.directory)),
            modprobe=shlex.join(modprobe),
            udev=_UDEV_START.format(udev=self._udev, rules=shlex.quote(str(self._rules))) if self.udev else _NO_UDEV,
            script=script,
        )

    def command(self, inside: str) -> list[str]:
        """The command line of virtme-run; `inside` is run in the guest."""
        return [
            *(str(self.virtme_run), "--kimg", str(self.kernel / "vmlinuz"), "--mods=auto"),
            *("--qemu-bin", str(_HERE / "guest_qemu.sh")),
            *("--busybox", str(self.kernels / "busybox")),
            # The same everywhere: with KVM, or with virtiofs, a test would not be the one CI runs.
            *("--disable-kvm", "--force-9p", "--disable-microvm"),
            *("--memory", self.memory, "--cpus", "1" if self.counts else "2"),
            *("--rwdir", str(self.directory)),
            *("--script-sh", inside),
            *("--qemu-opts", "-accel", "tcg,thread=single"),
            *(("-icount", "shift=0") if self.counts else ()),
            *("-fsdev", "local,id=kept,path=/,security_model=none,readonly=on,multidevs=remap"),
            *("-device", "virtio-9p-pci,fsdev=kept,mount_tag=kept"),
            *(("-drive", f"file={self._disk},if=virtio,format=raw,cache=unsafe,discard=unmap") if self.disk else ()),
            *self.options,
        ]


def _crowd() -> float:
    """Processes that want to run, for each CPU; at least 1."""
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def has_ended(process: subprocess.Popen[bytes], seconds: float) -> bool:
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    return process.returncode is not None


def _printed(files: dict[str, Path]) -> str:
    parts = []
    for name in ("output", "console"):
        if files[name].exists() and (text := files[name].read_text(errors="replace").strip()):
            parts.append(f"--- {name}\n{text}")
    return "\n".join(parts)
