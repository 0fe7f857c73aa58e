"""Client of an NBD server over TLS for `tls.py`: random requests with libnbd, which encrypts with GnuTLS.

    tls_load.py URI read|write BLOCK DEPTH SECONDS

Prints the number of requests, the seconds they took, and the seconds of processors of this client. Replies are simple
ones, so that zeros are sent as data, too. Runs in the system's Python, which has libnbd's module (python3-libnbd).
"""

import random
import resource
import sys
import time

import nbd  # type: ignore[import-not-found]  # of the system's Python


def main(uri: str, direction: str, block: int, depth: int, seconds: float) -> None:
    """Sends requests for some seconds, `depth` at a time."""
    handle = nbd.NBD()
    handle.set_uri_allow_local_file(True)
    handle.set_request_structured_replies(False)
    handle.connect_uri(uri)
    blocks = handle.get_size() // block
    chosen = random.Random(1)
    buffers = [nbd.Buffer.from_bytearray(bytearray(chosen.randbytes(block))) for _ in range(depth)]
    flying: dict[int, nbd.Buffer] = {}
    done, begun = 0, time.monotonic()
    before = resource.getrusage(resource.RUSAGE_SELF)
    while buffers or flying:
        while buffers and time.monotonic() - begun < seconds:
            buffer, offset = buffers.pop(), chosen.randrange(blocks) * block
            start = handle.aio_pread if direction == "read" else handle.aio_pwrite
            flying[start(buffer, offset)] = buffer
        if not flying:
            break
        handle.poll(-1)
        for cookie in [cookie for cookie in flying if handle.aio_command_completed(cookie)]:
            buffers.append(flying.pop(cookie))
            done += 1
    took = time.monotonic() - begun
    after = resource.getrusage(resource.RUSAGE_SELF)
    handle.shutdown()
    busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(done, took, busy)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5]))
