"""Mutation test: applies one fault at a time to a copy of the tree, to prove that the fuzzers, models and tests find
it.

Each fault has a description and names the program that must find it, within a limited time and without a corpus. If a
fault does not compile, or its original code is not found in the source, the list is wrong, which is an error.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("engine", "fuzz", "python/blkloom", "tests/handshake_streams.py")


class Failure(Exception):
    """A fault was not found, or could not be applied; the message names it."""


@dataclass(frozen=True)
class Fault:
    """A replacement of source text, and the program that must find it. found_by: a fuzzer, a model, or a test of a
    crate.
    """

    what: str
    path: str
    right: str
    wrong: str
    found_by: str


FAULTS = (
    Fault(
        "NBD: a request whose end is beyond 64 bits is let through",
        "engine/wire/src/request.rs",
        "self.offset.checked_add(self.length).is_none_or(|end| end > rules.size)",
        "self.offset.checked_add(self.length).is_some_and(|end| end > rules.size)",
        "fuzzer nbd_requests",
    ),
    Fault(
        "NBD: chunks of a read may overlap the one before",
        "engine/wire/src/server_reply.rs",
        "next > 0 && self.runs[next - 1].1 > at",
        "next > 1 && self.runs[next - 1].1 > at",
        "fuzzer nbd_replies",
    ),
    Fault(
        "NBD: a hand-over forgets what it was skipping",
        "engine/core/src/transport/nbd/connection/detach.rs",
        "Input::Skip(skipping) => Some(skipping),",
        "Input::Skip(_) => None,",
        "fuzzer nbd_connection",
    ),
    Fault(
        "FUSE: a write may have more data than it says",
        "engine/fuse-wire/src/request.rs",
        "if data.len() != stated as usize {",
        "if data.len() < stated as usize {",
        "fuzzer fuse_messages",
    ),
    Fault(
        "ublk: a request whose end is beyond 64 bits is let through",
        "engine/ublk-wire/src/lib.rs",
        ".filter(|offset| offset.checked_add(length).is_some())",
        "",
        "fuzzer ublk_descriptors",
    ),
    Fault(
        "virtio: one buffer to read may follow one to write",
        "engine/virtio-wire/src/split.rs",
        "if self.pieces.len() > self.readable {",
        "if self.pieces.len() > self.readable + 1 {",
        "fuzzer virtio_requests",
    ),
    Fault(
        "handshake: an option's header is read one byte early",
        "python/blkloom/export/nbd/handshake.py",
        "if len(self._buffer) < OPTION_HEADER:",
        "if len(self._buffer) < OPTION_HEADER - 1:",
        "handshake",
    ),
    Fault(
        "handshake: one byte too many of an option that is not read is skipped",
        "python/blkloom/export/nbd/handshake.py",
        "del self._buffer[:skipped]",
        "del self._buffer[: skipped + 1 if skipped else 0]",
        "handshake",
    ),
    Fault(
        "epochs: a turn does not wait for the requests of the epoch that it ends",
        "engine/core/src/epoch.rs",
        "self.wait(deadline, || self.pinned((old & 1) as usize) == 0)",
        "self.wait(deadline, || self.pinned(((old + 1) & 1) as usize) == 0)",
        "model a_map_is_let_go_of_when_no_request_uses_it",
    ),
    Fault(
        "epochs: an unpin does not order what the request did before it",
        "engine/core/src/epoch.rs",
        "self.pins[pin.shard.0].0[pin.parity].fetch_sub(1, Ordering::SeqCst);",
        "self.pins[pin.shard.0].0[pin.parity].fetch_sub(1, Ordering::Relaxed);",
        "model a_map_is_let_go_of_when_no_request_uses_it",
    ),
    Fault(
        "epochs: a drain takes a moment without waiting requests for the end",
        "engine/core/src/epoch.rs",
        "if self.waits.load(Ordering::SeqCst) == before {",
        "if self.waits.load(Ordering::SeqCst) >= before {",
        "model a_device_is_drained_when_no_request_is_inside_pinned_or_waiting",
    ),
    Fault(
        "mailbox: a reader does not look for messages once it has said that it sleeps",
        "engine/core/src/mailbox.rs",
        """        self.asleep.store(true, Ordering::SeqCst);
        if self.waiting.load(Ordering::SeqCst) {
""",
        """        let comes = self.waiting.load(Ordering::SeqCst);
        self.asleep.store(true, Ordering::SeqCst);
        if comes {
""",
        "model a_reader_that_sleeps_is_woken_by_whatever_comes",
    ),
    Fault(
        "gate: deferred faults are woken before the gate is closed",
        "engine/core/src/device.rs",
        """        self.gate.store(state, Ordering::SeqCst);
        if state != SUSPENDED {
            for (wakes, task) in waiting.drain(..) {
                wakes.post(Wake::GateOpened(task));
            }
        }
        drop(waiting);
        if state != LIVE {
            self.deferred.release_all();
        }
""",
        """        if state != LIVE {
            self.deferred.release_all();
        }
        self.gate.store(state, Ordering::SeqCst);
        if state != SUSPENDED {
            for (wakes, task) in waiting.drain(..) {
                wakes.post(Wake::GateOpened(task));
            }
        }
        drop(waiting);
""",
        "model a_deferred_fault_is_walked_again_when_its_gate_closes",
    ),
    Fault(
        "backend queue: an operation that is complete can still be cancelled",
        "engine/core/src/backend_queue.rs",
        "        // Removed first: otherwise the queue would find it here and cancel it.\n",
        "        operation.complete(result);\n        let result = Err(Errno::IO);\n",
        "model a_backend_is_told_to_cancel_only_what_is_not_complete",
    ),
    Fault(
        "backend queue: the taker is not woken when there is room again",
        "engine/core/src/backend_queue.rs",
        "if !state.waiting.is_empty() {",
        "if state.waiting.len() > 1 {",
        "model a_taker_that_sleeps_is_woken_by_operations_and_by_room_for_them",
    ),
    Fault(
        "semantics: a discard reaches a file that is read-only",
        "engine/core/src/semantics.rs",
        "Op::Discard if writable && punch => Some(FileAction::Punch),",
        "Op::Discard if writable || punch => Some(FileAction::Punch),",
        "test blkloom-core semantics",
    ),
    Fault(
        "map: a piece reaches past the end of its stripe",
        "engine/map/src/extent.rs",
        "len.min(chunk - within)",
        "len.min(*chunk)",
        "test blkloom-map model",
    ),
)


def completed(
    command: Sequence[str | Path], environment: Mapping[str, str], folder: Path
) -> subprocess.CompletedProcess[str]:
    """Run a command in a directory, without input. `stdout` of the result has its output, including errors."""
    return subprocess.run(
        command,
        env={**os.environ, **environment},
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )


@dataclass(frozen=True)
class Workplace:
    """A copy of the sources, and a directory for its build results."""

    tree: Path
    built: Path
    seconds: int
    """Of a fuzzer."""

    def copy(self) -> None:
        """Copy the current tree; unchanged files keep their timestamps, so that little is rebuilt."""
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *COPIED],
            cwd=ROOT,
            check=True,
            capture_output=True,
            text=True,
        )
        for name in filter(None, listed.stdout.split("\0")):
            source, copy = ROOT / name, self.tree / name
            if source.is_file() and (not copy.exists() or copy.read_bytes() != source.read_bytes()):
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, copy)

    @contextmanager
    def made(self, fault: Fault) -> Iterator[None]:
        """The copy with a fault applied."""
        path = self.tree / fault.path
        source = path.read_text()
        if source.count(fault.right) != 1:
            raise Failure(f"{fault.what}: {fault.path} no longer has its place once")
        path.write_text(source.replace(fault.right, fault.wrong))
        try:
            yield
        finally:
            path.write_text(source)

    def run(self, command: Sequence[str], environment: Mapping[str, str]) -> tuple[bool, str]:
        """Run a command; return whether it succeeded, and its output."""
        done = completed(command, environment, self.tree / "engine")
        return done.returncode == 0, done.stdout

    def finds(self, fault: Fault, coverage: str, platform: str) -> bool:
        """Whether the applied fault is found."""
        kind, _, name = fault.found_by.partition(" ")
        if kind == "handshake":
            return self._fuzzer_finds(sys.executable, str(self.tree / "fuzz" / "nbd_handshake.py"))
        if kind == "fuzzer":
            place = ["--target", platform, "--target-dir", str(self.built / "fuzz")]
            build = ["cargo", "build", "--quiet", "--release", "--manifest-path", "fuzz/Cargo.toml", *place]
            self.build(fault, [*build, "--bin", name], {"RUSTFLAGS": coverage})
            return self._fuzzer_finds(str(self.built / "fuzz" / platform / "release" / name))
        if kind == "model":
            chosen, folder, only = ["-p", "blkloom-core", "--lib"], "loom", [f"::{name}"]
            environment = {"RUSTFLAGS": "--cfg loom", "CARGO_PROFILE_DEV_OPT_LEVEL": "1"}
        else:
            package, test = name.split()
            chosen, folder, only = ["-p", package, "--test", test], "tests", []
            environment = {"PROPTEST_DISABLE_FAILURE_PERSISTENCE": "1"}
        command = ["cargo", "test", "--quiet", *chosen, "--target-dir", str(self.built / folder)]
        self.build(fault, [*command, "--no-run"], environment)
        _, said = self.run([*command, *only], environment)
        return re.search(r"test result: FAILED\. \d+ passed; [1-9]", said) is not None

    def _fuzzer_finds(self, *program: str) -> bool:
        with tempfile.TemporaryDirectory() as folder:
            corpus, findings = Path(folder) / "corpus", Path(folder) / "findings"
            corpus.mkdir()
            findings.mkdir()
            options = [f"-max_total_time={self.seconds}", "-max_len=2048", "-timeout=60"]
            environment = {"PYTHONPATH": str(self.tree / "python")}
            well, said = self.run([*program, *options, f"-artifact_prefix={findings}/", str(corpus)], environment)
            found = any(findings.iterdir())
        if well == found:
            print(said)
            raise Failure(f"{program[-1]} ended with another failure than a finding")
        return found

    def build(self, fault: Fault, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """Build the copy; a fault that does not compile is an error."""
        built, said = self.run(command, environment)
        if not built:
            print(said)
            raise Failure(f"{fault.what}: it does not build")


def find_all(work: Workplace, coverage: str, platform: str) -> Iterator[str]:
    """Apply each fault and run the program that must find it; print the result. Raises Failure at the end if one was
    not found.
    """
    work.copy()
    missed = []
    for fault in FAULTS:
        began = time.monotonic()
        with work.made(fault):
            found = work.finds(fault, coverage, platform)
        took = f"{time.monotonic() - began:.0f} s, building included"
        yield f"{fault.what}: {'found' if found else 'NOT FOUND'} by {fault.found_by} ({took})"
        if not found:
            missed.append(fault.what)
    if missed:
        raise Failure(f"{len(missed)} of {len(FAULTS)} faults were not found: {'; '.join(missed)}")
