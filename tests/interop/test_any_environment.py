"""A few tests of every kind, run in an environment unlike a developer's machine.

Code that takes settings from its environment (a umask, a locale, HOME, ulimits, ignored signals) fails these tests
first.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FEW = [
    "tests/interop/test_serve_process.py::test_socket_of_its_own_is_private_and_gone_in_the_end",
    "tests/interop/test_serve_process.py::test_stats_as_json_count_what_a_client_did",
    "tests/life/test_verbs.py::test_files_are_opened_with_the_callers_working_directory_and_rights",
    "tests/life/test_exports.py::test_a_socket_of_ones_own_is_for_its_owner_alone_and_goes_by_its_path",
    "tests/unit/test_top_live.py::test_a_signal_ends_it_and_the_terminal_is_as_before",
    "tests/qcow2/test_block_status.py::test_nbdinfo_and_qemu_img_map_what_qemu_nbd_would_say",
]
BARE = {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C", "TZ": "Asia/Kathmandu"}
"""No HOME, no XDG_RUNTIME_DIR."""


@pytest.mark.parametrize("mask", [0o077, 0o000], ids=["umask 0077", "umask 0000"])
def test_tests_pass_in_a_bare_environment(tmp_path: Path, mask: int) -> None:
    folder = tmp_path / ("a folder with spaces and a name too long for the path of a Unix socket" * 2)
    folder.mkdir()

    def limited() -> None:
        os.umask(mask)
        for ignored in (signal.SIGINT, signal.SIGHUP):
            signal.signal(ignored, signal.SIG_IGN)
        for limit, most in ((resource.RLIMIT_NOFILE, 1024), (resource.RLIMIT_MEMLOCK, 64 << 10)):
            hard = resource.getrlimit(limit)[1]
            least = most if hard == resource.RLIM_INFINITY else min(most, hard)
            resource.setrlimit(limit, (least, least))

    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *FEW],
        cwd=ROOT,
        env={**BARE, "TMPDIR": str(folder)},
        preexec_fn=limited,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
