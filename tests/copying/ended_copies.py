"""Ends `blkloom copy` by a signal at each of its steps in turn, continues it, and compares.

`python ended_copies.py SIGNAL STRIDE SRC DST OPTIONS...`; with a stride of 3, at every third step. A step is before and
after each call that makes something durable, or makes, cuts or removes a file. Every copy runs in a fork of this
process, which saves the imports. Prints the last step, or what was wrong, with status 1.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import blkloom.cli.copying
import blkloom.cli.main
import blkloom.device.device
import blkloom.targets.qcow2  # noqa: F401
from blkloom.cli.main import main
from blkloom.device.device import Device

STEPS = ("fsync", "replace", "ftruncate", "truncate", "unlink", "open")
"""Functions of os."""


class Steps:
    """Counts steps, and sends the signal at one of them."""

    def __init__(self, last: int, number: int) -> None:
        self.left = last
        self.number = number

    def step(self) -> None:
        """One step."""
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), self.number)

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function with a step before and after it."""

        @functools.wraps(function)
        def stepped(*arguments: Any, **options: Any) -> Any:
            self.step()
            result = function(*arguments, **options)
            self.step()
            return result

        return stepped


def copied(words: list[str], steps: Steps | None = None) -> int:
    """The wait status of a copy in a fork."""
    if child := os.fork():
        return os.waitpid(child, 0)[1]
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        if steps:
            for name in STEPS:
                setattr(os, name, steps.around(getattr(os, name)))
            Device.flush = steps.around(Device.flush)  # type: ignore[method-assign]
        sys.argv = ["blkloom", "copy", *words]
        main()
    except SystemExit as error:
        os._exit(error.code if isinstance(error.code, int) else bool(error.code))
    finally:
        os._exit(99)


def at_each_step(number: int, stride: int, source: Path, target: Path, options: list[str]) -> int:
    """The number of steps of a copy. Ends the program if a continued copy is not right."""
    step = 1 - stride
    while True:
        step += stride
        for path in target.parent.glob(f"{target.name}*"):
            path.unlink()
        words = [str(source), str(target), *options]
        status = copied(words, Steps(step, number))
        if status == 0:
            left = sorted(path.name for path in target.parent.glob(f"{target.name}*"))
            if left != [target.name]:
                sys.exit(f"a whole copy leaves {left}")
            if number != signal.SIGKILL and step < 10:
                sys.exit(f"step {step}: the signal is ignored")
            return step
        expected = {(128 + number) << 8, *([] if number == signal.SIGINT else [number])}
        if status not in expected:  # SIGTERM kills before the copy begins
            sys.exit(f"step {step}: status {status:#x}")
        # Killed before anything of the target was noted, a file with a size may be there: then it begins again.
        if copied([*words, "--resume"]) != 0 and copied([*words, "--force"]) != 0:
            sys.exit(f"step {step}: it can neither be continued nor begun again")
        again = target.with_name("again.img")
        again.unlink(missing_ok=True)
        if copied([str(target), str(again)]) != 0:
            sys.exit(f"step {step}: the copy cannot be read")
        size = source.stat().st_size
        if again.read_bytes()[:size] != source.read_bytes():
            sys.exit(f"step {step}: the continued copy differs")
        if target.with_name(target.name + ".blkloom-copy").exists():
            sys.exit(f"step {step}: the journal is left")


if __name__ == "__main__":
    print(at_each_step(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]), sys.argv[5:]))
