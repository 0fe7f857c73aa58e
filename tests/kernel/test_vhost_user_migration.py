"""Live migration of a virtual machine whose disk is a device of blkloom, between two QEMU processes.

The machine has no files of the host, with which QEMU would not migrate it: it boots from an initramfs with busybox and
the modules for its disk.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import os
import random
import re
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

from blkloom.testing.serving import supervised
from long_runs import only_long

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(600)]
KERNELS = Path(__file__).parents[2] / ".cache" / "kernel"
SLOTS, SLOT = 32, 256 << 10
PATIENCE = 240.0
MODULES = ("virtio", "virtio_ring", "virtio_pci_legacy_dev", "virtio_pci_modern_dev", "virtio_pci", "virtio_blk")

# Each round writes a slot, lets the disk fill the page cache again, and checks all slots twice: what was read, and what
# is in memory. Between the two the machine may be on the other side.
INIT = f"""#!/busybox sh
export PATH=/bin
/busybox mkdir -p /bin /dev /proc /sums
/busybox --install -s /bin
mount -t devtmpfs none /dev
mount -t proc none /proc
for module in {" ".join(MODULES)}; do test ! -e /$module.ko || insmod /$module.ko; done
until test -b /dev/vda; do sleep 0.1; done
check() {{
    for slot in $(seq 0 {SLOTS - 1}); do
        sum=$(dd if=/dev/vda bs=64k skip=$((slot * 4)) count=4 2>/dev/null | md5sum)
        test "$sum" = "$(cat /sums/$slot)" || echo "DIFFERENT slot $slot in round $round, $1"
    done
}}
for slot in $(seq 0 {SLOTS - 1}); do
    dd if=/dev/vda bs=64k skip=$((slot * 4)) count=4 2>/dev/null | md5sum > /sums/$slot
done
round=0
while true; do
    round=$((round + 1))
    slot=$((round % {SLOTS}))
    dd if=/dev/urandom of=/data bs=64k count=4 2>/dev/null
    md5sum < /data > /sums/$slot
    dd if=/data of=/dev/vda bs=64k seek=$((slot * 4)) conv=fsync 2>/dev/null
    echo "written $slot $(cat /sums/$slot)"
    echo 1 > /proc/sys/vm/drop_caches
    check read
    check memory
    echo "round $round"
done
"""


def _initramfs(folder: Path) -> Path:
    """An archive of cpio's format "newc"."""
    (modules,) = (KERNELS / "6.12" / "lib" / "modules").iterdir()
    files = {"init": INIT.encode(), "busybox": (KERNELS / "busybox").read_bytes()}
    for name in MODULES:
        for found in (*modules.rglob(f"{name}.ko.xz"), *modules.rglob(f"{name}.ko")):  # the others are built in
            files[f"{name}.ko"] = lzma.decompress(found.read_bytes()) if found.suffix == ".xz" else found.read_bytes()
    archive = bytearray()
    for number, (name, data) in enumerate([*files.items(), ("TRAILER!!!", b"")], 1):
        fields = (number, 0o100755, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
        archive += b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0"
        archive += bytes(-len(archive) % 4) + data
        archive += bytes(-len(archive) % 4)
    path = folder / "initramfs"
    path.write_bytes(archive)
    return path


class Qemu:
    """A QEMU process, and its monitor. Ends it at the end."""

    def __init__(self, folder: Path, name: str, disk: str, *options: str) -> None:
        self.console = folder / f"{name}.console"
        self._errors = folder / f"{name}.errors"
        monitor = folder / f"{name}.monitor"
        memory = "192M"
        with self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                [
                    *("qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-m", memory),
                    *("-machine", "q35,memory-backend=memory", "-accel", "tcg,thread=single"),
                    *("-object", f"memory-backend-memfd,id=memory,size={memory},share=on"),
                    *("-chardev", f"socket,id=disk,path={disk},reconnect-ms=100"),
                    *("-device", "vhost-user-blk-pci,chardev=disk,num-queues=1"),
                    *("-serial", f"file:{self.console}", "-qmp", f"unix:{monitor},server=on,wait=off"),
                    *options,
                ],
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=subprocess.STDOUT,
            )
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(PATIENCE)
        self._until(lambda: self._socket.connect_ex(os.fspath(monitor)) == 0)
        self._lines = self._socket.makefile("rb")
        self._lines.readline()
        self.ask("qmp_capabilities")

    def _until(self, true: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not true():
            assert self._process.poll() is None, self._errors.read_text()
            assert time.monotonic() < deadline, self.printed()[-2000:]
            time.sleep(0.05)

    def ask(self, command: str, **arguments: Any) -> Any:
        """Executes a command of the monitor. Raises RuntimeError."""
        self._socket.sendall(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        while "event" in (answer := json.loads(self._lines.readline() or b"{}")):
            pass
        if "return" not in answer:
            raise RuntimeError(f"{command}: {answer}\n{self._errors.read_text()}")
        return answer["return"]

    def printed(self) -> str:
        """What the machine has printed."""
        return self.console.read_text(errors="replace") if self.console.exists() else ""

    def rounds(self, count: int) -> None:
        """Waits for so many rounds that are printed here."""
        self._until(lambda: self.printed().count("round ") >= count)

    def migrated(self) -> dict[str, Any]:
        """Waits for the end of a migration."""
        state: dict[str, Any] = {}

        def has_ended() -> bool:
            state.update(self.ask("query-migrate"))
            return state.get("status") in {"completed", "failed", "cancelled"}

        self._until(has_ended)
        return state

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._lines.close()
        self._socket.close()
        self._process.kill()
        self._process.wait()


@pytest.fixture
def folder(program: Callable[[str, str], str], tmp_path: Path) -> Path:
    """Skips where no machine can be booted."""
    program("qemu-system-x86_64", "qemu-system-x86")
    if not (KERNELS / "busybox").exists():
        pytest.skip(f"no kernels in {KERNELS} (make test-tools)")
    return tmp_path


@pytest.mark.parametrize("devices", [pytest.param(1, marks=only_long), 2])
def test_a_machine_goes_on_in_another_qemu(folder: Path, devices: int) -> None:
    """Two devices on the same file, as on two hosts, or two exports of one device."""
    image = folder / "disk.img"
    image.write_bytes(random.Random(3).randbytes(SLOTS * SLOT))
    boot = ("-kernel", str(KERNELS / "6.12" / "vmlinuz"), "-initrd", str(_initramfs(folder)))
    boot += ("-append", "console=ttyS0 quiet panic=-1")
    address = f"unix:{folder}/migration"
    with supervised() as client:
        for name in ("first", "second")[:devices]:
            client.create(name, table=f"0 {SLOTS * SLOT // 512} loop {image}", shared=True)
        paths = [
            client.export(name, kind="vhost-user", path=str(folder / f"socket{number}")).path
            for number, name in enumerate(("first", "second" if devices == 2 else "first"))
        ]
        with (
            Qemu(folder, "source", paths[0], *boot) as source,
            Qemu(folder, "destination", paths[1], *boot, "-incoming", address) as destination,
        ):
            source.rounds(2)
            source.ask("migrate-set-parameters", **{"max-bandwidth": 24 << 20, "downtime-limit": 3000})
            source.ask("migrate", uri=address)
            state = source.migrated()
            assert state["status"] == "completed", state
            destination.rounds(2)
            destination.ask("stop")
            printed = source.printed() + destination.printed()
            assert "DIFFERENT" not in printed, printed[-2000:]
            written = re.findall(r"written (\d+) +([0-9a-f]{32})", printed)
            sums = {int(slot): found for slot, found in written}
            last = int(written[-1][0])
    data = image.read_bytes()
    for slot, expected in sums.items():
        if slot != (last + 1) % SLOTS:  # that may be half written
            assert hashlib.md5(data[slot * SLOT :][:SLOT]).hexdigest() == expected, f"slot {slot}"
    assert len(sums) > 3


def test_a_machine_with_a_qcow2_disk_is_not_migrated(folder: Path, program: Callable[[str, str], str]) -> None:
    image = folder / "disk.qcow2"
    subprocess.run([program("qemu-img", "qemu-utils"), "create", "-q", "-f", "qcow2", image, "1M"], check=True)
    with supervised() as client:
        client.create("disk", table=f"0 2048 qcow2 {image}")
        path = client.export("disk", kind="vhost-user").path
        with Qemu(folder, "source", path, "-S") as source, pytest.raises(RuntimeError, match="VHOST_F_LOG_ALL"):
            source.ask("migrate", uri=f"unix:{folder}/migration")
