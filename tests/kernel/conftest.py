"""Fixture: the virtual machine that the tests of this directory boot."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from guest import Guest

KERNELS = Path(__file__).parents[2] / ".cache" / "kernel"
"""Where `make test-tools` puts them."""


@pytest.fixture
def guest(program: Callable[[str, str], str], blkloom: str, tmp_path: Path) -> Guest:
    """A guest that shares the test's own directory. Skips where it cannot be booted."""
    if not (KERNELS / "udev" / "udevadm").exists():
        pytest.skip(f"no kernels and udev in {KERNELS} (make test-tools)")
    virtme_run = Path(sys.executable).with_name("virtme-run")
    if not virtme_run.exists():
        pytest.skip("virtme-run is missing (Python package virtme-ng)")
    program("qemu-system-x86_64", "qemu-system-x86")
    program("modprobe", "kmod")
    return Guest(virtme_run, KERNELS, tmp_path)
