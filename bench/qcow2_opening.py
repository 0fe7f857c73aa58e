"""How long a QCOW2 image takes from nothing to its first byte: `qcow2_opening.py PATH`.

Prints `ready`, then answers every line with JSON: the seconds from `blkloom.open` to the end of a read
in the image's middle, the image closed before and after.
"""

from __future__ import annotations

import json
import sys
import time

import blkloom


def main(path: str) -> None:
    """path: of the image."""
    print("ready", flush=True)
    for _ in sys.stdin:
        begun = time.perf_counter()
        with blkloom.open(path) as device:
            device.pread(4096, device.size // 2 // 4096 * 4096)
            passed = time.perf_counter() - begun
        print(json.dumps({"operations": 1, "seconds": passed}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
