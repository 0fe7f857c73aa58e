"""Signals that a copy gets: the end is bounded, whatever does not answer."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from blkloom.copying.journal import Journal

from .conftest import Copy
from .shapes import K, M, make

pytestmark = pytest.mark.timeout(120)

SHAPE = (4 * M, ((0, 4 * M, True),))
Serve = Callable[..., Any]


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A disk of data."""
    return make(tmp_path / "disk.img", SHAPE)


@contextmanager
def begun(blkloom: str, tmp_path: Path, *words: str | Path, ignored: bool = False) -> Iterator[subprocess.Popen[bytes]]:
    """A slow copy that has noted twice that it is under way. ignored: SIGHUP, as by nohup."""
    options = ["--rate", "64K", "--checkpoint", "4K", "--state", tmp_path / "state"]
    command = [blkloom, "--run-dir", tmp_path / "run", "copy", *options, *words]
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        with (tmp_path / "said").open("wb") as said:
            process = subprocess.Popen([*map(str, command)], stderr=said)
    finally:
        signal.signal(signal.SIGHUP, former)
    try:
        while (journal := Journal.read(str(tmp_path / "state"))) is None or journal.copied <= 16 * K:
            assert process.poll() is None, (tmp_path / "said").read_text()
        yield process
    finally:
        process.kill()
        process.wait()


def test_what_nohup_ignores_stays_ignored(blkloom: str, disk: Path, tmp_path: Path) -> None:
    with begun(blkloom, tmp_path, disk, tmp_path / "copy.img", ignored=True) as process:
        process.send_signal(signal.SIGHUP)
        noted: set[int] = set()
        while len(noted) < 4:  # it goes on
            assert process.poll() is None
            journal = Journal.read(str(tmp_path / "state"))
            assert journal is not None
            noted.add(journal.copied)
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 128 + signal.SIGTERM


def test_a_hangup_ends_a_copy_that_can_be_continued(blkloom: str, copy: Copy, disk: Path, tmp_path: Path) -> None:
    with begun(blkloom, tmp_path, disk, tmp_path / "copy.img") as process:
        process.send_signal(signal.SIGHUP)
        assert process.wait() == 128 + signal.SIGHUP
    copy("--resume", "--state", tmp_path / "state", disk, tmp_path / "copy.img")
    assert (tmp_path / "copy.img").read_bytes() == disk.read_bytes()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("again", [False, True])
def test_a_target_that_does_not_answer_does_not_keep_a_copy(
    blkloom: str, copy: Copy, serve: Serve, disk: Path, tmp_path: Path, number: signal.Signals, again: bool
) -> None:
    """Its flush does not return. The copy ends after some seconds, and at a second ^C at once."""
    target = tmp_path / "target.img"
    target.write_bytes(bytes(4 * M))
    server = serve(target, "--socket", tmp_path / "s.sock")
    with begun(blkloom, tmp_path, disk, server.uri) as process:
        ended(server, process, number, again=again)
    said = (tmp_path / "said").read_text()
    assert ("interrupted again" if again else "does not end") in said
    assert "with --resume" in said
    copy("--resume", "--state", tmp_path / "state", disk, server.uri)
    assert target.read_bytes() == disk.read_bytes()


def test_a_source_that_does_not_answer_does_not_keep_a_copy(
    blkloom: str, copy: Copy, serve: Serve, disk: Path, tmp_path: Path
) -> None:
    server, target = serve(disk, "--socket", tmp_path / "s.sock"), tmp_path / "copy.img"
    with begun(blkloom, tmp_path, server.uri, target) as process:
        ended(server, process, signal.SIGINT, again=False)
    assert "with --resume" in (tmp_path / "said").read_text()
    copy("--resume", "--state", tmp_path / "state", server.uri, target)
    assert target.read_bytes() == disk.read_bytes()


def ended(server: Any, process: subprocess.Popen[bytes], number: signal.Signals, *, again: bool) -> None:
    """Stops a server, and ends a copy meanwhile."""
    os.kill(server.process.pid, signal.SIGSTOP)
    try:
        process.send_signal(number)
        while again and process.poll() is None:
            process.send_signal(signal.SIGINT)
        assert process.wait() == 128 + (signal.SIGINT if again else number)
    finally:
        os.kill(server.process.pid, signal.SIGCONT)
