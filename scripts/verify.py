"""`make verify`: fuzzers, models of threads, Miri and sanitizers for the engine and the NBD handshake, and mutants.

`verify.py [--seconds N] [--preemptions N] [STEP...]` runs the named steps, or all, and prints the number of cases of
each. A step whose tool is missing is skipped, and prints the command that installs it. Exits 1 after a finding: inputs
that a fuzzer found are stored in fuzz/findings, and a model prints the interleaving.

The Rust fuzzers need no nightly compiler: libFuzzer's hooks are an LLVM pass that the stable compiler has, too.
Sanitizers are unstable options, which RUSTC_BOOTSTRAP=1 allows with a stable compiler.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import mutants

ROOT = Path(__file__).resolve().parents[1]
ENGINE = ROOT / "engine"
TARGETS = ENGINE / "target" / "verify"
FINDINGS = ROOT / "fuzz" / "findings"
FUZZERS = ("nbd_requests", "nbd_replies", "nbd_connection", "fuse_messages", "ublk_descriptors", "virtio_requests")
NIGHTLY = "nightly"
INSTALL_MIRI = f"rustup toolchain install {NIGHTLY} --component miri,rust-src"
LONGEST_INPUT = 2048
"""Bytes of one input."""
FAULT_SECONDS = 60
"""For a fuzzer to find a fault, at least."""
HANGS = 60
"""Seconds after which one input is taken to hang."""
COVERAGE = (
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    "-Cllvm-args=-simplifycfg-branch-fold-threshold=0",
    "--cfg=fuzzing",
)
PURE = ("blkloom-map", "blkloom-wire", "blkloom-fuse-wire", "blkloom-ublk-wire", "blkloom-virtio-wire")
SANITIZED = (*PURE, "blkloom-io", "blkloom-core")


class Missing(Exception):
    """The step cannot run here; the message says how to install the missing tool."""


class Finding(Exception):
    """A step found an error; the output before has the details."""


@dataclass(frozen=True)
class Choice:
    """Duration and depth of the search."""

    seconds: int
    preemptions: int


def run(command: Sequence[str | Path], environment: Mapping[str, str] | None = None, *, folder: Path = ENGINE) -> str:
    """Run a command and return its output. Raises Finding with the output if it fails."""
    done = mutants.completed(command, environment or {}, folder)
    if done.returncode != 0:
        print(done.stdout)
        raise Finding(f"{' '.join(map(str, command))}: exit status {done.returncode}")
    return done.stdout


def host() -> str:
    """The platform that cargo builds for. It is passed to cargo explicitly, so that build scripts and macros are not
    instrumented.
    """
    found = re.search(r"^host: (\S+)$", run(["rustc", "-vV"]), re.MULTILINE)
    assert found, "rustc -vV names its host"
    return found[1]


def fuzz(choice: Choice) -> list[str]:
    """Run the targets of engine/fuzz, each for the given seconds."""
    if not shutil.which("c++"):
        raise Missing("libFuzzer is C++; as root: apt-get install g++")
    flags, platform = " ".join(COVERAGE), host()
    build = ["cargo", "build", "--quiet", "--release", "--manifest-path", "fuzz/Cargo.toml"]
    run([*build, "--target", platform, "--target-dir", TARGETS / "fuzz"], {"RUSTFLAGS": flags})
    programs = TARGETS / "fuzz" / platform / "release"
    return [fuzzer(name, [programs / name], choice) for name in FUZZERS]


def handshake(choice: Choice) -> list[str]:
    """Fuzz the handshake, which is Python code."""
    if find_spec("atheris") is None:
        raise Missing(f"atheris is not installed ({sys.executable} -m pip install atheris; it has wheels for x86-64)")
    return [fuzzer("nbd_handshake", [sys.executable, ROOT / "fuzz" / "nbd_handshake.py"], choice)]


def fuzzer(name: str, program: Sequence[str | Path], choice: Choice) -> str:
    """Run a libFuzzer program. It keeps its corpus for the next run."""
    corpus = TARGETS / "corpus" / name
    for folder in (corpus, FINDINGS):
        folder.mkdir(parents=True, exist_ok=True)
    options = [f"-max_total_time={choice.seconds}", f"-max_len={LONGEST_INPUT}", f"-timeout={HANGS}"]
    said = run([*program, *options, f"-artifact_prefix={FINDINGS}/{name}-", "-print_final_stats=1", corpus])
    cases = re.search(r"number_of_executed_units: (\d+)", said)
    covered = re.findall(r"cov: (\d+)", said)
    if not cases or int(cases[1]) == 0:
        print(said)
        raise Finding(f"{name} met no case")
    return f"{name}: {int(cases[1]):,} cases, {covered[-1] if covered else 'unknown'} places of code reached"


def models(choice: Choice) -> list[str]:
    """Run threads of the engine in every interleaving, with loom."""
    command = ["cargo", "test", "--quiet", "-p", "blkloom-core", "--lib", "--target-dir", str(TARGETS / "loom")]
    said = run(
        [*command, "models::", "--", "--nocapture", "--test-threads=1"],
        {
            "RUSTFLAGS": "--cfg loom",
            "CARGO_PROFILE_DEV_OPT_LEVEL": "1",
            "BLKLOOM_PREEMPTIONS": str(choice.preemptions),
        },
    )
    found = re.findall(r"model (.*): (\d+) interleavings", said)
    if not found:
        print(said)
        raise Finding("no model was run")
    total = sum(int(count) for _, count in found)
    return [f"{len(found)} models, {total:,} interleavings of up to {choice.preemptions} preemptions"]


def miri(_choice: Choice) -> list[str]:
    """Run the code without system calls under Miri: maps, wire formats, slices, buffers, range locks."""
    rustup = shutil.which("rustup")
    listed = [rustup or "rustup", "component", "list", "--toolchain", NIGHTLY, "--installed"]
    # Asked first: `cargo miri` itself would go and install what it lacks.
    installed = subprocess.run(listed, capture_output=True, text=True, check=False).stdout if rustup else ""
    if not all(re.search(rf"^{component}\b", installed, re.MULTILINE) for component in ("miri", "rust-src")):
        raise Missing(f"Miri is not installed: {INSTALL_MIRI}")
    command = ["cargo", f"+{NIGHTLY}", "miri", "test", "--quiet", "--target-dir", str(TARGETS / "miri")]
    environment = {"MIRIFLAGS": "-Zmiri-disable-isolation", "PROPTEST_CASES": "8"}
    pure = [argument for package in PURE for argument in ("-p", package)]
    said = run([*command, *pure], environment)
    said += run([*command, "-p", "blkloom-io", "--test", "memory"], environment)
    return [f"{tests(said)} tests"]


def address(_choice: Choice) -> list[str]:
    """Run the engine's tests under AddressSanitizer, which finds use after free and accesses out of bounds."""
    return [f"{sanitized('address')} tests"]


def sanitized(name: str) -> int:
    """The number of tests that ran."""
    command = ["cargo", "test", "--quiet", "--no-fail-fast", "--target", host(), "--target-dir", str(TARGETS / name)]
    chosen = [argument for package in SANITIZED for argument in ("-p", package)]
    said = run([*command, *chosen], {"RUSTC_BOOTSTRAP": "1", "RUSTFLAGS": f"-Zsanitizer={name}"})
    return tests(said)


def faults(choice: Choice) -> Iterator[str]:
    """Run the mutants, which a fuzzer, model or test must find."""
    if not shutil.which("c++") or find_spec("atheris") is None:
        raise Missing("it needs what `fuzz` and `handshake` need")
    folder = TARGETS / "mutants"
    work = mutants.Workplace(folder / "tree", folder, max(choice.seconds, FAULT_SECONDS))
    try:
        yield from mutants.find_all(work, " ".join(COVERAGE), host())
    except mutants.Failure as failure:
        raise Finding(str(failure)) from failure


def tests(said: str) -> int:
    """The number of tests that passed, according to cargo."""
    count = sum(int(passed) for passed in re.findall(r"test result: ok\. (\d+) passed", said))
    if count == 0:
        print(said)
        raise Finding("no test was run")
    return count


STEPS: dict[str, Callable[[Choice], Iterable[str]]] = {
    "fuzz": fuzz,
    "handshake": handshake,
    "models": models,
    "miri": miri,
    "address": address,
    "mutants": faults,
}


def main() -> int:
    """Exit status: 0 nothing found, 1 something was."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=300, help="for each fuzzer")
    parser.add_argument("--preemptions", type=int, default=5, help="of the models' threads, in one interleaving")
    parser.add_argument("steps", nargs="*", metavar="STEP", help=" ".join(STEPS))
    chosen = parser.parse_args()
    if unknown := [step for step in chosen.steps if step not in STEPS]:
        parser.error(f"no step {unknown[0]!r}; there are {', '.join(STEPS)}")
    failed = skipped = 0
    steps = chosen.steps or list(STEPS)
    for step in steps:
        try:
            for line in STEPS[step](Choice(chosen.seconds, chosen.preemptions)):
                print(f"verify {step}: {line}", flush=True)
        except Missing as missing:
            skipped += 1
            print(f"verify {step}: SKIPPED. {missing}", flush=True)
        except Finding as finding:
            failed += 1
            print(f"verify {step}: FOUND. {finding}", flush=True)
    print(f"verify: {len(steps) - failed - skipped} passed, {failed} failed, {skipped} skipped")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
