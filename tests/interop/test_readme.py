"""The code blocks of README.md, run as written, in one shell and in order."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable

import pytest

from documented import ROOT, blocks
from faulty_fs import needs_fuse

README = (ROOT / "README.md").read_text()
MAKE = """
make() {
    case $1 in
        setup) ;;                                      # or these tests would not run
        demo) "$PYTHON" "$ROOT/scripts/demo.py" ;;
        *) return 1 ;;
    esac
}
"""


def _has_fuse() -> bool:
    try:
        needs_fuse()
    except pytest.skip.Exception:
        return False
    return True


@pytest.mark.timeout(300)
def test_the_commands_run_as_they_are_written(program: Callable[[str, str], str], blkloom: str) -> None:
    for name, package in (
        ("nbdinfo", "libnbd-bin"),
        ("nbdcopy", "libnbd-bin"),
        ("qemu-img", "qemu-utils"),
        ("mkfs.ext4", "e2fsprogs"),
    ):
        program(name, package)
    missing = [*([] if _has_fuse() else ["--fuse"]), *([] if _has_fuse() and os.geteuid() == 0 else ["--attach"])]
    script = [block for block in blocks("README.md", "sh") if not any(option in block for option in missing)]
    with tempfile.TemporaryDirectory(prefix="blk") as folder:
        environment = os.environ | {
            "BLKLOOM_RUN_DIR": f"{folder}/run",
            "TMPDIR": folder,
            "PYTHON": sys.executable,
            "ROOT": str(ROOT),
        }
        done = subprocess.run(
            ["bash", "-eux", "-o", "pipefail", "-c", "\n".join([MAKE, *script])],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=240,
            check=False,
        )
        if done.returncode:
            subprocess.run([blkloom, "stop", "--force"], env=environment, timeout=60, check=False)
        assert done.returncode == 0, done.stdout
    assert "virtual size: 3 MiB" in done.stdout
    assert re.search(r"^loop0 .*disk\.img", done.stdout, re.MULTILINE)


def test_the_python_runs_as_it_is_written() -> None:
    for block in blocks("README.md", "python"):
        exec(compile(block, "README.md", "exec"), {})


def test_the_first_screen_says_what_it_is_and_when_to_use_it_before_anything_else() -> None:
    titles = re.findall(r"^## (.*)$", README, re.MULTILINE)
    assert titles[:3] == ["When to use it, and when not", "Try it", "What you get"]
    assert README.startswith("# blkloom\n\n**A device mapper in user space**")


def test_every_document_it_leads_to_is_there() -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", README):
        assert (ROOT / target).exists(), target
