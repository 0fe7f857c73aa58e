"""Runs one script of `dmsetup`'s commands with dmsetup on a kernel, and with blkloom on this machine.

The two preludes define what `dmsetup_compared.sh` names; `dmsetup_transcript.py` reads what the script prints.
"""

from __future__ import annotations

import os
import random
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

from dmsetup_transcript import Step, steps
from guest import Guest

LEGS = 3
LEG_SIZE = 2 << 20
_IO = Path(__file__).with_name("device_io.py")
_STEPS = Path(__file__).with_name("compared_steps.sh").read_text()

_IN_THE_KERNEL = """
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
node() { device "$1"; }
contents() { dd if="/dev/mapper/$1" bs=1M iflag=direct status=none | sha256sum | cut -c -16; }
write_to() {
    local n
    for ((n = 0; n < ${3:-1}; n++)); do dd if="$2" of="/dev/mapper/$1" bs=16k oflag=direct status=none; done
}
io() { /usr/bin/python3 -E @IO@ "/dev/mapper/$1" "${@:2}"; }
hold() { exec 8<"/dev/mapper/$1"; }
let_go() { exec 8<&-; }
quiet() { [ -n "${DM_DISABLE_UDEV:-}" ] || udevadm settle; }
settle() { while dmsetup info -c --noheadings -o name 2>/dev/null | grep -qx "$1"; do :; done; }
waits() { [ ! -e /proc/$1 ] || grep -q dm_wait_event /proc/$1/wchan; }
"""

_WITH_BLKLOOM = """
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
node() { echo "$BLKLOOM_RUN_DIR/nodes/$1"; }
contents() { nbdcopy "$(uri "$1")" - | sha256sum | cut -c -16; }
write_to() { local n; for ((n = 0; n < ${3:-1}; n++)); do nbdcopy --flush "$2" "$(uri "$1")"; done; }
# The system's Python has the module it needs.
io() { /usr/bin/python3 -E @IO@ "$(uri "$1")" "${@:2}"; }
hold() {
    local stay='import sys; print("held", flush=True); sys.stdin.read()'
    coproc HOLD { exec env PATH=/usr/bin:/bin nbdsh -u "$(uri "$1")" -c "$stay"; }
    holder=$HOLD_PID
    read -r <&"${HOLD[0]}"
}
let_go() { exec {HOLD[1]}>&-; wait $holder; }
quiet() { :; }
settle() { while blkloom info -c --noheadings -o name 2>/dev/null | grep -qx "$1"; do :; done; }
# A process that did not run while the supervisor answered two others has received all its answers.
ran() { grep -h -e ctxt -e '^State' "/proc/$1/status" 2>/dev/null; }
waits() {
    local before
    before=$(ran "$1")
    blkloom ls >/dev/null; blkloom ls >/dev/null
    [ "$before" = "$(ran "$1")" ] && { [ -z "$before" ] || [[ $before == *sleeping* ]]; }
}
"""


def _whole(prelude: str, script: str) -> str:
    return prelude.replace("@IO@", shlex.quote(str(_IO))) + _STEPS + script


def _make_files(directory: Path) -> None:
    for number in range(LEGS):
        (directory / f"{number}.img").write_bytes(random.Random(number).randbytes(LEG_SIZE))
    (directory / "pattern").write_bytes(random.Random(LEGS).randbytes(LEG_SIZE // 2))


def by_dmsetup(guest: Guest, script: str, modules: Sequence[str]) -> list[Step]:
    """The steps of the script on a guest's kernel."""
    _make_files(guest.directory)
    printed = guest.run(_whole(_IN_THE_KERNEL, script), modules=["dm-mod", "loop", *modules], timeout=900)
    return steps(printed, [f"/dev/loop{number}" for number in range(LEGS)], "/dev/mapper/")


def by_blkloom(blkloom: str, script: str, directory: Path) -> list[Step]:
    """The steps of the script with blkloom, whose command is given. directory: for all its files."""
    _make_files(directory)
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(Path(blkloom).parent), os.environ["PATH"]]),
        "BLKLOOM_RUN_DIR": str(directory / "run"),
        "TMPDIR": str(directory),
        "LC_ALL": "C",
    }
    try:
        done = subprocess.run(
            ["bash", "-c", _whole(_WITH_BLKLOOM, script)],
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
