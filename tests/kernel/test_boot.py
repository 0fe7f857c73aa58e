"""Devices at boot, in a machine that systemd boots: fstab mounts from a device whose file is on a local file system;
the service is restarted, stopped, and killed with its workers under load; then the machine shuts down cleanly, and at
the second boot all is there that `save` has written.
"""

from __future__ import annotations

import dataclasses
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from guest import Guest
from systemd_guest import Namespaces, SystemdMachine, VirtualMachine

from conformance.file_systems import needs_root
from faulty_fs import needs_fuse
from long_runs import LONG, only_long

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(0 if LONG else 1200)]
ROOT = Path(__file__).parents[2]
MiB = 1 << 20
FSTAB = """\
DISK /srv ext4 defaults 0 2
/dev/blkloom/disk /data ext4 _netdev 0 2
"""
FIRST = """\
[ "$(findmnt -n -o SOURCE /data)" = "$(readlink -f /dev/blkloom/disk)" ] && echo mounted at boot
coproc LOAD {{ exec python {load} /data; }}
load=$LOAD_PID rounds=${{LOAD[0]}}
more() {{  # waits until the load has done two rounds that begin later
    while read -r -t 0 -u "$rounds"; do read -r -u "$rounds"; done
    for _ in 1 2 3; do read -r -u "$rounds"; done
}}
worker() {{ blkloom info -c --noheadings -o worker disk; }}
more
before=$(worker)
for _ in 1 2; do systemctl restart blkloom.service; more; done
systemctl stop blkloom.service 2>/run/warning
more
[ "$(worker)" = "$before" ] && echo the worker serves on
systemctl kill --kill-whom=all --signal=KILL blkloom.service
more
[ "$(worker)" != "$before" ] && echo another worker serves on
kill "$load"
wait "$load"
blkloom create memory --table '0 32768 ram' --attach >/run/node
blkloom save
mkfs.ext4 -q /dev/blkloom/memory
mkdir /by-hand
mount /dev/blkloom/memory /by-hand
echo lost >/by-hand/file
cp -r /etc/blkloom/devices.d {work}/saved
"""
LOAD = """\
import hashlib, itertools, os, signal, sys

(folder,) = sys.argv[1:]
ended = []
signal.signal(signal.SIGTERM, lambda *_: ended.append(True))
sums = {}
for round in itertools.count(1):
    name = f"{folder}/{round % 8}"
    data = os.urandom(200_000)
    with open(name, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    sums[name] = hashlib.sha256(data).hexdigest()
    for other, digest in sums.items():
        with open(other, "rb") as file:
            assert hashlib.sha256(file.read()).hexdigest() == digest, other
    print(round, flush=True)
    if ended:
        break
with open(f"{folder}/sums", "w") as file:
    for name, digest in sums.items():
        print(f"{digest}  {name}", file=file)
"""
SECOND = """\
sha256sum --check --quiet /data/sums && echo the files are there
cmp --bytes $((16 << 20)) /dev/zero "$(readlink -f /dev/blkloom/memory)" && echo memory is empty
blkloom restore
"""


IN_QEMU = pytest.param(
    VirtualMachine,
    id="virtual machine",
    marks=only_long,
)


@pytest.fixture(params=[pytest.param(Namespaces, id="namespaces"), IN_QEMU])
def machine(request: pytest.FixtureRequest, guest: Guest, program: Callable[[str, str], str]) -> SystemdMachine:
    """With a device in /etc/blkloom/devices.d, whose file is on the machine's disk."""
    if not (guest.kernels / "systemd" / "lib" / "systemd" / "systemd").exists():
        pytest.skip(f"no systemd in {guest.kernels} (make test-tools)")
    if request.param is Namespaces:
        needs_root("namespaces")
        needs_fuse()
    mkfs = program("mkfs.ext4", "e2fsprogs")
    files = guest.directory / "srv"
    files.mkdir()
    for image, size, options in [
        (files / "disk.img", 48 * MiB, []),
        (guest.directory / "disk0.img", 160 * MiB, ["-d", str(files)]),
    ]:
        with image.open("wb") as file:
            file.truncate(size)
        subprocess.run([mkfs, "-q", *options, str(image)], check=True)
    etc = {
        "fstab": FSTAB,
        "blkloom/devices.d/disk.table": f"attach --via loop\n0 {48 * MiB // 512} loop /srv/disk.img\n",
        "udev/rules.d/60-blkloom.rules": (ROOT / "udev" / "60-blkloom.rules").read_text(),
    }
    (guest.directory / "load.py").write_text(LOAD)
    slower = dataclasses.replace(guest, boot=200.0)  # it copies systemd before the script begins
    kind: type[SystemdMachine] = request.param
    return kind(slower, etc, ROOT / "systemd", guest.directory / "disk0.img")


def test_devices_are_there_from_boot_to_shutdown(machine: SystemdMachine, program: Callable[[str, str], str]) -> None:
    work = machine.guest.directory
    printed, console = machine.boot(FIRST.format(load=work / "load.py", work=work))
    directory = "/etc/blkloom/devices.d"
    assert printed.splitlines() == [
        "mounted at boot",
        "the worker serves on",
        "another worker serves on",
        f"{directory}/disk.table: unchanged",
        f"{directory}/memory.table: written, which does not have the bytes of its memory",
    ]
    assert_clean(console, machine, program)
    machine.etc |= {f"blkloom/devices.d/{path.name}": path.read_text() for path in (work / "saved").iterdir()}
    printed, console = machine.boot(SECOND)
    assert printed.splitlines() == [
        "the files are there",
        "memory is empty",
        "disk: there already",
        "memory: there already",
    ]
    assert_clean(console, machine, program)
    log = (work / "blkloom-devices.service.log").read_text()
    assert "memory: made, empty: its memory was not saved, attached at /dev/loop" in log


def assert_clean(console: str, machine: SystemdMachine, program: Callable[[str, str], str]) -> None:
    """The machine has shut down without an error or a time-out, in the right order, and its file systems are clean."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console)
    assert not re.search(r"\[FAILED\]|\[ TIME \]|\[DEPEND\]|timed out|ordering cycle|I/O error|EXT4-fs error", text), (
        text
    )
    ends = ["Unmounted data.mount", "Stopped blkloom-shutdown.service", "Unmounted srv.mount", "Powering off"]
    places = [text.rfind(end) for end in ends]
    assert -1 not in places, text
    assert places == sorted(places), text
    e2fsck, debugfs = program("e2fsck", "e2fsprogs"), program("debugfs", "e2fsprogs")
    disk = machine.guest.directory / "disk.img"
    subprocess.run([debugfs, "-R", f"dump /disk.img {disk}", str(machine.disk)], check=True, capture_output=True)
    for image in (machine.disk, disk):
        features = subprocess.run([debugfs, "-R", "features", str(image)], check=True, capture_output=True, text=True)
        assert "needs_recovery" not in features.stdout
        subprocess.run([e2fsck, "-fn", str(image)], check=True, capture_output=True)
