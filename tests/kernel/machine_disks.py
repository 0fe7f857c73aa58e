"""QEMU's options for disks over vhost-user, and commands, as docs/vhost-user.md has them."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from documented import blocks

PAGE = "docs/vhost-user.md"
_PATH, _MEMORY, _ID = "/run/blkloom/vhost/disk", "2G", "disk"


def qemu_options(memory: str, *paths: str) -> Sequence[str]:
    """The documented options with another size of the memory, and with a disk for each path."""
    (command,) = blocks(PAGE, "sh", "QEMU")
    program, *words = shlex.split(command.replace("\\\n", ""))
    assert program == "qemu-system-x86_64"
    options: list[str] = []
    for option, value in zip(words[::2], words[1::2], strict=True):
        assert option.startswith("-"), option
        if option not in ("-chardev", "-device"):
            options += (option, value.replace(_MEMORY, memory))
            continue
        for number, path in enumerate(paths):
            named = value.replace(f"id={_ID}", f"id={_ID}{number}").replace(f"chardev={_ID}", f"chardev={_ID}{number}")
            options += (option, named.replace(_PATH, path))
    return options
