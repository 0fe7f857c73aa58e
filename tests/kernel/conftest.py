"""The guest that the tests here boot."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from guest import Guest

KERNEL = Path(__file__).parents[2] / ".cache" / "kernel"
"""Where `make test-tools` puts the kernel."""


@pytest.fixture
def guest(program: Callable[[str, str], str], blkloom: str, tmp_path: Path) -> Guest:
    """A guest that shares the test's own directory. Skips where it cannot be booted."""
    if not (KERNEL / "vmlinuz").exists() or not (KERNEL / "udev" / "udevadm").exists():
        pytest.skip(f"no kernel and udev in {KERNEL} (make test-tools)")
    virtme_run = Path(sys.executable).with_name("virtme-run")
    if not virtme_run.exists():
        pytest.skip("virtme-run is missing (Python package virtme-ng)")
    program("qemu-system-x86_64", "qemu-system-x86")
    program("modprobe", "kmod")
    return Guest(virtme_run, KERNEL, tmp_path)
