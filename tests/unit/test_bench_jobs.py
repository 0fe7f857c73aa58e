"""The benchmark's load generators: their arguments, and the parsing of their output."""

import json
import shutil
import subprocess
import sys

import pytest

import counting
from jobs import Job, JobError, fio_arguments, fio_outcome, load_arguments, load_outcome, wall_seconds

SOCKET = ["--ioengine=nbd", "--uri=nbd+unix:///disk%201?socket=/run/a%20b.sock"]


def fio_json(*, operations: int, milliseconds: int) -> str:
    side = {
        "total_ios": operations,
        "runtime": milliseconds,
        "clat_ns": {"percentile": {"50.000000": 1000, "99.000000": 3000}},
    }
    idle = {"total_ios": 0, "runtime": 0, "clat_ns": {}}
    return json.dumps({"jobs": [{"read": side, "write": idle, "error": 0, "usr_cpu": 10, "sys_cpu": 20}]})


def log(start: int, end: int) -> str:
    """Of one job: a line every 20 ms, the first when 20 ms are over."""
    return "".join(f"{at}, 50, 0, 0, 0\n" for at in range(start + 20, end + 1, 20))


def test_ios_of_jobs_that_start_late_are_divided_by_the_time_from_first_start_to_last_end() -> None:
    said = fio_json(operations=2000, milliseconds=1000)  # two jobs of 1,000 I/Os, a second each
    logs = [log(1_700_000_000_000, 1_700_000_001_000), log(1_700_000_001_000, 1_700_000_002_000)]
    assert fio_outcome(said).operations / fio_outcome(said).seconds == 2000
    assert fio_outcome(said, logs).operations / fio_outcome(said, logs).seconds == 1000


def test_jobs_that_run_together_take_as_long_as_the_longest() -> None:
    logs = [log(5_000, 6_000), log(5_000, 5_980)]
    assert wall_seconds(logs, longest=1.1) == pytest.approx(1.1)
    assert fio_outcome(fio_json(operations=10, milliseconds=1100), logs).seconds == pytest.approx(1.1)


def test_logs_without_a_line_are_an_error() -> None:
    with pytest.raises(JobError, match="no line"):
        fio_outcome(fio_json(operations=1, milliseconds=1), ["", "\n"])


def test_only_several_jobs_of_fio_write_logs() -> None:
    def words(job: Job) -> list[str]:
        return fio_arguments(job, SOCKET, size=1 << 20, output="o", log="l", seconds=1.0)

    assert not [word for word in words(Job("randread", 4096)) if "log" in word]
    assert "--write_lat_log=l" in words(Job("randread", 4096, connections=2))


@pytest.mark.parametrize(
    ("flush", "fio", "nbd_load"),
    [
        ("", None, "randwrite"),
        ("each", "--fsync=1", "randwrite-flush"),
        ("end", "--end_fsync=1", "randwrite-end-flush"),
    ],
)
def test_both_clients_are_told_when_to_flush(flush: str, fio: str | None, nbd_load: str) -> None:
    job = Job("randwrite", 4096, depth=16, flush=flush)  # type: ignore[arg-type]
    words = fio_arguments(job, SOCKET, size=1 << 20, output="o", log="l", seconds=None)
    assert [word for word in words if "fsync" in word] == ([fio] if fio else [])
    numbers = ["4096", "16", "1", "1048576", "0"]
    assert load_arguments("/bin", "nbd_load", job, SOCKET, size=1 << 20, seconds=None) == [
        *("/bin/nbd_load", "/run/a b.sock", "disk 1", nbd_load),
        *numbers,
    ]
    assert load_arguments("/bin", "vhost_user_load --poll", job, ["/s"], size=1 << 20, seconds=None) == [
        *("/bin/vhost_user_load", "--poll", "/s", nbd_load),
        *numbers,
    ]


def test_what_makes_no_sense_is_an_error() -> None:
    with pytest.raises(JobError, match="fio"):
        fio_outcome("{}")
    with pytest.raises(JobError, match="load generator"):
        load_outcome("Segmentation fault")


def test_system_calls_of_a_process_are_counted_from_when_it_is_said() -> None:
    if lack := counting.lack():
        pytest.skip(lack)
    program = "import os, sys\nfor line in sys.stdin:\n for _ in range(1000): os.getppid()\n print(flush=True)"
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin
        assert process.stdout
        process.stdin.write(b"before\n")
        process.stdin.flush()
        process.stdout.readline()
        with counting.counted(process.pid) as counts:
            process.stdin.write(b"counted\n")
            process.stdin.flush()
            process.stdout.readline()
        process.stdin.close()
    assert 1000 <= counts.calls < 1100


def test_a_machine_without_perf_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert "perf is not installed" in counting.lack.__wrapped__()
