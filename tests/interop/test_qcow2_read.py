"""Images that QEMU's tools made, read byte for byte; kinds of images that random ones rarely have."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import blkloom
from blkloom.errors import BackingError
from qcow2 import qemu
from qcow2.attached import first_difference, read_all

pytestmark = pytest.mark.usefixtures("qemu_tools")

MIB = 1 << 20


def source(folder: Path, size: int, seed: int = 1) -> Path:
    """A raw file with runs of zeros, of repetition and of noise."""
    dice, path = random.Random(seed), folder / f"source{seed}.raw"
    with path.open("wb") as file:
        while file.tell() < size:
            length = dice.choice([512, 4096, 30_000, 65536, 200_000])
            length = min(length, size - file.tell())
            word = b"%d " % dice.getrandbits(20)
            file.write(dice.choice([bytes(length), (word * length)[:length], dice.randbytes(length)]))
    return path


def same(path: Path, content: bytes, *, piece: int = MIB, options: str = "") -> None:
    with blkloom.open(f"0 {len(content) // 512} qcow2 {path} {options}", read_only=True) as device:
        assert not first_difference(read_all(device, piece), content)


@pytest.mark.parametrize("compression", ["zlib", "zstd"])
@pytest.mark.parametrize("bits", [9, 12, 16, 21])
@pytest.mark.parametrize("extended", [False, True])
def test_converted_images_of_every_compression_and_cluster_size(
    tmp_path: Path, compression: str, bits: int, extended: bool
) -> None:
    if extended and bits < 14:
        bits = 14
    raw = source(tmp_path, 6 * MIB + 512)
    options = f"cluster_size={1 << bits},compression_type={compression},extended_l2={'on' if extended else 'off'}"
    for name, words in (("plain", []), ("packed", ["-c"])):
        path = tmp_path / f"{name}.qcow2"
        qemu.qemu_img("convert", "-f", "raw", "-O", "qcow2", *words, "-o", options, raw, path)
        same(path, raw.read_bytes())
        same(path, raw.read_bytes(), piece=48 * 1024 + 512, options=f"1 cache={3 << bits}")


@pytest.mark.parametrize("preallocation", ["off", "metadata", "falloc", "full"])
def test_fresh_images_are_zeros(tmp_path: Path, preallocation: str) -> None:
    path = tmp_path / "disk.qcow2"
    qemu.qemu_img("create", "-q", "-f", "qcow2", "-o", f"preallocation={preallocation}", path, str(5 * MIB + 512))
    same(path, bytes(5 * MIB + 512))


@pytest.mark.parametrize("raw_data", ["on", "off"])
def test_images_with_an_external_data_file(tmp_path: Path, raw_data: str, caplog: pytest.LogCaptureFixture) -> None:
    path, data = tmp_path / "disk.qcow2", tmp_path / "disk.data"
    options = f"data_file={data},data_file_raw={raw_data}"
    qemu.qemu_img("create", "-q", "-f", "qcow2", "-o", options, path, "4M")
    qemu.qemu_io(path, "write -P 1 0 100k", "write -P 2 1M 512", "write -z 64k 64k", "discard 1M 64k")
    same(path, qemu.content(path))
    assert f"its data is in the external file {data}" in caplog.text


def test_a_warning_about_an_image_is_said_once_though_it_is_attached_twice(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "disk.qcow2"
    qemu.qemu_img("create", "-q", "-f", "qcow2", "-o", f"data_file={tmp_path}/disk.data", path, "1M")
    with blkloom.open(f"0 2048 qcow2 {path}") as device:
        device.suspend()
        device.resume()
    assert caplog.text.count("its data is in the external file") == 1


def test_a_data_file_elsewhere_is_not_followed_unless_allowed(tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    path = inside / "disk.qcow2"
    qemu.qemu_img("create", "-q", "-f", "qcow2", "-o", f"data_file={outside / 'data'}", path, "1M")
    qemu.qemu_io(path, "write -P 7 0 1M")
    with pytest.raises(BackingError, match=rf"its data file .* outside .* allow_backing={outside}"):
        blkloom.open(f"0 2048 qcow2 {path}", read_only=True)
    same(path, b"\7" * MIB, options=f"1 allow_backing={outside}")


@pytest.mark.parametrize("sizes", [("1M", "3M", "2M"), ("3M", "1M", "4M"), ("100k", "2M", "2M")])
@pytest.mark.parametrize("clusters", [(16, 12, 9), (9, 16, 21), (14, 14, 14)])
@pytest.mark.parametrize("base", ["raw", "qcow2"])
def test_chains_of_different_lengths_and_cluster_sizes(
    tmp_path: Path, sizes: tuple[str, ...], clusters: tuple[int, ...], base: str
) -> None:
    dice, below, form = random.Random(9), "", base
    for number, (size, bits) in enumerate(zip(sizes, clusters, strict=True)):
        path = tmp_path / f"layer{number}"
        kind = base if number == 0 else "qcow2"
        words = ["-o", f"cluster_size={1 << bits}"] if kind == "qcow2" else []
        words += ["-b", below, "-F", form] if below else []
        qemu.qemu_img("create", "-q", "-f", kind, *words, path, size)
        length = int(size[:-1]) * (MIB if size[-1] == "M" else 1024)
        if kind == "raw":
            path.write_bytes(dice.randbytes(length))
        else:
            writes = [dice.randrange(length // 512 - 40) * 512 for _ in range(5)]
            qemu.qemu_io(
                path, *(f"write -P {dice.randrange(1, 255)} {at} {dice.randint(1, 40) * 512}" for at in writes)
            )
            qemu.qemu_io(path, f"write -z {length // 3 // 512 * 512} 20k")
        below, form = path.name, kind
    same(path, qemu.content(path))
    same(path, qemu.content(path), piece=3584)


def test_a_backing_file_whose_length_is_no_multiple_of_a_sector(tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes(b"x" * 70_001)
    path = tmp_path / "disk.qcow2"
    qemu.qemu_img("create", "-q", "-f", "qcow2", "-b", "base", "-F", "raw", path, "256k")
    same(path, qemu.content(path))


def test_snapshots_are_read_by_id_and_by_name_whatever_happened_since(tmp_path: Path) -> None:
    path, contents = tmp_path / "disk.qcow2", []
    qemu.qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=4096", path, "2M")
    for number in range(4):
        qemu.qemu_io(path, f"write -P {number + 1} {number * 100}k 300k", f"write -z {number * 256}k 8k")
        contents.append(qemu.content(path))
        qemu.qemu_img("snapshot", "-c", f"name{number}", path)
    qemu.qemu_img("snapshot", "-d", "name1", path)
    qemu.qemu_img("resize", "-q", path, "3M")
    qemu.qemu_io(path, "write -P 99 0 3M")
    for number in (0, 2, 3):
        same(path, contents[number], options=f"1 snapshot=name{number}")
        same(path, contents[number], options=f"1 snapshot={number + 1}")
    same(path, b"\x63" * 3 * MIB)


def test_encrypted_images_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qemu.create_encrypted(path, MIB)
    with pytest.raises(BackingError, match=r"encrypted \(LUKS\)"):
        blkloom.open(path, read_only=True)


def test_an_image_marked_dirty_by_a_crash_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qemu.qemu_img("create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on", path, "1M")
    qemu.run("qemu-io", "-f", "qcow2", path, "-c", "write -P 5 0 64k", "-c", "flush", "-c", "sigraise 9", accept=(-9,))
    with blkloom.open(path, read_only=True) as device:
        assert device.pread(65536, 0) == b"\5" * 65536
        assert "wants_check=1" in device.status()[0][3]


def test_an_image_on_a_block_device_of_another_size_reads_the_same(tmp_path: Path) -> None:
    """As a file that is longer than the image: what is behind it does not matter."""
    path = tmp_path / "disk.qcow2"
    qemu.qemu_img("create", "-q", "-f", "qcow2", path, "1M")
    qemu.qemu_io(path, "write -P 5 0 64k")
    with path.open("ab") as file:
        file.write(b"\xff" * 100_000)
    same(path, b"\5" * 65536 + bytes(MIB - 65536))
