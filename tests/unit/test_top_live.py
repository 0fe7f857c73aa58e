"""`blkloom top` and `blkloom stats` as commands, with a real supervisor and devices."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import tempfile
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from fcntl import ioctl
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from blkloom.control.client import Client

PATIENCE = 30.0
ALTERNATE, NORMAL = b"\x1b[?1049h", b"\x1b[?1049l"
HIDDEN, SHOWN = b"\x1b[?25l", b"\x1b[?25h"


@contextmanager
def supervised() -> Iterator[Client]:
    """A supervisor of the test's own, started as a first command starts it."""
    # Sockets' paths must be short, shorter than pytest's directories.
    with tempfile.TemporaryDirectory(prefix="top-") as directory:
        run_dir = Path(directory) / "run"
        start(run_dir)
        try:
            with Client(run_dir, start=False) as client:
                yield client
        finally:
            with Client(run_dir, start=False) as last:
                last.stop()


def start(run_dir: Path) -> None:
    Client(run_dir).close()


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with supervised() as client:
        client.create("disk", table="0 2048 ram")
        client.create("upper", table="0 1024 linear blkloom:disk 0")
        client.suspend("upper")
        yield client


def command(client: Client, *words: str) -> list[str]:
    return [sys.executable, "-m", "blkloom.cli.main", "--run-dir", str(client.run_dir.path), *words]


def told(client: Client, *words: str, status: int = 0) -> str:
    """What a command prints on standard output, or on standard error where it fails."""
    done = subprocess.run(
        command(client, *words), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == status, done.stderr
    assert (done.stderr == "") == (status == 0)
    return done.stderr if status else done.stdout


class Screen:
    """A terminal that a command has."""

    def __init__(self, typist: int, terminal: int, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self.output = b""
        self._typist = typist
        self._terminal = terminal
        self.before = termios.tcgetattr(terminal)

    @property
    def settings(self) -> list[object]:
        return termios.tcgetattr(self._terminal)

    def press(self, keys: bytes) -> None:
        os.write(self._typist, keys)

    def resize(self, columns: int, lines: int) -> None:
        ioctl(self._terminal, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        self.process.send_signal(signal.SIGWINCH)

    def wait_for(self, pattern: bytes) -> bytes:
        """Output up to what is waited for; it is taken."""
        while (match := re.search(pattern, self.output, re.DOTALL)) is None:
            ready, _, _ = select.select([self._typist], [], [], PATIENCE)
            assert ready, f"{pattern!r} did not come; the last output was {self.output[-2000:]!r}"
            self.output += os.read(self._typist, 65536)
        taken, self.output = self.output[: match.end()], self.output[match.end() :]
        return taken


@contextmanager
def watching(client: Client, *words: str) -> Iterator[Screen]:
    typist, terminal = pty.openpty()
    ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 150, 0, 0))
    before = termios.tcgetattr(terminal)
    environment = {**os.environ, "TERM": "xterm-256color", "LC_ALL": "C.UTF-8"}
    environment.pop("COLUMNS", None)
    environment.pop("LINES", None)
    process = subprocess.Popen(
        command(client, "top", *words),
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        env=environment,
        process_group=0,  # a job of its own, which ^Z stops
    )
    screen = Screen(typist, terminal, process)
    screen.before = before
    try:
        screen.wait_for(re.escape(ALTERNATE))
        yield screen
    finally:
        process.kill()
        process.wait(PATIENCE)
        os.close(terminal)
        os.close(typist)


def left(screen: Screen, status: int) -> None:
    """The command has ended, and the terminal is as it was."""
    last = screen.wait_for(re.escape(NORMAL))
    assert screen.process.wait(PATIENCE) == status
    assert screen.settings == screen.before
    assert last.rindex(SHOWN) > last.rfind(HIDDEN)


def test_it_shows_devices_until_q_is_pressed(client: Client) -> None:
    with watching(client) as screen:
        picture = screen.wait_for(rb"q.{0,20} quit")
        for words in (b"disk", b"upper", b"SUSPENDED", b"2 devices", b"linear", str(client.run_dir.path).encode()):
            assert words in picture
        assert screen.settings != screen.before
        screen.press(b"q")
        left(screen, 0)


def test_keys_change_the_order_at_once(client: Client) -> None:
    with watching(client, "--interval", "3600") as screen:
        screen.wait_for("IOPS ▼".encode())
        screen.press(b"b")
        screen.wait_for("bandwidth ▼".encode())
        screen.press(b"n")
        screen.wait_for("DEVICE ▲".encode())
        screen.press(b"n")
        screen.wait_for("DEVICE ▼".encode())
        screen.press(b"\x1b")
        left(screen, 0)


def test_another_size_of_the_terminal_is_taken_up_at_once(client: Client) -> None:
    with watching(client, "--interval", "3600") as screen:
        screen.wait_for(b"TARGETS")
        screen.wait_for(b"quit")
        screen.resize(80, 24)
        assert b"TARGETS" not in screen.wait_for(b"DEVICE.*quit")


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 0), (signal.SIGTERM, 128 + 15), (signal.SIGHUP, 128 + 1)]
)
def test_a_signal_ends_it_and_the_terminal_is_as_before(client: Client, number: int, status: int) -> None:
    with watching(client) as screen:
        screen.wait_for(b"quit")
        screen.process.send_signal(number)
        left(screen, status)


def test_it_gives_the_terminal_back_while_it_is_stopped(client: Client) -> None:
    with watching(client) as screen:
        screen.wait_for(b"quit")
        screen.process.send_signal(signal.SIGTSTP)
        screen.wait_for(re.escape(NORMAL))
        os.waitid(os.P_PID, screen.process.pid, os.WSTOPPED)
        assert screen.settings == screen.before
        screen.process.send_signal(signal.SIGCONT)
        screen.wait_for(re.escape(ALTERNATE))
        screen.wait_for(b"quit")
        screen.press(b"q")
        left(screen, 0)


def test_so_many_pictures_and_no_more(client: Client) -> None:
    with watching(client, "-n", "2", "--interval", "0.1") as screen:
        left(screen, 0)


def test_without_a_terminal_it_prints_one_plain_picture_with_rates(client: Client) -> None:
    text = told(client, "top", "--interval", "0.1")
    assert "\x1b" not in text
    (line,) = [line for line in text.splitlines() if line.startswith(" disk ")]
    assert line.split()[:9] == ["disk", "ACTIVE", "ram", "1", "MiB", "0", "0", "0", "0"]
    assert len(re.findall("^ DEVICE", text, re.MULTILINE)) == 1
    assert "quit" not in text


def test_batch_prints_as_many_pictures_as_asked_for(client: Client) -> None:
    text = told(client, "top", "-b", "-n", "3", "-d", "0.1", "disk")
    assert len(re.findall("^ DEVICE", text, re.MULTILINE)) == 3
    assert "upper" not in text


def test_once_and_several_times_exclude_each_other(client: Client) -> None:
    assert "--once and -n 2" in told(client, "top", "--once", "-n", "2", status=64)


def test_stats_of_a_device_and_of_all(client: Client) -> None:
    assert told(client, "stats", "disk").startswith("disk: ACTIVE, 1 MiB, 0 clients\n")
    assert "upper: SUSPENDED" in told(client, "stats")
    assert "Device does not exist." in told(client, "stats", "missing", status=1)


def test_stats_as_json_once_and_in_lines_at_every_interval(client: Client) -> None:
    assert set(json.loads(told(client, "stats", "--json"))["devices"]) == {"disk", "upper"}
    lines = told(client, "stats", "--json", "--interval", "0.1", "--count", "2", "disk").splitlines()
    assert [set(json.loads(line)["devices"]) for line in lines] == [{"disk"}, {"disk"}]
    assert all(json.loads(line)["seconds"] > 0 for line in lines)


def test_stats_for_prometheus_is_what_its_parser_reads(client: Client) -> None:
    families = {family.name: family for family in text_string_to_metric_families(told(client, "stats", "--prometheus"))}
    sizes = {s.labels["device"]: s.value for s in families["blkloom_device_size_bytes"].samples}
    assert sizes == {"disk": 1 << 20, "upper": 1 << 19}


@pytest.mark.parametrize(
    "words", [("--json", "--prometheus"), ("--prometheus", "--interval", "1"), ("--count", "2")], ids=" ".join
)
def test_options_of_stats_that_do_not_go_together_are_refused(client: Client, words: tuple[str, ...]) -> None:
    assert told(client, "stats", *words, status=64).startswith("blkloom: --")


def test_a_supervisor_that_goes_away_is_said_and_the_next_one_is_found() -> None:
    with supervised() as first:
        first.create("here", table="0 8 zero")
        with watching(first, "--interval", "0.1") as screen:
            screen.wait_for(b"here")
            first.stop()
            screen.wait_for(b"old numbers")
            start(first.run_dir.path)
            with Client(first.run_dir.path, start=False) as second:
                second.create("anew", table="0 8 zero")
                screen.wait_for(b"anew.*quit")
                assert b"old numbers" not in screen.wait_for(b"blkloom top.*quit")
                screen.press(b"q")
                left(screen, 0)
