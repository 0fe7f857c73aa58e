"""The command line: help, version, and one exit status for each kind of error, with place, value and remedy."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import socket
import struct
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(60)

USAGE, DATA, NO_INPUT, UNAVAILABLE, OS_ERROR, BUSY = 64, 65, 66, 69, 71, 75
BUILT_IN = {"error", "linear", "loop", "ram", "striped", "zero"}


class Cli:
    """Runs the command to its end."""

    def __init__(self, command: str, directory: Path) -> None:
        self._command = command
        self._directory = directory

    def __call__(self, *arguments: str | Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self._command, *map(str, arguments)],
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
            timeout=30,
            cwd=self._directory,
        )

    def succeeds(self, *arguments: str | Path) -> str:
        done = self(*arguments)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    def fails(self, status: int, *arguments: str | Path, stdin: str = "") -> str:
        """What it says on standard error; nothing must be on standard output, and no traceback."""
        done = self(*arguments, stdin=stdin)
        assert (done.returncode, done.stdout) == (status, ""), done.stderr
        assert "Traceback" not in done.stderr
        return done.stderr


@pytest.fixture
def cli(blkloom: str, tmp_path: Path) -> Cli:
    return Cli(blkloom, tmp_path)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(1 << 20))
    return path


# What it says of itself


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_names_every_verb_and_exit_status(cli: Cli, flag: str) -> None:
    told = cli.succeeds(flag)
    assert all(verb in told for verb in ("serve", "targets", "completion"))
    assert all(str(status) in told for status in (USAGE, DATA, NO_INPUT, UNAVAILABLE, OS_ERROR, BUSY))


def test_help_of_serve_has_every_option_and_examples(cli: Cli) -> None:
    told = cli.succeeds("serve", "--help")
    options = "table table-file ram device concise export description socket listen read-only direct-io shared"
    options += " format once stats io loops spin max-connections fault-timeout stall-timeout"
    assert [option for option in options.split() if f"--{option}" not in told] == []
    assert "blkloom serve --ram 1G --listen localhost:10809" in told


@pytest.mark.parametrize("verb", ["serve", "targets", "completion"])
def test_every_verb_has_help(cli: Cli, verb: str) -> None:
    assert f"Usage: blkloom {verb}" in cli.succeeds(verb, "--help")


def test_version_is_told(cli: Cli) -> None:
    assert "0.1.0" in cli.succeeds("--version")


def test_targets_lists_each_with_its_arguments(cli: Cli) -> None:
    told = cli.succeeds("targets")
    assert all(name in told for name in BUILT_IN)


def test_targets_as_json_can_be_read_by_programs(cli: Cli) -> None:
    listed = {target["name"]: target for target in json.loads(cli.succeeds("targets", "--json"))}
    assert set(listed) >= BUILT_IN
    assert listed["linear"]["syntax"] == "<dev path> <offset>"
    assert listed["ram"]["singleton"] is True
    assert listed["zero"]["singleton"] is False
    assert all(target["summary"] for target in listed.values())


@pytest.mark.parametrize(("shell", "check"), [("bash", "-n"), ("zsh", "-n"), ("fish", "--no-execute")])
def test_completion_script_is_one_its_shell_can_read(cli: Cli, shell: str, check: str, tmp_path: Path) -> None:
    script = tmp_path / "completion"
    script.write_text(cli.succeeds("completion", shell))
    assert "_BLKLOOM_COMPLETE" in script.read_text()
    if not shutil.which(shell):
        pytest.skip(f"{shell} is missing (Debian package {shell})")
    subprocess.run([shell, check, script], check=True, capture_output=True, timeout=30)


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("serve --direct", ["--direct-io"]),
        ("ls --target str", ["striped"]),
        ("table --target lo", ["log-writes", "loop"]),
        ("target-version l", ["linear", "log-writes", "loop"]),
        ("help susp", ["suspend"]),
    ],
)
def test_completion_completes_options_targets_and_verbs(cli: Cli, blkloom: str, words: str, found: list[str]) -> None:
    complete = {
        "_BLKLOOM_COMPLETE": "bash_complete",
        "COMP_WORDS": f"blkloom {words}",
        "COMP_CWORD": str(len(words.split())),
    }
    done = subprocess.run(
        [blkloom], env={**os.environ, **complete}, capture_output=True, text=True, check=False, timeout=30
    )
    assert done.stdout.split() == [f"plain,{name}" for name in found]


# 64: usage


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["serve"], "nothing to serve; name a FILE, or give --table, --ram or --device"),
        (["serve", "--ram", "1M", "--table", "0 8 zero"], "exclude each other"),
        (["serve", "--ram", "100"], "must be a multiple of 512 bytes"),
        (["serve", "--ram", "0"], "and not 0"),
        (["serve", "--ram", "1X"], "'1X' is not a size"),
        (["serve", "--device", "0 8 zero"], "is not NAME=TABLE"),
        (["serve", "--device", "a=0 8 zero", "--device", "a=0 8 zero"], "two devices are called 'a'"),
        (["serve", "--device", "a=0 8 zero", "--device", "b=0 8 zero", "--export", "c"], "--export names one device"),
        (["serve", "--listen", "localhost:port", "--ram", "1M"], "the port must be a number"),
        (["serve", "--listen", "localhost:65536", "--ram", "1M"], "up to 65535"),
        (["serve", "--listen", "::1", "--ram", "1M"], "write an IPv6 address in brackets, as in [::1]:10809"),
        (["serve", "--listen", "0.0.0.0:0", "--ram", "1M"], "confirm it with --allow-remote"),
        (["serve", "--listen", "[::]:0", "--ram", "1M"], "other hosts can reach ::"),
        (["serve", "--allow-remote", "--ram", "1M"], "--allow-remote needs --listen"),
        (["serve", "--no-such-option"], "No such option"),
        (["serve", "--format", "vmdk", "--ram", "1M"], "vmdk"),
        (["serve", "--export", "x" * 5000, "--ram", "1M"], "use at most 4096"),
        (["completion", "csh"], "csh"),
    ],
)
def test_usage_errors_are_64_and_say_what_to_write(cli: Cli, arguments: list[str], says: str) -> None:
    assert says in cli.fails(USAGE, *arguments)


# 65: tables


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ("0 8 zreo", "--table:1:5: unknown target type: 'zreo' (did you mean 'zero'?"),
        ("0 8 zero\n9 8 zero", "--table:2:1:"),
        ("0 0 zero", "--table:1:3:"),
        ("0 8 zero more", "--table:1:10:"),
        ("0 8", "--table:1:"),
        ("", "--table"),
        ("0 8 linear", "--table:1:"),
        ("0 8 ram\n8 8 zero", "--table:"),
        ("0 99999999999999999999 zero", "--table:1:3:"),
        ("0 8 linear blkloom:missing 0", "missing"),
        ("0 2049 loop disk.img", "Target maps area after file end"),
        ("0 8 loop disk.img 100", "Unaligned offset"),
        ("0 8 loop disk.img 2097152", "Offset is greater than file size"),
        ("0 9 striped 2 4 disk.img 0 disk.img 8", "Target length not divisible by number of stripes"),
    ],
)
def test_bad_tables_are_65_and_say_where(cli: Cli, image: Path, table: str, says: str) -> None:
    assert says in cli.fails(DATA, "serve", "--table", table)


def test_bad_table_from_standard_input_or_a_file_says_from_where(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "bad.table").write_text("0 8 zero\n8 8 nothing\n")
    assert "standard input:1:5" in cli.fails(DATA, "serve", "--table", "-", stdin="0 8 nothing\n")
    assert "bad.table:2:5" in cli.fails(DATA, "serve", "--table-file", "bad.table")


def test_bad_named_device_says_which(cli: Cli) -> None:
    assert "--device b" in cli.fails(DATA, "serve", "--device", "a=0 8 zero", "--device", "b=0 8 nothing")


# 66: backing files


def test_missing_file_is_66_and_named(cli: Cli) -> None:
    assert "nowhere.img: could not be opened: No such file or directory; check the path" in cli.fails(
        NO_INPUT, "serve", "nowhere.img"
    )


def test_missing_file_of_a_table_is_66_and_named(cli: Cli) -> None:
    assert "/nowhere/x" in cli.fails(NO_INPUT, "serve", "--table", "0 8 loop /nowhere/x")


def test_directory_and_fifo_are_66(cli: Cli, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for name in (".", "fifo"):
        assert "must be a regular file or a block device" in cli.fails(NO_INPUT, "serve", name)


def test_missing_table_file_is_66(cli: Cli) -> None:
    assert "nowhere.table" in cli.fails(NO_INPUT, "serve", "--table-file", "nowhere.table")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file_is_66(cli: Cli, image: Path) -> None:
    image.chmod(0)
    assert "Permission denied" in cli.fails(NO_INPUT, "serve", image)


# 69: sockets


def test_port_in_use_is_69_and_named(cli: Cli, image: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = cli.fails(UNAVAILABLE, "serve", image, "--listen", f"127.0.0.1:{port}")
    assert f"127.0.0.1:{port}" in said
    assert os.strerror(errno.EADDRINUSE) in said


def test_socket_in_use_or_impossible_is_69(cli: Cli, image: Path, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as taken:
        taken.bind(str(tmp_path / "taken.sock"))
        taken.listen()
        assert "another server listens there" in cli.fails(UNAVAILABLE, "serve", image, "--socket", "taken.sock")
    assert "not a socket" in cli.fails(UNAVAILABLE, "serve", image, "--socket", image)
    assert "nowhere" in cli.fails(UNAVAILABLE, "serve", image, "--socket", "nowhere/x.sock")


# 71, 75: the system


def test_more_memory_than_addresses_is_71(cli: Cli) -> None:
    said = cli.fails(OS_ERROR, "serve", "--table", f"0 {1 << 52} ram")
    assert "of memory cannot be had" in said
    assert "make the device smaller" in said


def test_preallocating_more_memory_than_is_free_is_refused_before_it_is_tried(blkloom: str) -> None:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    table = f"0 {2 * total // 512} ram 1 preallocate"
    # The limit of file size is the net: without the check, taking the memory must fail in another way.
    limited = ["sh", "-c", 'ulimit -f 1024 && exec "$@"', "sh", blkloom, "serve", "--table", table]
    done = subprocess.run(limited, capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == OS_ERROR, done.stderr
    assert "are available; make the device smaller, or leave preallocate out" in done.stderr


def test_file_in_use_is_75_and_names_the_process(cli: Cli, image: Path) -> None:
    with image.open("rb+") as holder:
        # As QEMU does: an OFD lock on the byte that says "I write" (here on all of them).
        lock = struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        fcntl.fcntl(holder, 37, lock)  # F_OFD_SETLK
        said = cli.fails(BUSY, "serve", image)
    assert "disk.img" in said


def test_file_served_twice_is_75_and_the_first_server_is_named(cli: Cli, blkloom: str, image: Path) -> None:
    first = subprocess.Popen([blkloom, "serve", str(image)], stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout is not None
        assert first.stdout.readline()
        assert str(first.pid) in cli.fails(BUSY, "serve", image)
        assert str(first.pid) in cli.fails(BUSY, "serve", "--table", f"0 8 linear {image} 0")
    finally:
        first.terminate()
        first.communicate(timeout=30)
    assert first.returncode == 0
