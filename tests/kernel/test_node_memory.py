"""A machine of 256 MiB that makes an ext4 on a node dirty does not hang (`node_memory.py`)."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from guest import Guest

from long_runs import only_long

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(0), only_long]
GiB = 1 << 30
SECONDS = 600
PROGRAMS = [Path(__file__).with_name(name) for name in ("node_memory.py", "node_survival.py")]
MODULES = {"ublk": ["ublk_drv"], "nbd": ["nbd"], "loop": ["fuse", "loop"]}
BUFFERED, DIRECT = "", "0 1 direct_io"

SCRIPT = """
export BLKLOOM_RUN_DIR=/run/b
mkfs.ext4 -q /dev/vda
mkdir /run/backing
mount /dev/vda /run/backing
{python} node_memory.py --via {via} --folder /run/backing --seconds {seconds} --loop-options '{options}'
umount /run/backing
kernel_is_content 'I/O error|Out of memory|oom-kill'
"""


@pytest.mark.parametrize("options", [BUFFERED, DIRECT], ids=["buffered", "direct"])
@pytest.mark.parametrize("via", MODULES)
def test_a_small_machine_that_writes_to_a_node_does_not_hang(
    guest: Guest, program: Callable[[str, str], str], via: str, options: str
) -> None:
    program("mkfs.ext4", "e2fsprogs")
    for path in PROGRAMS:
        (guest.directory / path.name).write_bytes(path.read_bytes())
    small = dataclasses.replace(guest, memory="256M", disk=2 * GiB)
    script = SCRIPT.format(python=sys.executable, via=via, seconds=SECONDS, options=options)
    printed = small.run(script, modules=["virtio_blk", "ext4", *MODULES[via]], timeout=SECONDS + 700)
    print(printed)
    done = json.loads(printed.splitlines()[-1])
    assert done["via"] == via
    assert done["restarts"] == 0
    assert done["files"] > 0
    assert done["written"] > 2 * done["memory"]
