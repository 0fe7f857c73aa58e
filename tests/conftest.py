"""Shared fixtures: programs of the system, `blkloom serve` as a process, settings of hypothesis.

If a fixture finds that something is missing, it skips its test and names the thing and its package. pytest lists the
skips at the end of the run.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import hypothesis
import pytest

SYSTEM_PROGRAMS = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/sbin", "/usr/sbin", "/sbin"])
"""mkfs and its kin are outside the PATH of those who are not root."""
LONGEST_TMPDIR = 24
"""Bytes. What a test puts below it has up to 80, and the path of a Unix socket fits 107. Tables take no spaces."""
STOP_TIMEOUT = 60.0
"""Seconds after which a server that was asked to stop is taken to hang."""


def pytest_configure() -> None:
    """`make fuzz` asks for longer searches. Signals end what a test starts, though this was started in the background
    of a shell or by nohup. Temporary files are where their sockets can be reached.
    """
    for number, default in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, default)
    if len(os.fsencode(tempfile.gettempdir())) > LONGEST_TMPDIR or len(tempfile.gettempdir().split()) > 1:
        os.environ["TMPDIR"] = tempfile.tempdir = "/tmp"
    hypothesis.settings.register_profile("blkloom", deadline=None)  # a machine with other work takes its time
    hypothesis.settings.load_profile("blkloom")
    if cases := os.environ.get("BLKLOOM_FUZZ_CASES"):
        hypothesis.settings.register_profile("fuzz", max_examples=int(cases), deadline=None, print_blob=True)
        hypothesis.settings.load_profile("fuzz")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that cannot run side by side are in one group, which `--dist loadgroup` gives to one process. Groups come
    first: what is left can be shared out while they run.
    """
    for item in items:
        if group := _group(item):
            item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: item.get_closest_marker("xdist_group") is None)


def _group(item: pytest.Item) -> str:
    folder = item.path.relative_to(Path(__file__).parent).parts[0]
    if folder == "kernel":
        return "virtual machines"  # each takes all the CPUs it gets
    if folder in ("life", "interop") or "file_systems" in getattr(item, "fixturenames", ()):
        # Loop devices, mounts, immutable files and their records, and supervisors that look for those.
        return "system"
    return ""


@pytest.fixture(scope="session")
def program() -> Callable[[str, str], str]:
    """`program(name, package)`: the path of a program, or a skip that names its Debian package."""

    def find(name: str, package: str) -> str:
        if path := shutil.which(name, path=SYSTEM_PROGRAMS):
            return path
        pytest.skip(f"{name} is missing (Debian package {package})")

    return find


@pytest.fixture(scope="session")
def qemu_tools(program: Callable[[str, str], str]) -> None:
    """QEMU's tools for images are there, or what needs them is skipped."""
    for name in ("qemu-img", "qemu-io"):
        program(name, "qemu-utils")


@pytest.fixture(scope="session")
def blkloom() -> str:
    """The path of the `blkloom` command of this very environment."""
    path = Path(sys.executable).with_name("blkloom")
    if not path.exists():
        pytest.skip("the blkloom command is not installed beside Python (make setup)")
    return str(path)


@dataclass
class Server:
    """A running `blkloom serve` and the URIs it printed, in order."""

    process: subprocess.Popen[str]
    uris: list[str]
    log: Path

    @property
    def uri(self) -> str:
        """The only URI."""
        (uri,) = self.uris
        return uri

    def stop(self) -> str:
        """Asks it to stop and expects success; returns what it still wrote to standard output."""
        self.process.send_signal(signal.SIGTERM)
        rest, _ = self.process.communicate(timeout=STOP_TIMEOUT)
        assert self.process.returncode == 0, self.log.read_text()
        return rest


@pytest.fixture
def serve(blkloom: str, tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """`serve(*arguments, exports=1)`: starts `blkloom serve`, returns when clients can connect.

    What a test has not stopped itself is stopped after it, and must then end with status 0.
    """
    with ExitStack() as stack:

        def start(*arguments: str | Path, exports: int = 1) -> Server:
            number = len(list(tmp_path.glob("serve-*.log")))
            log = tmp_path / f"serve-{number}.log"
            process = stack.enter_context(_process([blkloom, "serve", *map(str, arguments)], log))
            server = Server(process, [], log)
            stack.callback(_stop, server)
            assert process.stdout is not None
            for _ in range(exports):
                server.uris.append(_line(process.stdout, log))
            return server

        yield start


def _process(command: list[str], log: Path) -> subprocess.Popen[str]:
    with log.open("w") as errors:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, text=True)


def _line(stream: IO[str], log: Path) -> str:
    line = stream.readline()
    assert line.endswith("\n"), f"blkloom serve ended before it was ready:\n{log.read_text()}"
    return line.rstrip("\n")


def _stop(server: Server) -> None:
    if server.process.poll() is not None:
        return
    try:
        server.stop()
    except subprocess.TimeoutExpired:
        server.process.kill()
        raise
