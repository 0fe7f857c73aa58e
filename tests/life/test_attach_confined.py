"""Nodes in containers, in user namespaces and for ordinary users: the impossible is refused with the reason and a
remedy, the rest works, and nothing is left.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from conformance.file_systems import MiB, needs_root
from faulty_fs import needs_fuse

from . import confined

pytestmark = pytest.mark.timeout(120)
Shell = Callable[..., list[tuple[int, str]]]

SCRIPT = """
import json, shlex, subprocess, sys
for words in map(shlex.split, sys.argv[2:]):
    command = ["sh", "-c", words[1]] if words[0] == "sh" else [sys.argv[1], *words]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=-1, stderr=-2, text=True)  # -1: PIPE, -2: STDOUT
    print(json.dumps([done.returncode, done.stdout]))
"""
NO_DEVICE = "/dev/fuse: No such file or directory (modprobe fuse; a container needs the device passed in)"
NO_CAPABILITY = "root lacks CAP_SYS_ADMIN, which mounting needs (a container may be given it)"
NO_MOUNTS = (
    "root of this user namespace may not mount in its mount namespace "
    "(begin both together: unshare --user --map-root-user --mount)"
)
NOT_ROOT = "only root may attach loop devices"
NO_RIGHT = "/dev/fuse: Permission denied (allow this user to read and write it; a container needs the device passed in)"
NO_HELPER = "fusermount3 is not installed (Debian: apt install fuse3)"


@pytest.fixture
def shell(blkloom: str, program: Callable[[str, str], str]) -> Iterator[Shell]:
    """`shell(kind, *commands)`: runs commands of blkloom, or "sh '...'", confined; status and output of each."""
    needs_fuse()
    needs_root("namespaces")
    program("setpriv", "util-linux")
    with tempfile.TemporaryDirectory(prefix="blk") as folder:
        (Path(folder) / "disk.img").write_bytes(bytes(4 * MiB))
        os.chmod(folder, 0o755)

        def shell(kind: str, *commands: str) -> list[tuple[int, str]]:
            words = [program("unshare", "util-linux"), "--mount", sys.executable, confined.__file__, kind, folder]
            words += [sys.executable, "-c", SCRIPT, blkloom, *commands]
            environment = os.environ | {"BLKLOOM_RUN_DIR": f"{folder}/run", "TMPDIR": folder}
            environment.pop("XDG_RUNTIME_DIR", None)
            done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            return [(status, text) for status, text in map(json.loads, done.stdout.splitlines())]

        yield shell
        run_dir = Path(folder, "run")
        left = {str(path.relative_to(run_dir)) for path in run_dir.rglob("*") if not path.is_dir()}
        assert left <= {"lock", "start.lock", "supervisor.log"}
        assert not list(Path(folder).glob("blkloom-*")), "of `serve`"


@pytest.mark.parametrize(
    ("kind", "loop", "fuse"),
    [
        ("container_without_fuse", NO_DEVICE, NO_DEVICE),
        ("container_without_capabilities", NO_CAPABILITY, NO_CAPABILITY),
        ("user_namespace", NO_MOUNTS, NO_MOUNTS),
        ("ordinary_user_without_device", NOT_ROOT, NO_RIGHT),
        ("ordinary_user_without_helper", NOT_ROOT, NO_HELPER),
    ],
    ids=lambda value: value if value.isidentifier() else "",
)
def test_what_is_impossible_is_refused_with_a_remedy(shell: Shell, kind: str, loop: str, fuse: str) -> None:
    doctor, made, *refused, alone, detached, there, stopped = shell(
        kind,
        "doctor",
        "create disk disk.img --format raw",
        "attach disk",
        "create memory --table '0 8 ram' --attach",
        "attach disk --via loop",
        "attach disk --via fuse",
        "serve --ram 1M --attach",
        "detach disk",
        "info -c --noheadings -o name,node",
        "stop",
    )
    assert doctor[0] == 1
    assert re.search(rf"^attach --via loop +no +{re.escape(loop)}$", doctor[1], re.MULTILINE), doctor
    assert re.search(rf"^attach --via fuse +no +{re.escape(fuse)}$", doctor[1], re.MULTILINE), doctor
    assert made == (0, "")
    assert all(status == 1 for status, _ in refused)
    for (_, text), reasons in zip(refused, ([loop, fuse], [loop], [loop], [fuse]), strict=True):
        assert "blkloom: cannot be attached here: " in text
        assert all(reason in text for reason in reasons), text
        assert "`blkloom doctor` says what to install or change" in text
    assert alone[0] != 0
    assert fuse in alone[1]
    assert detached == (1, "blkloom: device 'disk' is not attached\n")
    assert there == (0, "disk:\n")
    assert stopped == (0, "")


@pytest.mark.parametrize("kind", ["user_and_mount_namespace", "ordinary_user"])
def test_a_file_is_a_node_without_the_rights_of_root(shell: Shell, kind: str) -> None:
    use = "echo hello | dd of=run/fuse/disk bs=6 conv=notrunc,fsync status=none && head -c 6 disk.img | grep -q hello"
    done = shell(
        kind,
        "create disk disk.img --format raw",
        "attach disk --via fuse",
        f"sh '{use}'",
        "detach disk",
        "attach disk --via fuse",
        "remove disk",
        "stop",
    )
    assert [status for status, _ in done] == [0] * 7, done
    assert "run/fuse/disk" in done[1][1]
