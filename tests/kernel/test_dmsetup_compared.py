"""One script, run with dmsetup in a kernel and with blkloom: what they print, how they end, what devices hold.

`dmsetup_compared.sh` is the script, `dmsetup_transcript.py` says what is evened out, and
`dmsetup_differences.py` lists the steps that differ on purpose; every other step must be the same.
"""

from __future__ import annotations

import dataclasses
import os
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from dmsetup_differences import DIFFERENCES
from dmsetup_transcript import Step, steps
from guest import Guest

HERE = Path(__file__).parent
SCRIPT = HERE / "dmsetup_compared.sh"
DOCUMENT = HERE.parents[1] / "docs" / "dmsetup.md"
LEGS = 3
LEG_SIZE = 2 << 20

IN_THE_KERNEL = """
DM=dm_kernel
dm_kernel() {
    local words=()
    # With udev, dmsetup waits for ever for the event of a device that got no table: there is none.
    case "$*" in "create bad --table " | "create bad") words=(--noudevsync) ;; esac
    if [ $BASHPID = $$ ]; then dmsetup "${words[@]}" "$@"; else exec dmsetup "${words[@]}" "$@"; fi
}
for n in 0 1 2; do losetup /dev/loop$n $n.img; done
A=/dev/loop0 B=/dev/loop1 C=/dev/loop2
MAJOR=$(awk '$2 == "device-mapper" { print $1 }' /proc/devices)
device() { echo "/dev/mapper/$1"; }
contents() { dd if="/dev/mapper/$1" bs=1M iflag=direct status=none | sha256sum | cut -c -16; }
write_to() {
    local n
    for ((n = 0; n < ${3:-1}; n++)); do dd if="$2" of="/dev/mapper/$1" bs=16k oflag=direct status=none; done
}
hold() { exec 8<"/dev/mapper/$1"; }
let_go() { exec 8<&-; }
quiet() { [ -n "${DM_DISABLE_UDEV:-}" ] || udevadm settle; }
settle() { while dmsetup info -c --noheadings -o name 2>/dev/null | grep -qx "$1"; do :; done; }
waits() { [ ! -e /proc/$1 ] || grep -q dm_wait_event /proc/$1/wchan; }
"""

WITH_BLKLOOM = """
DM=dm_blkloom
# The kernel lets several devices write to one block device; blkloom does, if told so.
dm_blkloom() {
    local shared=()
    case " $* " in *" create "* | *" load "* | *" reload "*) shared=(--shared) ;; esac
    if [ $BASHPID = $$ ]; then blkloom "$@" "${shared[@]}"; else exec blkloom "$@" "${shared[@]}"; fi
}
A=$PWD/0.img B=$PWD/1.img C=$PWD/2.img
MAJOR=0
uri() { echo "nbd+unix:///?socket=$BLKLOOM_RUN_DIR/dev/$1"; }
device() { echo "blkloom:$1"; }
contents() { nbdcopy "$(uri "$1")" - | sha256sum | cut -c -16; }
write_to() { local n; for ((n = 0; n < ${3:-1}; n++)); do nbdcopy --flush "$2" "$(uri "$1")"; done; }
hold() {
    local stay='import sys; print("held", flush=True); sys.stdin.read()'
    # The system's Python has the module it needs.
    coproc HOLD { exec env PATH=/usr/bin:/bin nbdsh -u "$(uri "$1")" -c "$stay"; }
    holder=$HOLD_PID
    read -r <&"${HOLD[0]}"
}
let_go() { exec {HOLD[1]}>&-; wait $holder; }
quiet() { :; }
settle() { while blkloom info -c --noheadings -o name 2>/dev/null | grep -qx "$1"; do :; done; }
# Whoever did not run while the supervisor answered two others has had all the answers it can have.
ran() { grep -h -e ctxt -e '^State' "/proc/$1/status" 2>/dev/null; }
waits() {
    local before
    before=$(ran "$1")
    blkloom ls >/dev/null; blkloom ls >/dev/null
    [ "$before" = "$(ran "$1")" ] && { [ -z "$before" ] || [[ $before == *sleeping* ]]; }
}
"""


def files(directory: Path) -> None:
    for number in range(LEGS):
        (directory / f"{number}.img").write_bytes(random.Random(number).randbytes(LEG_SIZE))
    (directory / "pattern").write_bytes(random.Random(LEGS).randbytes(LEG_SIZE // 2))


@pytest.fixture(params=[False, True], ids=["without udev", "with udev"])
def by_dmsetup(guest: Guest, program: Callable[[str, str], str], request: pytest.FixtureRequest) -> list[Step]:
    program("dmsetup", "dmsetup")
    guest = dataclasses.replace(guest, udev=request.param)
    files(guest.directory)
    printed = guest.run(IN_THE_KERNEL + SCRIPT.read_text(), modules=["dm-mod", "dm-zero", "loop"], timeout=900)
    return steps(printed, [f"/dev/loop{number}" for number in range(LEGS)], "/dev/mapper/")


@pytest.fixture(scope="module")
def by_blkloom(
    blkloom: str, program: Callable[[str, str], str], tmp_path_factory: pytest.TempPathFactory
) -> list[Step]:
    program("nbdcopy", "libnbd-bin")
    program("nbdsh", "libnbd-bin")
    directory = tmp_path_factory.mktemp("blkloom")
    files(directory)
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(Path(blkloom).parent), os.environ["PATH"]]),
        "BLKLOOM_RUN_DIR": str(directory / "run"),
        "TMPDIR": str(directory),
        "LC_ALL": "C",
    }
    try:
        done = subprocess.run(
            ["bash", "-c", WITH_BLKLOOM + SCRIPT.read_text()],
            cwd=directory,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
            check=False,
        )
    finally:
        subprocess.run([blkloom, "stop"], env=environment, check=True, timeout=60)
    assert done.returncode == 0, done.stdout
    return steps(done.stdout, [str(directory / f"{number}.img") for number in range(LEGS)], "blkloom:")


@pytest.mark.kernel
@pytest.mark.timeout(1200)
def test_a_script_of_dmsetups_does_the_same_with_blkloom(by_blkloom: list[Step], by_dmsetup: list[Step]) -> None:
    assert [step.command for step in by_blkloom] == [step.command for step in by_dmsetup]
    expected = {difference.command for difference in DIFFERENCES}
    different = [
        (ours, theirs) for ours, theirs in zip(by_blkloom, by_dmsetup, strict=True) if ours.lines != theirs.lines
    ]
    unexpected = [
        f"## {ours.title}\n{theirs}\n--- with blkloom\n{ours}"
        for ours, theirs in different
        if ours.command not in expected
    ]
    assert not unexpected, "\n\n".join(unexpected)
    assert {ours.command for ours, _ in different} == expected, "differences that are none any more"


def test_the_document_shows_the_differences_there_are() -> None:
    shown = [line for line in DOCUMENT.read_text().splitlines() if line.startswith("| `dm ")]
    assert shown == [difference.row() for difference in DIFFERENCES]


def test_the_script_is_one_a_shell_can_read() -> None:
    bash = shutil.which("bash")
    assert bash, "the shell of these tests"
    subprocess.run([bash, "-n", SCRIPT], check=True)
