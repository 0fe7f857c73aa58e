"""An image that became unusable while its device was suspended: `resume` gives the reason, the device stays suspended,
and continues after the image was repaired.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from blkloom.errors import BackingError
from conformance.nbd_client import READ, WRITE, NbdClient
from qcow2 import qemu
from qcow2.shapes import Shape, make
from qcow2.slow_image import CORRUPT

from .conftest import Life
from .maintained import MIB, NAME, Disk, disks

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("qemu_tools")]
SIZE = MIB

Program = Callable[[str, str], str]
Harm = Callable[[Path], object]


@pytest.fixture
def life(shared: Life) -> Life:
    return shared


@pytest.fixture
def disk(blkloom: str, life: Life, tmp_path: Path) -> Iterator[Callable[[Shape], Disk]]:
    with disks(blkloom, life, tmp_path, size=SIZE) as made:
        yield made


def _put(path: Path, data: bytes) -> None:
    """Into the same file: who has it open sees it."""
    with path.open("r+b") as file:
        file.truncate(0)
        file.write(data)


def _corrupt_bit(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(72)
        bits = int.from_bytes(file.read(8), "big") | CORRUPT
        file.seek(72)
        file.write(bits.to_bytes(8, "big"))


def _luks(path: Path) -> None:
    other = path.with_suffix(".luks")
    qemu.create_encrypted(other, SIZE)
    _put(path, other.read_bytes())


def _converted(path: Path) -> None:
    other = path.with_suffix(".vmdk")
    qemu.qemu_img("convert", "-O", "vmdk", path, other)
    _put(path, other.read_bytes())


def _unknown_feature(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(72)
        file.write((1 << 40).to_bytes(8, "big"))


def _over_a_vdi(path: Path) -> None:
    qemu.qemu_img("create", "-q", "-f", "vdi", path.with_name("base.vdi"), str(SIZE))
    qemu.qemu_img("rebase", "-u", "-b", "base.vdi", "-F", "vdi", path)


def _l1_cut_off(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(40)
        file.truncate(int.from_bytes(file.read(8), "big"))


PLAIN = Shape(cluster_bits=12)
HARMS: dict[str, tuple[Harm, str]] = {
    "truncated to nothing": (lambda path: os.truncate(path, 0), "the file ends after 0 bytes"),
    "truncated in its header": (lambda path: os.truncate(path, 60), "the file ends after 60 bytes"),
    "truncated before its L1 table": (_l1_cut_off, "the L1 table .* reaches past the end of the file"),
    "garbage": (lambda path: _put(path, b"nothing " * 8192), "no QCOW2 image: it begins with 0x6e6f7468"),
    "marked corrupt": (_corrupt_bit, r"marked corrupt; .*qemu-img check -r all.*read_only"),
    "encrypted": (_luks, r"encrypted \(LUKS\)"),
    "of another format": (_converted, "no QCOW2 image: it begins with 0x4b444d56"),
    "of a later QEMU": (_unknown_feature, "unknown incompatible features: bit 40"),
    "over a backing file that is not there": (
        lambda path: qemu.qemu_img("rebase", "-u", "-b", "gone.qcow2", "-F", "qcow2", path),
        "its backing file .*gone.qcow2.*: No such file",
    ),
    "over a backing file elsewhere": (
        lambda path: qemu.qemu_img("rebase", "-u", "-b", "/etc/passwd", "-F", "raw", path),
        "outside of what may be reached .*allow_backing=/etc",
    ),
    "over itself": (
        lambda path: qemu.qemu_img("rebase", "-u", "-b", path.name, "-F", "qcow2", path),
        "the backing chain is a cycle",
    ),
    "over an unknown format": (lambda path: _over_a_vdi(path), "has the format 'vdi'"),
}


@pytest.mark.parametrize("kind", HARMS)
def test_an_image_that_cannot_be_used_is_refused_until_it_can(disk: Callable[[Shape], Disk], kind: str) -> None:
    harm, says = HARMS[kind]
    one = disk(PLAIN)
    assert not one.command("suspend", NAME)
    kept = one.path.read_bytes()
    waiting = one.nbd.send(READ, 0, 4096)
    harm(one.path)
    found = one.path.read_bytes()
    for _ in range(2):
        said = one.command("resume", NAME)
        assert re.search(says, said), said
        assert str(one.path) in said
        assert one.state == "SUSPENDED"
    assert one.path.read_bytes() == found, "it was written to"
    _put(one.path, kept)
    assert not one.command("resume", NAME)
    answered, reply = one.nbd.receive()
    assert (answered, reply.error, reply.data) == (waiting, 0, bytes(one.content[:4096]))
    one.write(1, 0, 4096)
    one.end()


def test_an_image_marked_corrupt_is_repaired_by_qemu_and_resumed(disk: Callable[[Shape], Disk]) -> None:
    one = disk(PLAIN)
    assert not one.command("suspend", NAME)
    _corrupt_bit(one.path)
    assert "qemu-img check -r all" in one.command("resume", NAME)
    qemu.check(one.path, repair="all")
    assert not one.command("resume", NAME)
    one.write(2, 0, MIB)
    one.end()


def test_an_image_shorter_than_its_segment_is_refused_and_a_longer_one_is_not(life: Life, tmp_path: Path) -> None:
    made = make(tmp_path, PLAIN, size=SIZE)
    sectors = SIZE // 512
    with life.client() as client:
        client.create(NAME, table=f"0 8 zero\n8 {sectors} qcow2 {made.path}")
        client.suspend(NAME)
        qemu.qemu_img("resize", "--shrink", made.path, str(SIZE - 4096))
        with pytest.raises(BackingError, match=rf"has {sectors - 8} sectors now, and the table wants {sectors}"):
            client.resume(NAME)
        assert client.info(NAME)[0].state == "SUSPENDED"
        qemu.qemu_img("resize", made.path, str(2 * SIZE))
        client.resume(NAME)
        assert client.info(NAME)[0].size == SIZE + 4096, "the table says what the device is"
        with closing(NbdClient.unix(life.socket(NAME))) as nbd:
            assert nbd.ask(READ, 0, 4096).data == bytes(4096)
            assert nbd.ask(READ, 4096, SIZE).data == made.content[: SIZE - 4096] + bytes(4096)
        client.remove(NAME, retry=True)


def test_another_table_may_take_the_place_of_an_image_that_became_unusable(
    disk: Callable[[Shape], Disk], life: Life, tmp_path: Path
) -> None:
    one = disk(PLAIN)
    assert not one.command("suspend", NAME)
    copy = tmp_path / "copy.qcow2"
    copy.write_bytes(one.path.read_bytes())
    _corrupt_bit(one.path)
    with life.client() as client:
        with pytest.raises(BackingError, match="marked corrupt"):
            client.resume(NAME)
        client.load(NAME, f"0 {SIZE // 512} qcow2 {one.path} 1 read_only")
        client.resume(NAME)
        one.verify()
        client.load(NAME, f"0 {SIZE // 512} qcow2 {copy}")
        client.resume(NAME)
    one.path = copy
    one.write(3, 0, 4096)
    one.end()


def test_metadata_found_wrong_under_a_live_device_wakes_who_waits_and_is_repaired_while_suspended(
    disk: Callable[[Shape], Disk], life: Life
) -> None:
    one = disk(PLAIN)
    with one.suspended() as image:
        _without_counts(image)
    with life.client() as client:
        before = client.info(NAME)[0].event
    reply = one.nbd.ask(WRITE, 0, payload=b"x" * SIZE)
    assert reply.error == errno.EIO
    with life.client() as client:
        assert client.wait(NAME, before) > before
    found = one.read(0, SIZE)
    assert all(new in (old, ord("x")) for new, old in zip(found, one.content, strict=True))
    one.content[:] = found
    assert one.status["wants_check"] == "1"
    assert one.nbd.ask(WRITE, SIZE // 2, payload=b"x" * 4096).error == errno.EIO
    assert not one.command("suspend", NAME)
    assert "marked corrupt" in one.command("resume", NAME)
    qemu.check(one.path, repair="all")
    assert not one.command("resume", NAME)
    assert one.status["wants_check"] == "0"
    one.write(4, 0, SIZE)
    one.end()


def _without_counts(path: Path) -> None:
    """As if every cluster were free."""
    with path.open("r+b") as file:
        file.seek(48)
        table = int.from_bytes(file.read(8), "big")
        file.seek(table)
        file.seek(int.from_bytes(file.read(8), "big"))
        file.write(bytes(1 << PLAIN.cluster_bits))
