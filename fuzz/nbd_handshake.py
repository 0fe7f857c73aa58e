"""Coverage-guided fuzzer of the NBD handshake: `fuzz/nbd_handshake.py [libFuzzer's options] [CORPUS...]`.

An input is a client's byte stream and the positions where it is split. Arbitrary bytes may raise only `ProtocolError`;
memory stays within the limits; each answer is well-formed; and the splits change nothing (tests/handshake_streams.py).
Needs atheris, which contains libFuzzer. A finding is written to the path of `-artifact_prefix`, and the exit status is
not 0. `fuzz/nbd_handshake.py FILE` runs one input again.
"""

from __future__ import annotations

import struct
import sys
from pathlib import Path
from typing import Final

import atheris

ROOT: Final = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

with atheris.instrument_imports(include=["blkloom.export.nbd"]):
    from blkloom.export.nbd.codes import OPTION_MAGIC, Option
    from handshake_streams import check_answers, cut, run

MOST_CUTS: Final = 8


def meet(data: bytes) -> None:
    """Run one input: the number of splits, two bytes for the position of each, the stream."""
    count = min(data[0] % (MOST_CUTS + 1), (len(data) - 1) // 2) if data else 0
    cuts = list(struct.unpack_from(f">{count}H", data, 1)) if count else []
    stream = data[1 + 2 * count :]
    events = run([stream] if stream else [])
    check_answers(events)
    if cuts:
        assert run(cut(stream, cuts)) == events, "the cuts change what happens"


def seeds() -> dict[str, bytes]:
    """Named streams that reach late states of the handshake."""

    def option(number: int, data: bytes = b"") -> bytes:
        return struct.pack(">QII", OPTION_MAGIC, number, len(data)) + data

    def string(text: str) -> bytes:
        return struct.pack(">I", len(text.encode())) + text.encode()

    asked = string("disk") + struct.pack(">H2H", 2, 1, 3)
    contexts = string("disk") + struct.pack(">I", 2) + string("base:allocation") + string("qemu:")
    agreed = option(Option.STRUCTURED_REPLY) + option(Option.SET_META_CONTEXT, contexts)
    streams = {
        "name": option(Option.EXPORT_NAME, b"disk") + b"requests",
        "go": agreed + option(Option.INFO, asked) + option(Option.GO, asked) + b"requests",
        "extended": option(Option.EXTENDED_HEADERS) + option(Option.LIST_META_CONTEXT, contexts) + option(Option.LIST),
        "abort": option(Option.STARTTLS) + option(99, bytes(20)) + option(Option.ABORT),
    }
    return {name: bytes([2, 0, 9, 0, 30]) + struct.pack(">I", 3) + stream for name, stream in streams.items()}


def main() -> None:
    """Run the fuzzer. Does not return: libFuzzer ends the process."""
    folders = [Path(argument) for argument in sys.argv[1:] if Path(argument).is_dir()]
    if folders:
        for name, data in seeds().items():
            (folders[0] / f"seed-{name}").write_bytes(data)
    atheris.Setup(sys.argv, meet)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
