"""Error messages for a virtual machine that does not boot."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
from guest import Guest, GuestError

from long_runs import only_long


def test_a_guest_that_does_not_come_up_is_started_once_more(tmp_path: Path) -> None:
    """Without `pytest.warns`: the warning must be none of those that are errors."""
    run = tmp_path / "run"
    run.write_text(
        f"#!/bin/sh\ncd {tmp_path}/.guest\n"
        "if [ ! -e ../aborted ]; then touch ../aborted; echo half >console; exit 134; fi\n"
        "echo hello >output; echo 0 >status\n"
    )
    run.chmod(0o755)
    assert Guest(run, tmp_path, tmp_path).run("echo hello") == "hello\n"
    assert (tmp_path / "aborted").exists()


WHAT_RUNS = """
for process in /proc/[0-9]*/exe; do echo "runs $(readlink $process)"; done
for folder in /usr/lib/systemd /usr/lib/udev /usr/lib/tmpfiles.d; do
    [ ! -d $folder ] || find $folder -mindepth 1 -printf "left %p\\n"
done
[ ! -e /run/udev/control ] || udevadm info --query=property --name=/dev/loop0
"""


@pytest.mark.kernel
@pytest.mark.parametrize("udev", [pytest.param(False, marks=only_long), True], ids=["without udev", "with udev"])
def test_what_the_host_has_installed_does_not_run_in_a_guest(guest: Guest, udev: bool) -> None:
    """Its udev and its tmpfiles.d. Where udev is asked for, another one runs."""
    said = dataclasses.replace(guest, udev=udev).run(WHAT_RUNS, modules=["loop"]).splitlines()
    wanted = {f"runs {(guest.kernels / 'udev' / 'udevadm').resolve()}"} if udev else set()
    assert {line for line in said if line.startswith("runs ") and "udev" in line} == wanted
    assert ("DEVNAME=/dev/loop0" in said) == udev
    assert not [line for line in said if line.startswith("left ")]


@pytest.mark.kernel
def test_a_guest_that_does_not_come_up_is_tried_twice_and_shown(guest: Guest, tmp_path: Path) -> None:
    broken = dataclasses.replace(guest, kernels=tmp_path / "kernels")
    broken.kernel.mkdir(parents=True)
    shutil.copy(guest.kernels / "busybox", broken.kernels)
    (broken.kernel / "vmlinuz").write_bytes(b"not a kernel" * 512)
    with (
        pytest.warns(UserWarning, match="did not come up"),
        pytest.raises(GuestError, match=r"(?s)twice.*invalid kernel"),
    ):
        broken.run("true")
