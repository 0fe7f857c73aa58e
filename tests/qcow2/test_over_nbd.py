"""Images served over NBD: fio verifies, qemu-io and qemu-img work, and after kill -9 no flushed data is lost."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from conformance.nbd_client import FLUSH, FUA, WRITE, NbdClient

from . import qemu
from .attached import first_difference
from .shapes import Shape, make

pytestmark = pytest.mark.usefixtures("qemu_tools")

Program = Callable[[str, str], str]
Serve = Callable[..., Any]
MIB = 1 << 20
SHAPES = {
    "plain": Shape(),
    "v2": Shape(version=2, cluster_bits=12),
    "extended": Shape(cluster_bits=16, extended=True),
    "backed": Shape(cluster_bits=16, backing="raw", backing_fit="shorter"),
    "extended and backed": Shape(cluster_bits=14, extended=True, backing="qcow2"),
    "snapshot": Shape(cluster_bits=12, snapshots=2),
    "compressed": Shape(cluster_bits=16, compressed=True),
    "data file": Shape(cluster_bits=12, data_file="raw"),
    "lazy": Shape(cluster_bits=12, lazy=True),
    "one bit": Shape(cluster_bits=9, refcount_bits=1),
}


@pytest.fixture
def fio(program: Program) -> str:
    path = program("fio", "fio")
    if "nbd" not in subprocess.run([path, "--enghelp"], capture_output=True, text=True, check=True).stdout.split():
        pytest.skip("fio has no NBD engine (Debian package fio)")
    return path


def verify(fio: str, uri: str, *options: str) -> None:
    command = [fio, "--name=verify", "--ioengine=nbd", f"--uri={uri}", "--verify=crc32c", "--verify_fatal=1"]
    command += ["--randrepeat=1", "--verify_state_save=0", "--output-format=json", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    for job in json.loads(done.stdout[done.stdout.index("{") :])["jobs"]:
        assert job["error"] == 0
        assert job["read"]["total_ios"] > 0


@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.parametrize("kind", SHAPES)
def test_fio_verifies_what_it_wrote(fio: str, serve: Serve, tmp_path: Path, kind: str, jobs: int) -> None:
    made = make(tmp_path, SHAPES[kind], size=8 * MIB)
    server = serve(made.path)
    share = made.size // jobs
    parts = [f"--numjobs={jobs}", f"--offset_increment={share}", f"--size={share}"]
    verify(fio, server.uri, "--rw=randwrite", "--bsrange=512-64k", "--iodepth=16", "--fsync=32", *parts)
    server.stop()
    checked = qemu.check(made.path)
    assert checked.whole, checked.said


@pytest.mark.parametrize("kind", SHAPES)
def test_qemu_copies_an_image_through_us_and_back(serve: Serve, tmp_path: Path, kind: str) -> None:
    made = make(tmp_path, SHAPES[kind], size=3 * MIB, seed=5)
    server = serve(made.path)
    out = tmp_path / "out.raw"
    qemu.qemu_img("convert", "-f", "raw", "-O", "raw", server.uri, out)
    assert not first_difference(out.read_bytes(), made.content)
    source = make(tmp_path, Shape(), size=3 * MIB, seed=9, name="source")
    qemu.qemu_img("convert", "-n", "-f", "qcow2", "-O", "raw", source.path, server.uri)
    server.stop()
    assert qemu.check(made.path).whole
    assert not first_difference(qemu.content(made.path), source.content)


@pytest.mark.parametrize("how", ["a flush", "FUA"])
@pytest.mark.parametrize("kind", ["plain", "lazy", "backed", "extended", "data file"])
def test_what_is_durable_is_there_after_the_server_is_killed(serve: Serve, tmp_path: Path, kind: str, how: str) -> None:
    made = make(tmp_path, SHAPES[kind], size=4 * MIB, steps=0)
    server = serve(made.path)
    client = NbdClient.unix(parse_qs(urlsplit(server.uri).query)["socket"][0])
    for number in range(20):
        payload = bytes([number + 1]) * (12 << 10)
        assert not client.ask(WRITE, number * 37 * 4096, flags=FUA if how == "FUA" else 0, payload=payload).error
    if how == "a flush":
        assert not client.ask(FLUSH).error
    server.process.kill()
    server.process.wait()
    client.close()
    found = qemu.check(made.path, repair="all" if made.shape.lazy else "")
    assert not found.errors, found.said
    assert made.shape.lazy or not found.corruptions, found.said
    content = qemu.content(made.path)
    for number in range(20):
        assert content[number * 37 * 4096 :][: 12 << 10] == bytes([number + 1]) * (12 << 10)


def test_qemu_refuses_an_image_that_is_live(serve: Serve, tmp_path: Path) -> None:
    made = make(tmp_path, Shape(), size=MIB)
    server = serve(made.path)
    with pytest.raises(qemu.QemuError, match="lock"):
        qemu.qemu_img("snapshot", "-c", "now", made.path)
    server.stop()
    qemu.qemu_img("snapshot", "-c", "now", made.path)


def test_allocation_over_nbd_is_what_qemu_sees_itself(serve: Serve, program: Program, tmp_path: Path) -> None:
    program("nbdinfo", "libnbd-bin")
    made = make(tmp_path, Shape(cluster_bits=12), size=MIB, steps=0)
    qemu.qemu_io(made.path, "write -P 1 64k 64k", "write -z -u 256k 32k", "write -P 2 1020k 4k")
    theirs = json.loads(qemu.qemu_img("map", "--output=json", made.path))
    server = serve(made.path)
    ours = json.loads(qemu.run("nbdinfo", "--map", "--json", server.uri))
    data = [(run["offset"], run["length"]) for run in ours if not run["type"]]
    assert data == [(run["start"], run["length"]) for run in theirs if run["data"]]


def test_clusters_given_ahead_of_writes_are_told_as_the_holes_they_are(
    serve: Serve, program: Program, tmp_path: Path
) -> None:
    program("nbdinfo", "libnbd-bin")
    made = make(tmp_path, Shape(), size=16 * MIB, steps=0)
    server = serve(made.path)
    qemu.run("qemu-io", "-f", "raw", server.uri, "-c", "write -P 1 5M 4k", "-c", "write -P 2 6M 4k")
    ours = json.loads(qemu.run("nbdinfo", "--map", "--json", server.uri))
    assert [(run["offset"], run["length"]) for run in ours if not run["type"]] == [(5 * MIB, 4096), (6 * MIB, 4096)]
    server.stop()
