"""A worker that is stopped (SIGSTOP) and answers nothing: each verb ends soon, and those with `--force` do their work.

Verbs that wait for an answer take a minute or more each, so the time limit of each command fails them.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
from pathlib import Path

import pytest

from blkloom.cli.verbs import VERBS
from blkloom.control.client import Client
from blkloom.control.faults import Fault

from .attached import disk, life, loop_devices
from .conftest import Life

__all__ = ["disk", "life"]
pytestmark = pytest.mark.timeout(600)
SECONDS = 50

ASK_NO_WORKER = {
    *("serve", "supervisor", "targets", "target-version", "version", "replay", "help", "completion", "mangle", "wait"),
    *(name for name, verb in VERBS.items() if verb.module == "nodes" and name != "mknodes"),
}
ANSWERED = [
    "ls", "ls --tree", "info", "info -c", "info disk", "table", "table disk", "deps", "stats", "stats disk", "doctor",
    "reap", "mknodes", "export --list", "loop -a", "top --once", "fault disk", "fault --list",
]  # fmt: skip
REFUSED = [
    "status", "status disk", "snapshot --list", "message disk 0 x", "load disk --table '0 8 zero'",
    "reload disk --table '0 8 zero'", "clear disk", "suspend disk", "suspend disk --noflush", "resume disk",
    "rename disk other", "create above --table '0 8 linear blkloom:disk 0'", "export single --fuse",
    "unexport disk auto", "attach single --via loop", "attach single --via fuse", "detach disk", "partitions disk",
    "upgrade", "save disk --directory {saved}", "restore disk --directory {saved}", "remove upper", "remove single",
    "remove --retry single", "wipe_table upper", "fault single fail", "fault faulty slow 10ms", "fault faulty off",
    "snapshot single after", "snapshot kept after", "snapshot kept before --delete", "snapshot kept --delete",
    "snapshot kept before --merge", "copy blkloom:single {saved}.img",
]  # fmt: skip
FORCED = [
    "detach --force disk", "remove --force single", "remove --force upper", "remove --force faulty",
    "remove --force before", "remove --force kept",
]  # fmt: skip
"""`stop --force` is a test of its own."""


class Stopped:
    """Devices whose workers are stopped: "disk", attached and below "upper", "single", "faulty", which has a fault, and
    "kept", which has the snapshot "before".
    """

    def __init__(self, blkloom: str, life: Life, client: Client, folder: Path) -> None:
        self._command = [blkloom, "--run-dir", str(life.run_dir)]
        self._saved = shlex.quote(str(folder / "saved"))
        client.create("upper", table="0 2048 linear blkloom:disk 0")
        client.create("single", table="0 2048 ram")
        for name in ("faulty", "kept"):
            client.create(name, table="0 2048 ram")
        client.fault("faulty", Fault.fail())
        client.snapshot("kept", "before")
        client.attach("disk", via="loop")
        assert self.said("save disk --directory {saved}").returncode == 0
        self.names = [found.name for found in client.info()]
        for worker in {found.worker for found in client.info()}:
            os.kill(worker, signal.SIGSTOP)

    def said(self, verb: str) -> subprocess.CompletedProcess[str]:
        """The result of a command."""
        words = shlex.split(verb.format(saved=self._saved))
        return subprocess.run([*self._command, *words], capture_output=True, text=True, check=False, timeout=SECONDS)


@pytest.fixture
def stopped(blkloom: str, life: Life, client: Client, disk: str, tmp_path: Path) -> Stopped:
    """The devices."""
    return Stopped(blkloom, life, client, tmp_path)


def test_no_verb_waits_for_a_stopped_worker(stopped: Stopped, client: Client, life: Life) -> None:
    for verb in ANSWERED:
        done = stopped.said(verb)
        assert (verb, done.stderr, done.returncode) == (verb, "", 0)
    for verb in REFUSED:
        done = stopped.said(verb)
        assert (verb, done.returncode) == (verb, 71 if verb.startswith("copy ") else 1)  # that is no verb of dmsetup
        assert "is stopped, by SIGSTOP or a debugger; continue it (kill -CONT " in done.stderr, verb
    assert "disk stays: worker " in stopped.said("remove_all").stderr
    assert [found.name for found in client.info()] == stopped.names, "what was refused has changed nothing"
    assert len(loop_devices(life)) == 1
    for verb in FORCED:
        done = stopped.said(verb)
        assert (verb, done.stderr, done.returncode) == (verb, "", 0)
    assert loop_devices(life) == []
    assert [found.name for found in client.info()] == ["disk"]
    assert client.status("disk"), "another worker serves it"


@pytest.mark.parametrize("force", [True, False], ids=["stop --force", "SIGTERM"])
def test_stopped_workers_flush_and_end_with_the_supervisor(stopped: Stopped, life: Life, *, force: bool) -> None:
    if force:
        done = stopped.said("stop --force")
        assert (done.returncode, done.stderr) == (0, "")
    life.stop()
    assert loop_devices(life) == []


def test_every_verb_is_here() -> None:
    used = {verb.split()[0] for verb in (*ANSWERED, *REFUSED, *FORCED)}
    assert used | ASK_NO_WORKER | {"remove_all", "stop"} == set(VERBS)
