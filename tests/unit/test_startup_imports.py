"""Start-up time: commands do not import slow modules that they do not use."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

from blkloom.version import VERSION

SLOW = {"importlib.metadata", "numpy", "rich", "tempfile", "zstandard"}
"""No command needs one of them to begin."""
DEVICES = {"blkloom._engine", "blkloom.device.device", "blkloom.targets.loop", "blkloom.targets.qcow2", "ctypes"}
COMMAND = "from blkloom.cli.main import main; main()"


def imported(tmp_path: Path, code: str, *arguments: str) -> set[str]:
    """Modules that a Python process has imported when it ends."""
    listing = tmp_path / "modules"
    script = (
        "import atexit, sys\n"
        f"atexit.register(lambda: open({str(listing)!r}, 'w').write('\\n'.join(sys.modules)))\n{code}"
    )
    environment = os.environ | {"BLKLOOM_RUN_DIR": str(tmp_path / "run")}
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return set(listing.read_text().split("\n"))


@pytest.mark.parametrize("verb", ["ls", "info", "table", "version"])
def test_a_verb_that_looks_imports_no_loop_no_device_and_nothing_slow(tmp_path: Path, verb: str) -> None:
    unwanted = SLOW | DEVICES | {"asyncio", "ssl", "subprocess", "blkloom.table", "blkloom.partitions", "blkloom.image"}
    assert imported(tmp_path, COMMAND, verb) & unwanted == set()


def test_a_copy_of_a_file_imports_no_asyncio_and_nothing_slow(tmp_path: Path) -> None:
    (tmp_path / "disk.img").write_bytes(b"disk")
    copied = imported(tmp_path, COMMAND, "copy", str(tmp_path / "disk.img"), str(tmp_path / "copy.img"))
    assert copied & (SLOW | {"asyncio", "ssl", "subprocess"}) == set()


SERVE = """
import os, signal
import blkloom.cli.serving as serving
told = serving.click.echo
def echo(*words, **how):
    told(*words, **how)
    os.kill(os.getpid(), signal.SIGTERM)  # the URI: clients can connect
serving.click.echo = echo
"""


def test_serving_memory_imports_no_other_target_and_nothing_slow(tmp_path: Path) -> None:
    unwanted = SLOW | {
        "ctypes",
        "json",
        "shutil",
        "blkloom.targets.loop",
        "blkloom.targets.qcow2",
        "blkloom.partitions",
    }
    arguments = ("serve", "--ram", "1M", "--socket", str(tmp_path / "nbd.sock"))
    assert imported(tmp_path, SERVE + COMMAND, *arguments) & unwanted == set()


def test_the_version_is_that_of_the_package() -> None:
    engine = Path(__file__).parents[2] / "engine" / "Cargo.toml"
    assert tomllib.loads(engine.read_text())["workspace"]["package"]["version"] == VERSION
    assert version("blkloom") == VERSION


def test_the_supervisor_imports_no_device_no_target_and_no_worker(tmp_path: Path) -> None:
    unwanted = SLOW | DEVICES - {"blkloom._engine"} | {"blkloom.device", "blkloom.worker"}
    assert imported(tmp_path, "import blkloom.supervisor.command, blkloom.supervisor.main") & unwanted == set()


def test_the_supervisor_starts_its_zygote_before_it_imports_the_rest(tmp_path: Path) -> None:
    late = {"asyncio", "click", "msgspec", "pathlib", "blkloom.errors", "blkloom.supervisor.main"}
    assert imported(tmp_path, "import blkloom.supervisor.zygote_process") & late == set()


def test_the_zygote_imports_neither_the_command_line_nor_images(tmp_path: Path) -> None:
    unwanted = {"click", "importlib.metadata", "numpy", "rich", "blkloom.targets.qcow2", "blkloom.supervisor"}
    assert imported(tmp_path, "import blkloom.worker.zygote") & unwanted == set()


OPEN = "import blkloom\nwith blkloom.open('0 8 ram\\n') as device:\n    device.pread(512, 0)"


def test_a_device_without_coroutines_has_no_event_loop(tmp_path: Path) -> None:
    found = imported(tmp_path, OPEN)
    assert "blkloom.device.mapper" in found
    assert found & {"blkloom.device.handler_loop", "blkloom.device.async_handlers"} == set()
