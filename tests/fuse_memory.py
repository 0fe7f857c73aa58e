"""FUSE files of the example servers of engine/fuse-wire: one in memory, and one without data."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from pathlib import Path

import pytest

from blkloom.export.fuse.mount import clone, mount, unmount
from faulty_fs import needs_fuse

_ENGINE = Path(__file__).parents[1] / "engine"
_END_TIMEOUT = 60.0
"""Seconds after which a server whose file was unmounted is taken to hang."""


@cache
def server(name: str = "fuse_memory_server") -> Path:
    """The program, built if it has to be. Arguments: SIZE DESCRIPTOR..."""
    cargo = shutil.which("cargo", path=os.pathsep.join([os.environ.get("PATH", ""), str(Path.home() / ".cargo/bin")]))
    if cargo is None:
        pytest.skip("cargo is missing (rustup.rs)")
    words = ["build", "--quiet", "--package=blkloom-fuse-wire", "--examples"]
    subprocess.run([cargo, *words, f"--manifest-path={_ENGINE / 'Cargo.toml'}"], check=True)
    return _ENGINE / "target/debug/examples" / name


def fuse_memory(path: Path, size: int, *, kept: bool = False, **options: bool) -> AbstractContextManager[Path]:
    """A file of `size` bytes at `path`, while the context lasts. kept: a file was there before. options: of `mount`."""
    return _served("fuse_memory_server", path, size, clones=0, kept=kept, **options)


def fuse_null(path: Path, size: int, *, clones: int) -> AbstractContextManager[Path]:
    """A file that reads as zeros and forgets what is written. clones: descriptors besides the mount's."""
    return _served("fuse_null_server", path, size, clones=clones, kept=False)


@contextmanager
def _served(name: str, path: Path, size: int, *, clones: int, kept: bool, **options: bool) -> Iterator[Path]:
    needs_fuse()
    program = server(name)
    mounted, device = mount(path, source="memory", **options)
    devices = [device, *(clone(device) for _ in range(clones))]
    words = [program, str(size), *map(str, devices)]
    with subprocess.Popen(words, stderr=subprocess.PIPE, pass_fds=devices) as process:
        for descriptor in devices:
            os.close(descriptor)
        try:
            yield Path(mounted.path)
        finally:
            unmount(mounted, lazy=True)
            try:
                _, said = process.communicate(timeout=_END_TIMEOUT)
            finally:
                process.kill()
        assert (process.returncode, said) == (0, b"")
    assert path.exists() == kept, "the file that was made for the mount goes with it"
