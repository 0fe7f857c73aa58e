"""`blkloom loop` compared with losetup: the same lists, the same errors."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import Life
from .loop_commands import Loop

pytestmark = pytest.mark.timeout(180)


@pytest.fixture
def life(shared: Life) -> Life:
    """The module's."""
    return shared


SAME = "SIZELIMIT,OFFSET,AUTOCLEAR,RO,BACK-FILE,DIO,LOG-SEC,BACK-INO,PARTSCAN"


@pytest.mark.parametrize("form", [(), ("-n",), ("--raw",), ("--raw", "-n"), ("-J",)])
@pytest.mark.parametrize("setup", [(), ("-r", "-o", "512", "--sizelimit", "4K"), ("--sizelimit=1KB",)])
@pytest.mark.parametrize("name", ["plain.img", "a b\\c \\x20\t\x01ä.img"])
def test_lists_are_those_of_losetup(
    loop: Loop,
    losetup: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path: Path,
    name: str,
    setup: tuple[str, ...],
    form: tuple[str, ...],
) -> None:
    path = tmp_path / name
    path.write_bytes(bytes(8192))
    device = losetup("-f", "--show", *setup, path).stdout.strip()
    # Older ones pad the numbers of devices in the other forms too.
    columns = SAME + (",BACK-MAJ:MIN" if form in ((), ("-n",)) else "")
    kernel = losetup("-l", "-O", columns, *form, device).stdout
    kernel_line = losetup(device).stdout
    if setup == ("--sizelimit=1KB",):
        assert loop.run("--shared", *setup, "loop0", path).returncode == 0
    else:
        loop("--shared", *setup, "loop0", path)
    ours = loop("-l", "-O", columns, *form, "loop0")
    assert ours == kernel
    assert loop("loop0") == kernel_line.replace(device, "loop0")


SAID = [
    ("-f", "--show", "nosuch"),
    ("-f", "/"),
    ("-o", "x", "-f", "a"),
    ("-o", "-1", "-f", "a"),
    ("--sizelimit", "1Q", "-f", "a"),
    ("-b", "x", "-f", "a"),
    ("--raw", "-J"),
    ("-l", "-O", "FOO"),
    ("-f", "a", "b"),
    ("-r",),
    ("-r", "DEVICE"),
    ("-P", "DEVICE"),
    ("-o", "512", "DEVICE"),
    ("-a", "-o", "512"),
    ("-f", "-r"),
    ("--direct-io=foo", "DEVICE"),
    ("--foo",),
    ("--all=1",),
    ("-Z",),
    ("-o",),
    ("--offset",),
    ("-d", "/dev/loop7777"),
    ("-c", "/dev/loop7777"),
    ("/dev/loop7777",),
    ("-l", "/dev/loop7777"),
    ("DEVICE", "FILE"),
]


@pytest.mark.parametrize("words", SAID, ids=" ".join)
def test_what_is_wrong_is_said_in_the_words_of_losetup(
    loop: Loop, losetup: Callable[..., subprocess.CompletedProcess[str]], file: Path, words: tuple[str, ...]
) -> None:
    device = losetup("-f", "--show", file).stdout.strip()
    loop("--shared", "loop0", file)

    def with_names(device: str) -> list[str]:
        return [{"DEVICE": device, "FILE": str(file)}.get(word, word) for word in words]

    kernel = losetup(*with_names(device))
    ours = loop.run(*with_names("loop0"))
    assert kernel.returncode == ours.returncode == 1
    first, *rest = ours.stderr.splitlines()
    kernel_first, *kernel_rest = kernel.stderr.splitlines()
    assert first.removeprefix("blkloom: ").replace("loop0", device) == kernel_first.removeprefix("losetup: ")
    if kernel_rest:
        assert rest[0] == kernel_rest[0].replace("losetup", "blkloom loop")
