"""Program that measures the time to open a QCOW2 image and to read one byte: `qcow2_opening.py PATH`.

It prints `ready`, then answers every line with JSON: the seconds from `blkloom.open` to the end of a read in the middle
of the image. The image is closed before and after.
"""

from __future__ import annotations

import json
import sys
import time

import blkloom


def main(path: str) -> None:
    """Run the program. path: of the image."""
    print("ready", flush=True)
    for _ in sys.stdin:
        begun = time.perf_counter()
        with blkloom.open(path) as device:
            device.pread(4096, device.size // 2 // 4096 * 4096)
            passed = time.perf_counter() - begun
        print(json.dumps({"operations": 1, "seconds": passed}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
