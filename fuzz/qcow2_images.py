"""Fuzzer with hostile QCOW2 images: `fuzz/qcow2_images.py [--cases N] [--seed S] [IMAGE...]`.

It takes the stored corpus (and the named images), changes the most dangerous values (tests/qcow2/mutations.py), and
lets blkloom attach the result, read it and write to it (tests/qcow2/hostile.py). Every case runs in a child process, so
that crashes, hangs and memory use can be found. A finding is stored in fuzz/findings with its mutations, and the exit
status is 1.

`--check IMAGE` runs one image without changes, to examine a finding.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import blkloom.image.attachment  # noqa: E402 - once, and not in every child
import blkloom.image.open_chain  # noqa: E402
import blkloom.image.qcow2.driver  # noqa: E402
import blkloom.image.qcow2.write.writer  # noqa: E402, F401
from qcow2.hostile import Misbehaviour, examine  # noqa: E402
from qcow2.make_corpus import unharmed  # noqa: E402
from qcow2.mutations import mutate  # noqa: E402

FINDINGS = ROOT / "fuzz" / "findings"
SECONDS = 60
"""After so long a case is taken to hang."""


def main() -> int:
    """Exit status: 0 nothing found, 1 something was."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, help="the first case's; each case has the next")
    parser.add_argument("--check", action="store_true", help="do not change the images named")
    parser.add_argument("images", nargs="*", type=Path)
    chosen = parser.parse_args()
    if chosen.check:
        found = [path for path in chosen.images if not _borne(path.read_bytes(), writable=True, say=True)]
        return bool(found)
    images = {path.name: path.read_bytes() for path in chosen.images} or unharmed()
    seed = chosen.seed if chosen.seed is not None else random.SystemRandom().randrange(1 << 32)
    findings = sum(not _case(images, number) for number in range(seed, seed + chosen.cases))
    print(f"{chosen.cases} cases from seed {seed}: {findings} findings", *([FINDINGS] if findings else []))
    return bool(findings)


def _case(images: dict[str, bytes], seed: int) -> bool:
    """Run a case in a child process; return whether it found no error."""
    dice = random.Random(seed)
    name = dice.choice(sorted(images))
    data, what = mutate(images[name], dice)
    writable = dice.random() < 0.5
    if _borne(data, writable=writable):
        return True
    FINDINGS.mkdir(exist_ok=True)
    (FINDINGS / f"{seed}.qcow2").write_bytes(data)
    (FINDINGS / f"{seed}.txt").write_text(f"{name}: {what}\nwritable: {writable}\n")
    _borne(data, writable=writable, say=True)
    print(f"case {seed}: {name}: {what}", file=sys.stderr)
    return False


def _borne(data: bytes, *, writable: bool, say: bool = False) -> bool:
    """Run a case in this child process; a signal ends it if it hangs."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "disk.qcow2"
        path.write_bytes(data)
        child = os.fork()
        if not child:
            signal.alarm(SECONDS)
            os._exit(_meet(path, writable=writable, say=say))
        _, status = os.waitpid(child, 0)
    if say and os.WIFSIGNALED(status):
        print(f"ended by {signal.Signals(os.WTERMSIG(status)).name}", file=sys.stderr)
    return status == 0


def _meet(path: Path, *, writable: bool, say: bool) -> int:
    try:
        found = examine(path, writable=writable)
    except Misbehaviour:
        if say:
            traceback.print_exc()
        return 1
    if say:
        print(found.refused or f"opened, {found.size} bytes, {'whole' if found.content is not None else 'in part'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
