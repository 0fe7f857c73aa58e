"""Allocation depth and dirty bitmaps: the same runs as from qemu-nbd for the same images, also while the images
change.
"""

from __future__ import annotations

import errno
import json
import random
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import blkloom
from blkloom import Device
from blkloom.table import parse_table
from blkloom.targets.registry import builtin_targets

from . import qemu
from .attached import attached, table_of
from .shapes import Shape, make

MIB = 1 << 20
KIB = 1 << 10
DEPTH = "qemu:allocation-depth"
BITMAP = "qemu:dirty-bitmap:"
SYSTEM_PYTHON = "/usr/bin/python3"
Runs = list[tuple[int, int, int]]
SEARCH = settings(
    max_examples=max(settings().max_examples // 8, 10),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


@pytest.fixture(scope="module", autouse=True)
def _tools(program: Callable[[str, str], str]) -> None:
    for name in ("qemu-img", "qemu-io", "qemu-nbd"):
        program(name, "qemu-utils")
    program("nbdinfo", "libnbd-bin")


def by_qemu(path: Path, context: str) -> Runs:
    """(offset, length, flags) as qemu-nbd serves it."""
    bitmap = ["-B", context.removeprefix(BITMAP)] if context.startswith(BITMAP) else []
    served = ["[", "qemu-nbd", "-r", "-A", *bitmap, "-f", "qcow2", str(path), "]"]
    return runs_of(qemu.run("nbdinfo", "--json", f"--map={context}", "--", *served))


def by_client(uri: str, context: str) -> Runs:
    return runs_of(qemu.run("nbdinfo", "--json", f"--map={context}", uri))


def runs_of(said: str) -> Runs:
    return [(run["offset"], run["length"], run["type"]) for run in json.loads(said)]


def set_runs(device: Device, context: str) -> list[tuple[int, int]]:
    """(offset, end) of what is not 0."""
    return [(offset, offset + length) for offset, length, flags in device.extents(context=context) if flags]


def make_chain(folder: Path, dice: random.Random, depth: int) -> tuple[Path, int, list[str]]:
    """Images of any cluster size and length above each other, with clusters of every state; the top one has bitmaps,
    and some below have. Its path, its size in bytes, and the contexts to be had.
    """
    below, size = None, 0
    lower: list[str] = []
    for number in range(depth):
        size = dice.choice([64 * KIB, 200 * KIB, 300 * 512, MIB, 2 * MIB + 512])
        if not number and depth > 1 and dice.random() < 0.4:
            below = folder / "base.raw"
            below.write_bytes(dice.randbytes(size - dice.choice([0, 0, 100])))
            continue
        extended = dice.random() < 0.4
        bits = dice.choice([14, 16] if extended else [9, 12, 16, 18])
        path = folder / f"{number}.qcow2"
        words = ["-b", below, "-F", "raw" if below.suffix == ".raw" else "qcow2"] if below else []
        options = f"cluster_size={1 << bits},extended_l2={'on' if extended else 'off'}"
        qemu.qemu_img("create", "-q", "-f", "qcow2", "-o", options, *words, path, str(size))
        names = ["b0", "off"]
        if number < depth - 1:
            names = dice.choice([[], [f"of {number}"], ["b0", f"of {number}"]])
            lower = [BITMAP + name for name in names if name != "b0"] + lower
        for name in names:
            qemu.qemu_img("bitmap", "--add", "-g", str(512 << dice.randrange(12)), path, name)
        qemu.qemu_io(path, *_compressed(dice, size, 1 << bits))
        qemu.qemu_io(path, *(_step(dice, size, 1 << bits) for _ in range(dice.randint(0, 8))))
        if number == depth - 1:
            qemu.qemu_img("bitmap", "--disable", path, "off")
            qemu.qemu_io(path, *(_step(dice, size, 1 << bits) for _ in range(dice.randint(0, 3))))
        below = path
    assert below is not None
    return below, size, [DEPTH, BITMAP + "b0", BITMAP + "off", *lower]


def _compressed(dice: random.Random, size: int, cluster: int) -> list[str]:
    """Of whole clusters that hold nothing yet."""
    clusters = range(size // cluster)
    return [f"write -c -P 3 {at * cluster} {cluster}" for at in dice.sample(clusters, min(2, len(clusters)))]


def _step(dice: random.Random, size: int, cluster: int) -> str:
    start = dice.choice([dice.randrange(size // 512) * 512, dice.randrange(max(size // cluster, 1)) * cluster])
    length = min(dice.choice([512, 2048, 4096, cluster // 2, cluster, 3 * cluster]), size - start)
    return dice.choice(
        [
            f"write -P {dice.randrange(256)} {start} {length}",
            f"write -z {start} {length}",
            f"write -z -u {start} {length}",
            f"discard {start} {length}",
        ]
    )


@SEARCH
@given(st.integers(0, 1 << 30), st.integers(1, 3), st.booleans())
@example(16531, 3, False)  # begins behind the end of the image below, within the last granule of its bitmap
def test_random_chains_are_told_as_qemu_tells_them(seed: int, depth: int, read_only: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        dice = random.Random(seed)
        path, size, names = make_chain(Path(folder), dice, depth)
        theirs = {name: by_qemu(path, name) for name in names}
        with attached(path, size, read_only=read_only) as device:
            assert list(device.contexts) == names
            for name in names:
                assert device.extents(context=name) == theirs[name]
                low = dice.randrange(size)
                length = dice.randrange(1, size - low + 1)
                assert device.extents(low, length, context=name) == cut(theirs[name], low, low + length)
        assert {name: by_qemu(path, name) for name in names} == theirs


def cut(runs: Runs, low: int, high: int) -> Runs:
    return [
        (max(start, low), min(start + length, high) - max(start, low), flags)
        for start, length, flags in runs
        if start < high and start + length > low
    ]


@pytest.mark.parametrize(
    "shape",
    [
        Shape(version=2, cluster_bits=12, backing="raw", backing_fit="longer"),
        Shape(cluster_bits=9, backing="qcow2", backing_fit="shorter"),
        Shape(cluster_bits=16, extended=True, backing="qcow2", backing_fit="shorter", bitmap=True),
        Shape(cluster_bits=16, compressed=True, compression="zstd", snapshots=1, bitmap=True),
        Shape(cluster_bits=12, data_file="raw"),
        Shape(cluster_bits=12, preallocated=True),
        Shape(cluster_bits=21, backing="raw", backing_fit="shorter"),
    ],
    ids=["v2", "small", "extended", "compressed", "data file", "preallocated", "large"],
)
def test_images_of_every_kind_are_told_as_qemu_tells_them(tmp_path: Path, shape: Shape) -> None:
    made = make(tmp_path, shape, size=3 * MIB + 512)
    names = [DEPTH, *([BITMAP + "b0", BITMAP + "off"] if shape.bitmap else [])]
    theirs = {name: by_qemu(made.path, name) for name in names}
    with attached(made.path, made.size) as device:
        assert {name: device.extents(context=name) for name in device.contexts} == theirs


def test_a_segment_shorter_than_its_image_and_behind_another_tells_of_its_part(tmp_path: Path) -> None:
    made = make(tmp_path, Shape(cluster_bits=12, bitmap=True), size=MIB, steps=0)
    qemu.qemu_io(made.path, "write 8k 4k", "write 1000k 8k")
    lines = [f"0 2000 qcow2 {made.path} 1 read_only", f"2000 40 qcow2 {made.path} 1 read_only"]
    with blkloom.open("\n".join(lines), read_only=True) as device:
        assert device.contexts == (DEPTH, BITMAP + "b0", BITMAP + "off")
        first = set_runs(device, DEPTH)
        assert first == [(8 * KIB, 12 * KIB), (2000 * 512 + 8 * KIB, 2000 * 512 + 12 * KIB)]


@pytest.mark.parametrize("granularity", [512, 4 * KIB, 64 * KIB, 2 * MIB])
@pytest.mark.parametrize("extended", [False, True])
def test_a_bitmap_tells_every_write_at_once_and_says_the_same_when_the_image_is_closed(
    tmp_path: Path, granularity: int, extended: bool
) -> None:
    path, size = tmp_path / "disk.qcow2", 4 * MIB + 512
    options = f"cluster_size=64k,extended_l2={'on' if extended else 'off'}"
    qemu.qemu_img("create", "-q", "-f", "qcow2", "-o", options, path, str(size))
    qemu.qemu_img("bitmap", "--add", "-g", str(granularity), path, "b0")
    qemu.qemu_io(path, "write 128k 1k")
    unit = 2 * KIB if extended else 64 * KIB

    def dirty(*ranges: tuple[int, int]) -> set[int]:
        granules: set[int] = {128 * KIB // granularity, (129 * KIB - 1) // granularity}
        for low, high in ranges:
            low, high = low // unit * unit, min(-(-high // unit) * unit, size)
            granules.update(range(low // granularity, (high - 1) // granularity + 1))
        return granules

    def told(runs: list[tuple[int, int]]) -> set[int]:
        assert all(low % granularity == 0 and (high % granularity == 0 or high == size) for low, high in runs)
        return {granule for low, high in runs for granule in range(low // granularity, -(-high // granularity))}

    with attached(path, size) as device:
        context = BITMAP + "b0"
        assert told(set_runs(device, context)) == dirty()
        changes: list[tuple[int, int]] = []
        for act, low, length in (
            (lambda at, n: device.pwrite(b"x" * n, at), 5000, 3),
            (lambda at, n: device.pwrite(b"x" * n, at), 5000, 3),
            (lambda at, n: device.pwrite(b"x" * n, at), 9000, 100_000),
            (lambda at, n: device.write_zeroes(at, n), 2 * MIB, 64 * KIB),
            (lambda at, n: device.discard(at, n), 3 * MIB, 64 * KIB),
            (lambda at, n: device.pwrite(b"y" * n, at), size - 512, 512),
        ):
            act(low, length)
            changes.append((low, low + length))
            assert told(set_runs(device, context)) == dirty(*changes), changes[-1]
        before = device.extents(context=context)
        device.suspend()
        assert by_qemu(path, context) == before
        device.resume()
        assert device.extents(context=context) == before
        device.pwrite(b"z" * 512, MIB)
        assert told(set_runs(device, context)) == dirty(*changes, (MIB, MIB + 512))
    assert told([(at, at + n) for at, n, flags in by_qemu(path, context) if flags]) == dirty(*changes, (MIB, MIB + 512))


def test_depth_follows_what_is_written_zeroed_and_discarded(tmp_path: Path) -> None:
    made = make(tmp_path, Shape(cluster_bits=16, backing="raw"), size=MIB, steps=0)
    with attached(made.path, made.size, "preallocate=0") as device:
        assert device.extents(context=DEPTH) == [(0, MIB, 2)]
        device.pwrite(b"x", 70_000)
        device.write_zeroes(256 * KIB, 64 * KIB)
        wanted = [(64 * KIB, 128 * KIB), (256 * KIB, 320 * KIB)]
        assert [(low, low + n) for low, n, depth in device.extents(context=DEPTH) if depth == 1] == wanted
        device.suspend()
        theirs = by_qemu(made.path, DEPTH)
        device.resume()
        assert device.extents(context=DEPTH) == theirs
        device.suspend()
        qemu.qemu_img("rebase", "-b", "", made.path)
        device.resume()
        device.suspend()
        theirs = by_qemu(made.path, DEPTH)
        device.resume()
        assert device.extents(context=DEPTH) == theirs


def test_bitmaps_that_come_and_go_while_the_device_is_suspended(tmp_path: Path) -> None:
    made = make(tmp_path, Shape(cluster_bits=12, bitmap=True), size=MIB, steps=0)
    with attached(made.path, made.size) as device:
        assert device.contexts == (DEPTH, BITMAP + "b0", BITMAP + "off")
        device.suspend()
        qemu.qemu_img("bitmap", "--remove", made.path, "b0")
        qemu.qemu_img("bitmap", "--add", made.path, "new:er")
        device.resume()
        assert device.contexts == (DEPTH, BITMAP + "off", BITMAP + "new:er")
        with pytest.raises(OSError, match=rf"\[Errno {errno.EINVAL}\]"):
            device.extents(context=BITMAP + "b0")
        assert device.extents(context=BITMAP + "new:er") == [(0, MIB, 0)]
        device.suspend()
        qemu.qemu_img("resize", made.path, "3M")
        device.resume()
        assert device.extents(context=BITMAP + "off") == [(0, 3 * MIB, 0)]
        device.load(parse_table("0 8 zero", targets=builtin_targets()))
        device.resume()
        assert device.contexts == ()
        with pytest.raises(OSError, match=rf"\[Errno {errno.EINVAL}\]"):
            device.extents(context=DEPTH)


def test_bitmaps_that_cannot_be_believed_are_not_told(tmp_path: Path) -> None:
    made = make(tmp_path, Shape(cluster_bits=12, bitmap=True), size=MIB, steps=0)
    crashed = tmp_path / "crashed.qcow2"
    with attached(made.path, made.size) as device:
        device.pwrite(b"x", 0)
        device.flush()
        assert device.contexts == (DEPTH, BITMAP + "b0", BITMAP + "off")
        crashed.write_bytes(made.path.read_bytes())
    for read_only in (True, False):
        with attached(crashed, made.size, read_only=read_only) as device:
            assert device.contexts == (DEPTH, BITMAP + "off")


def test_a_bitmap_that_cannot_be_believed_hides_those_of_its_name_below(tmp_path: Path) -> None:
    made = make(tmp_path, Shape(cluster_bits=12, bitmap=True), size=MIB, steps=0)
    qemu.qemu_img("bitmap", "--add", made.path, "below")
    middle, top, crashed = (tmp_path / f"{name}.qcow2" for name in ("middle", "top", "crashed"))
    qemu.qemu_img("create", "-q", "-f", "qcow2", "-b", made.path, "-F", "qcow2", middle, "2M")
    qemu.qemu_img("bitmap", "--add", middle, "b0")
    with attached(middle, 2 * MIB) as device:
        assert device.contexts == (DEPTH, BITMAP + "b0", BITMAP + "off", BITMAP + "below")
        device.pwrite(b"x", 0)
        device.flush()
        crashed.write_bytes(middle.read_bytes())
    qemu.qemu_img("create", "-q", "-f", "qcow2", "-b", crashed, "-F", "qcow2", top)
    with attached(top, 2 * MIB) as device:
        assert device.contexts == (DEPTH, BITMAP + "off", BITMAP + "below")


def test_a_snapshot_has_a_depth_and_no_bitmaps(tmp_path: Path) -> None:
    made = make(tmp_path, Shape(cluster_bits=12, bitmap=True, snapshots=1), size=MIB)
    with attached(made.path, made.size, "snapshot=s1", read_only=True) as device:
        assert device.contexts == (DEPTH,)
        theirs = qemu.run(
            *("nbdinfo", "--json", f"--map={DEPTH}", "--", "["),
            *("qemu-nbd", "-r", "-A", "-f", "qcow2", "-l", "s1", str(made.path), "]"),
        )
        assert device.extents(context=DEPTH) == runs_of(theirs)


def test_a_bitmap_directory_that_is_nonsense_spoils_only_the_bitmaps(tmp_path: Path) -> None:
    made = make(tmp_path, Shape(cluster_bits=12, bitmap=True), size=MIB)
    raw = bytearray(made.path.read_bytes())
    extension = raw.index(bytes.fromhex("23852875"), 72) + 8
    directory = int.from_bytes(raw[extension + 16 : extension + 24], "big")
    raw[directory + 17] = 77  # the granularity
    made.path.write_bytes(raw)
    with attached(made.path, made.size, read_only=True) as device:
        assert device.contexts == (DEPTH,)
        assert sum(length for _, length, _ in device.extents(context=DEPTH)) == MIB


def test_a_table_of_bits_that_is_nonsense_fails_its_bitmap_only(tmp_path: Path) -> None:
    made = make(tmp_path, Shape(cluster_bits=9, bitmap=True), size=MIB)
    raw = bytearray(made.path.read_bytes())
    extension = raw.index(bytes.fromhex("23852875"), 72) + 8
    directory = int.from_bytes(raw[extension + 16 : extension + 24], "big")
    table = int.from_bytes(raw[directory : directory + 8], "big")
    raw[table : table + 8] = (1 << 55 | 512).to_bytes(8, "big")  # past the end of the file
    made.path.write_bytes(raw)
    with attached(made.path, made.size, read_only=True) as device:
        with pytest.raises(OSError, match=rf"\[Errno {errno.EIO}\]"):
            device.extents(context=BITMAP + "b0")
        assert device.extents(context=BITMAP + "off")


def test_large_disks_are_told_in_pieces_that_do_not_keep_others_waiting(tmp_path: Path) -> None:
    """Among them bits of all ones without a cluster, and 512 bytes a bit."""
    path, size = tmp_path / "large.qcow2", 64 << 30
    qemu.qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", path, str(size))
    qemu.qemu_img("bitmap", "--add", "-g", "8k", path, "fine")
    qemu.qemu_img("bitmap", "--add", "-g", "64k", path, "coarse")
    places = [0, 1 << 30, (40 << 30) + 4096, size - 4096]
    qemu.qemu_io(path, *(f"write {at} 4k" for at in places))
    with attached(path, size, "preallocate=0") as device:
        assert set_runs(device, DEPTH) == [(at, at + 4096) for at in places]
        for name, step in (("fine", 8192), ("coarse", 65536)):
            wanted = [(at // step * step, at // step * step + step) for at in places]
            assert set_runs(device, BITMAP + name) == wanted


# over NBD


def test_nbdinfo_and_qemu_img_map_what_qemu_nbd_would_say(serve: Callable[..., Any], tmp_path: Path) -> None:
    path, size, names = make_chain(tmp_path, random.Random(7), 3)
    assert len(names) > 3, "one of an image below among them"
    theirs = {name: by_qemu(path, name) for name in names}
    server = serve(path)
    (told,) = json.loads(qemu.run("nbdinfo", "--json", "--list", server.uri))["exports"]
    assert told["contexts"] == ["base:allocation", *names]
    assert {name: by_client(server.uri, name) for name in names} == theirs
    socket = server.uri.partition("socket=")[2]
    options = f"driver=nbd,server.type=unix,server.path={socket},x-dirty-bitmap={BITMAP}b0"
    mapped = json.loads(qemu.qemu_img("map", "--output=json", "--image-opts", options))
    dirty = [(run["start"], run["length"]) for run in mapped if not run["data"]]
    assert dirty == [(start, length) for start, length, flags in theirs[BITMAP + "b0"] if flags]
    assert sum(run["length"] for run in mapped) == size


SEVERAL = """
import json, nbd, sys
h = nbd.NBD()
for name in sys.argv[2:]:
    h.add_meta_context(name)
h.connect_uri(sys.argv[1])
assert all(h.can_meta_context(name) for name in sys.argv[2:])
size, whole, one = h.get_size(), {}, {}
def take(into):
    def extent(name, offset, entries, error):
        assert name not in into, "one chunk a context"
        into[name] = entries
    return extent
h.block_status(size, 0, take(whole))
h.block_status(size - 512, 512, take(one), nbd.CMD_FLAG_REQ_ONE)
print(json.dumps([whole, one]))
"""


def test_several_contexts_are_told_in_one_answer(serve: Callable[..., Any], tmp_path: Path) -> None:
    if subprocess.run([SYSTEM_PYTHON, "-c", "import nbd"], capture_output=True, check=False).returncode:
        pytest.skip("Python's nbd module is missing (Debian package python3-libnbd)")
    path, size, _ = make_chain(tmp_path, random.Random(11), 3)
    names = [BITMAP + "off", "base:allocation", DEPTH, BITMAP + "b0"]
    theirs = {name: by_qemu(path, name) for name in names}
    server = serve(path)
    whole, one = json.loads(qemu.run(SYSTEM_PYTHON, "-c", SEVERAL, server.uri, *names))
    assert whole.keys() == one.keys() == set(names)
    for name in (DEPTH, BITMAP + "off", BITMAP + "b0"):
        assert whole[name] == [number for _, length, flags in theirs[name] for number in (length, flags)]
        assert one[name] == [
            number for _, length, flags in cut(theirs[name], 512, size)[:1] for number in (length, flags)
        ]
    assert len(one["base:allocation"]) == 2


STAYING = """
import json, nbd, sys
h = nbd.NBD()
h.add_meta_context("qemu:dirty-bitmap:b0")
h.connect_uri(sys.argv[1])
def ask():
    found = []
    try:
        h.block_status(h.get_size(), 0, lambda name, offset, entries, error: found.extend(entries))
    except nbd.Error as error:
        return error.errno
    return found
print(json.dumps(ask()), flush=True)
for line in sys.stdin:
    print(json.dumps(ask()), flush=True)
"""


def test_a_client_whose_bitmap_goes_gets_errors_until_it_comes_back(
    blkloom: str, tmp_path: Path, program: Callable[[str, str], str]
) -> None:
    if subprocess.run([SYSTEM_PYTHON, "-c", "import nbd"], capture_output=True, check=False).returncode:
        pytest.skip("Python's nbd module is missing (Debian package python3-libnbd)")
    made = make(tmp_path, Shape(cluster_bits=12, bitmap=True), size=MIB, steps=0)
    run_dir = tmp_path / "run"

    def do(*words: str | Path) -> None:
        qemu.run(blkloom, f"--run-dir={run_dir}", *words)

    do("create", "disk", "--table", table_of(made.path, made.size))
    try:
        uri = f"nbd+unix:///disk?socket={run_dir}/dev/disk"
        client = subprocess.Popen(
            [SYSTEM_PYTHON, "-c", STAYING, uri], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        with client:
            assert client.stdin is not None
            assert client.stdout is not None

            def said() -> Any:
                assert client.stdin is not None
                assert client.stdout is not None
                client.stdin.write("\n")
                client.stdin.flush()
                return json.loads(client.stdout.readline())

            assert json.loads(client.stdout.readline()) == [MIB, 0]
            do("suspend", "disk")
            qemu.qemu_img("bitmap", "--remove", made.path, "b0")
            do("resume", "disk")
            assert said() == "EINVAL"
            assert said() == "EINVAL"
            do("suspend", "disk")
            qemu.qemu_img("bitmap", "--add", "-g", "64k", made.path, "b0")
            qemu.qemu_io(made.path, "write 128k 4k")
            do("resume", "disk")
            assert said() == [128 * KIB, 0, 64 * KIB, 1, MIB - 192 * KIB, 0]
            do("upgrade")
            assert said() == [128 * KIB, 0, 64 * KIB, 1, MIB - 192 * KIB, 0]
            do("load", "disk", "--table", "0 2048 zero")
            do("resume", "disk")
            assert said() == "EINVAL"
            client.stdin.close()
        assert client.returncode == 0
    finally:
        do("stop")
