"""fio's NBD engine with verification against `blkloom serve`."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.timeout(60)

MiB = 1 << 20

Program = Callable[[str, str], str]
Serve = Callable[..., Any]


@pytest.fixture
def fio(program: Program) -> str:
    path = program("fio", "fio")
    engines = subprocess.run([path, "--enghelp"], capture_output=True, text=True, check=True).stdout
    if "nbd" not in engines.split():
        pytest.skip("fio has no NBD engine (Debian package fio)")
    return path


def verify(fio: str, uri: str, *options: str) -> None:
    command = [fio, "--name=verify", "--ioengine=nbd", f"--uri={uri}", "--verify=crc32c", "--verify_fatal=1"]
    command += ["--randrepeat=1", "--verify_state_save=0", "--output-format=json", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    jobs = json.loads(done.stdout[done.stdout.index("{") :])["jobs"]
    assert jobs
    for job in jobs:
        assert job["error"] == 0
        assert job["write"]["total_ios"] > 0
        assert job["read"]["total_ios"] > 0


@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.parametrize("device", ["ram", "file", "direct", "threads", "segments"])
def test_fio_verifies_what_it_wrote(fio: str, serve: Serve, tmp_path: Path, device: str, jobs: int) -> None:
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        with path.open("wb") as file:
            file.truncate(16 * MiB)
    table = f"0 10001 loop {paths[0]} 512\n10001 20000 loop {paths[1]} 1536\n30001 2767 linear {paths[0]} 20000"
    arguments: dict[str, list[str | Path]] = {
        "ram": ["--ram", "16M"],
        "file": [paths[0]],
        "direct": [paths[0], "--direct-io"],
        "threads": [paths[0], "--io", "threads"],
        "segments": ["--table", table],
    }
    uri = serve(*arguments[device]).uri
    size = 16 * MiB // jobs // 65536 * 65536
    jobs_options = [f"--numjobs={jobs}", f"--offset_increment={size}", f"--size={size}"]
    verify(fio, uri, "--rw=randwrite", "--bsrange=512-64k", "--iodepth=16", "--end_fsync=1", *jobs_options)


def test_fio_verifies_mixed_reads_writes_and_flushes(fio: str, serve: Serve) -> None:
    uri = serve("--ram", "16M").uri
    verify(fio, uri, "--rw=randrw", "--bs=4k", "--iodepth=32", "--size=16M", "--fsync=64")
