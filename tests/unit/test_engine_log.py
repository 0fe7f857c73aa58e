"""The engine's log in Python's logging. Test programs run in separate processes, because a lost message of this process
would not be noticed.
"""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest

import lost_rings
from blkloom import _engine
from blkloom.device import engine_log

PATIENCE = 60.0

BEGIN = """
import logging, os, resource, select, sys
import blkloom
from blkloom import _engine
from blkloom.device import engine_log
from lost_rings import lose_rings

logging.basicConfig(format="%(levelname)s %(name)s %(threadName)s %(filename)s: %(message)s", stream=sys.stdout)
SIZE = 1 << 20

def submit(device):
    notices = _engine.Notices()  # a write through: for the loop to do, and not for this thread
    device.submit(notices, 1, "write", 0, 512, bytes(512), fua=True)
    select.select([notices.fileno()], [], [])
    (notice,) = notices.take()
    assert notice[2] == 0, notice

def lose():  # the ring of a device without a mapper
    engine = _engine.Engine(loops=1, io="io_uring")
    opened = open(sys.argv[1], "r+b")
    data = _engine.Extent.data(_engine.File(opened.fileno(), writable=True), 0)
    device = _engine.Device(engine, _engine.Map([(0, SIZE, 0, data)]))
    submit(device)
    lose_rings()
    submit(device)
    return device
"""
GOES_ON = (
    "WARNING blkloom.engine.core.queue blkloom-loop0 queue.rs: io_uring_enter failed; this loop goes on with threads"
)


def printed(program: str, *arguments: str | Path) -> list[str]:
    """The lines of a program that ends well and writes nothing to standard error."""
    command = [sys.executable, "-c", BEGIN + dedent(program), *map(str, arguments)]
    environment = {"PYTHONPATH": str(Path(lost_rings.__file__).parent)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    return done.stdout.splitlines()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    try:
        _engine.Engine(io="io_uring").close()
    except OSError as error:
        pytest.skip(f"needs io_uring: {error}")
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(1 << 20))
    return path


@pytest.mark.parametrize("closes", [True, False])
def test_a_loop_that_loses_its_ring_says_so_once(file: Path, closes: bool) -> None:
    program = f"""
    engine = blkloom.Engine(loops=1, io="io_uring")
    device = blkloom.open(sys.argv[1], engine=engine)
    submit(device)
    assert lose_rings() > 0
    submit(device)
    submit(device)
    if {closes}:
        device.close()
        engine.close()
    """
    (line,) = printed(program, file)
    assert line.startswith(f"{GOES_ON} (error="), line


def test_what_is_said_where_no_device_has_a_mapper_is_logged_at_the_end(file: Path) -> None:
    program = """
    device = lose()
    print("logged it has", _engine.has_log_records())
    """
    first, second = printed(program, file)
    assert first == "logged it has True"
    assert second.startswith(f"{GOES_ON} (error="), second


def test_a_fork_logs_nothing_of_its_parent_and_all_of_its_own(file: Path) -> None:
    program = """
    parents = lose()
    child = os.fork()
    if child == 0:
        print("child has", _engine.has_log_records(), flush=True)
        childs = lose()
        (record,), dropped = _engine.log_records()
        print("child has", record[1], dropped, flush=True)
        os._exit(0)
    print("child ended with", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    engine_log.forward()
    """
    *lines, last = printed(program, file)
    assert lines == ["child has False", "child has blkloom_core::queue 0", "child ended with 0"]
    assert last.startswith(f"{GOES_ON} (error="), last


def test_an_engine_that_gets_no_ring_says_so_once() -> None:
    program = """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    os.listdir("/")
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    engines = [_engine.Engine() for _ in range(3)]
    assert {engine.io for engine in engines} == {"threads"}
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    """
    (line,) = printed(program)
    assert "WARNING blkloom.engine.core.engine" in line
    assert "io_uring is not available here; threads are used instead, which is slower (error=" in line


def test_who_chose_threads_is_not_told_of_them() -> None:
    assert printed('blkloom.open("0 8 ram\\n", engine=_engine.Engine(io="threads")).close()') == []


def test_levels_and_names_are_those_of_logging_and_what_was_dropped_is_counted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "blkloom.engine")
    records = [(level, "blkloom_io::region", f"100 % of {level}", "a.rs", 7, "loop", 1.5) for level in (10, 20, 40)]
    engine_log.pass_on(records, 3)
    engine_log.pass_on([], 0)
    assert [(one.name, one.levelname, one.getMessage()) for one in caplog.records] == [
        ("blkloom.engine.io.region", "INFO", "100 % of 20"),
        ("blkloom.engine.io.region", "ERROR", "100 % of 40"),
        ("blkloom.engine", "WARNING", "3 more messages were dropped: they came faster than they were logged"),
    ]
    assert (caplog.records[0].created, caplog.records[0].msecs, caplog.records[0].lineno) == (1.5, 500.0, 7)
