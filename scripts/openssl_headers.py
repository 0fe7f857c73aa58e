"""The headers and libraries of OpenSSL that the engine is built with, in one directory.

`openssl_headers.py DIRECTORY` makes `include/openssl` and `lib` in it, of links to the files of the machine. The build
script of the crate `openssl-sys` finds them there without pkg-config. If the machine has no headers, as root the Debian
package is installed; otherwise it is downloaded and unpacked into the directory. Existing links that lead to files are
kept. Exits 1 with the remedy if there are no headers and none can be had.

Runs on Python 3.11 without packages, before there is a virtual environment.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from debian import DebianError, SuitesApt, codename, install, is_debian

_PACKAGE = "libssl-dev"
_LIBRARIES = ("libssl.so", "libcrypto.so")
_NAMED = re.compile(r"(lib(?:ssl|crypto)\.so)[^ ]* .*=> (\S+)")


class MissingError(Exception):
    """There are no headers; the message has the remedy."""


def found_headers(root: Path) -> dict[str, Path]:
    """The headers below a root by name; on Debian, those that depend on the processor have a directory of their own."""
    include = root / "usr/include"
    folders = [include / "openssl", *sorted(include.glob("*-linux-*/openssl"))]
    return {header.name: header for folder in folders for header in sorted(folder.glob("*.h"))}


def found_libraries() -> dict[str, Path]:
    """The libraries that programs of this machine load, newest version first, by name without version."""
    listed = subprocess.run(["/sbin/ldconfig", "-p"], capture_output=True, text=True, check=True).stdout
    found: dict[str, Path] = {}
    for name, path in sorted(_named(listed), reverse=True):
        found.setdefault(name, Path(path))
    return found


def _named(listed: str) -> Iterator[tuple[str, str]]:
    machine = "x86-64" if platform.machine() == "x86_64" else ""  # it may have libraries of 32 bits, too
    for line in listed.splitlines():
        if machine in line and (named := _NAMED.search(line)) is not None:
            yield named[1], named[2]


def gathered(directory: Path) -> bool:
    """Whether the directory is complete and its links lead to files."""
    wanted = [directory / "include/openssl/opensslv.h", directory / "include/openssl/configuration.h"]
    return all(path.exists() for path in (*wanted, *(directory / "lib" / name for name in _LIBRARIES)))


def gather(directory: Path) -> None:
    """Fills the directory. Raises MissingError, DebianError."""
    headers = found_headers(Path("/"))
    if "opensslv.h" not in headers:
        headers = _fetched(directory)
    libraries = found_libraries()
    if missing := [name for name in _LIBRARIES if name not in libraries]:
        raise MissingError(f"this machine has no {' and no '.join(missing)}: install OpenSSL (Debian's libssl3)")
    for folder in ("include", "lib"):
        shutil.rmtree(directory / folder, ignore_errors=True)
    (directory / "include/openssl").mkdir(parents=True)
    (directory / "lib").mkdir()
    for name, header in headers.items():
        (directory / "include/openssl" / name).symlink_to(header)
    for name in _LIBRARIES:
        (directory / "lib" / name).symlink_to(libraries[name])


def _fetched(directory: Path) -> dict[str, Path]:
    """Headers of the Debian package: installed, or unpacked beside the system."""
    if not is_debian():
        raise MissingError("the headers of OpenSSL are missing: install them (openssl-devel, libssl-dev)")
    if os.geteuid() == 0:
        install([_PACKAGE])
        return found_headers(Path("/"))
    print(f"unpacking {_PACKAGE} into {directory}", flush=True)
    package = directory / "package"
    shutil.rmtree(package, ignore_errors=True)
    package.mkdir(parents=True)
    apt = SuitesApt(directory / "apt", [codename()])
    apt.update()
    apt.unpack([_PACKAGE], package)
    shutil.rmtree(directory / "apt")
    return found_headers(package)


def main(arguments: Sequence[str]) -> int:
    """Run `openssl_headers.py DIRECTORY`."""
    if len(arguments) != 1:
        print(f"usage: {Path(__file__).name} DIRECTORY", file=sys.stderr)
        return 2
    directory = Path(arguments[0]).absolute()
    if gathered(directory):
        return 0
    try:
        gather(directory)
    except (DebianError, MissingError) as error:
        print(f"blkloom cannot be built here yet: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
