"""Debian packages for the demo and the tests: finds missing packages and installs them.

`debian.py install PACKAGE...` exits 0 if all are installed at the end. As root it installs missing packages; otherwise
it prints their names and the command that installs them, and exits 1. On a system without dpkg it only prints the names
of the packages in Debian; the tests then name each program that they do not find.

Installed packages are never removed or downgraded. If a machine has some packages of QEMU from backports, the other
packages of QEMU come from there, too, because versions conflict. Backports are read through a separate apt
configuration (see `SuitesApt`), so that the machine's sources and lists do not change. The URLs of Debian's mirrors
always come from the machine's own sources.

Runs on Python 3.11 without packages, before there is a virtual environment.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

APT_SOURCES = Path("/etc/apt")
OS_RELEASE = Path("/etc/os-release")
PATIENT = ("-o", "DPkg::Lock::Timeout=300", "-o", "Acquire::Retries=3")
"""Waits (seconds) while another apt works, and tries a download again."""


class DebianError(Exception):
    """A missing package or a failure, with the remedy."""


def is_debian() -> bool:
    """Whether this system has dpkg and apt."""
    return all(shutil.which(program) for program in ("dpkg-query", "apt-get"))


def missing(packages: Iterable[str]) -> list[str]:
    """The packages that are not installed, in the given order."""
    return [package for package in packages if installed_version(package) is None]


def installed_version(package: str) -> str | None:
    """The version of an installed package, or None."""
    found = subprocess.run(
        ["dpkg-query", "--show", "--showformat=${db:Status-Status} ${Version}", package],
        capture_output=True,
        text=True,
        check=False,
    )
    status, _, version = found.stdout.partition(" ")
    return version if status == "installed" else None


def install(packages: Sequence[str]) -> None:
    """Install the missing packages.

    Raises DebianError if packages are missing and this is not root, or apt fails.
    """
    wanted = missing(packages)
    if not wanted:
        return
    if os.geteuid() != 0:
        raise DebianError(f"not installed: {' '.join(wanted)}\nas root: apt-get install {' '.join(wanted)}")
    print(f"installing {' '.join(wanted)}", flush=True)
    _run(["apt-get", "update", *PATIENT], quiet=True)
    if _installs_cleanly(wanted):
        _install(["apt-get"], wanted)
        return
    with tempfile.TemporaryDirectory(prefix="blkloom-apt-") as directory:
        backports = f"{codename()}-backports"
        apt = SuitesApt(Path(directory), [codename(), backports])
        apt.update()
        _install(["apt-get", *apt.options, "--target-release", backports], wanted)


def _installs_cleanly(packages: Sequence[str]) -> bool:
    """Whether apt would install the packages without removing others."""
    plan = subprocess.run(
        ["apt-get", "--simulate", "--no-install-recommends", "install", *packages],
        capture_output=True,
        text=True,
        check=False,
    )
    return plan.returncode == 0 and not any(line.startswith("Remv ") for line in plan.stdout.splitlines())


def _install(apt: Sequence[str], packages: Sequence[str]) -> None:
    _run(
        [*apt, "install", "--yes", "--no-install-recommends", "--no-remove", *PATIENT, *packages],
        environment={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
        quiet=True,
    )


def _run(
    command: Sequence[str | Path],
    *,
    environment: dict[str, str] | None = None,
    directory: Path | None = None,
    quiet: bool = False,
) -> None:
    done = subprocess.run(
        command,
        env=environment,
        cwd=directory,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE if quiet else None,
        stderr=subprocess.STDOUT if quiet else None,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        said = f":\n{done.stdout}" if done.stdout else ""
        raise DebianError(f"{' '.join(map(str, command))}: exit status {done.returncode}{said}")


@dataclass(frozen=True)
class Source:
    """An entry of apt's sources: the location of a suite."""

    uris: str
    suites: tuple[str, ...]
    options: tuple[str, ...]
    """Further fields as deb822 lines, such as `Signed-By: PATH`."""


class SuitesApt:
    """apt with some suites, such as the machine's own and its backports; lists and downloads are in a separate
    directory.

    It reads the machine's package database, so its dependencies are right for this machine. Needs no root, except to
    install.
    """

    def __init__(self, directory: Path, suites: Sequence[str]) -> None:
        """Writes the configuration. Raises DebianError when the machine's sources do not name Debian's."""
        self.directory = directory
        self.options = _configured(directory, suites, {})

    def update(self) -> None:
        """Reads the lists of packages. Raises DebianError."""
        _run(["apt-get", *self.options, *PATIENT, "update"], quiet=True)

    def field(self, package: str, name: str, suite: str) -> str | None:
        """A field of the newest version in the suite, or None when there is no such package."""
        shown = subprocess.run(
            ["apt-cache", *self.options, "show", "--no-all-versions", f"{package}/{suite}"],
            capture_output=True,
            text=True,
            check=False,
        )
        for line in shown.stdout.splitlines():
            if line.startswith(f"{name}: "):
                return line.partition(": ")[2]
        return None

    def unpack(self, packages: Sequence[str], root: Path) -> None:
        """Downloads packages and unpacks their files under a directory; installs nothing. Raises DebianError."""
        downloads = self.directory / "downloads"
        downloads.mkdir()
        _run(["apt-get", *self.options, *PATIENT, "download", *packages], directory=downloads, quiet=True)
        for archive in sorted(downloads.glob("*.deb")):
            _run(["dpkg-deb", "--extract", archive, root])
        shutil.rmtree(downloads)


class ReleaseApt:
    """apt with the main suite of another Debian release, for programs that run beside the machine's. It ignores
    installed packages, so it downloads all dependencies of a program, including the C library. Needs no root.
    """

    def __init__(self, directory: Path, release: str) -> None:
        """Writes the configuration. Raises DebianError when the machine's sources do not name Debian's."""
        self.directory = directory
        status = directory / "status"
        self.options = _configured(directory, [release], {"Dir::State::Status": status})
        status.touch()

    def unpack(self, packages: Sequence[str], root: Path, *, alone: Sequence[str] = ()) -> None:
        """Downloads packages and all that they need, and unpacks their files under a directory. alone: further
        packages, without what they need. Raises DebianError.
        """
        _run(["apt-get", *self.options, *PATIENT, "update"], quiet=True)
        wanted = ["install", "--yes", "--no-install-recommends", "--download-only", *packages]
        _run(["apt-get", *self.options, *PATIENT, *wanted], quiet=True)
        archives = self.directory / "cache/archives"
        if alone:
            _run(["apt-get", *self.options, *PATIENT, "download", *alone], directory=archives, quiet=True)
        root.mkdir()
        for archive in sorted(archives.glob("*.deb")):
            _run(["dpkg-deb", "--extract", archive, root])


def _configured(directory: Path, suites: Sequence[str], further: dict[str, Path]) -> list[str]:
    """Options that make apt read these suites from the machine's mirrors, and keep lists and downloads in the
    directory. Raises DebianError.
    """
    main = _main_source(codename())
    for folder in ("sources", "lists/partial", "cache/archives/partial"):
        (directory / folder).mkdir(parents=True, exist_ok=True)
    lines = ["Types: deb", f"URIs: {main.uris}", f"Suites: {' '.join(suites)}", "Components: main", *main.options]
    (directory / "sources" / "other.sources").write_text("\n".join(lines) + "\n")
    settings = {
        "Dir::Etc::SourceList": "/dev/null",
        "Dir::Etc::SourceParts": directory / "sources",
        "Dir::State::Lists": directory / "lists",
        "Dir::Cache": directory / "cache",
        # Root's downloads would otherwise be done as a user that cannot enter the directory.
        "APT::Sandbox::User": "root",
        **further,
    }
    return [word for key, value in settings.items() for word in ("-o", f"{key}={value}")]


def codename() -> str:
    """Code name of the machine's release, such as `bookworm`. Raises DebianError."""
    for line in OS_RELEASE.read_text().splitlines():
        key, _, value = line.partition("=")
        if key == "VERSION_CODENAME":
            return value.strip('"')
    raise DebianError(f"{OS_RELEASE} names no VERSION_CODENAME; backports are those of a Debian release")


def _main_source(suite: str) -> Source:
    for source in _machine_sources():
        if suite in source.suites:
            return source
    raise DebianError(f"no source under {APT_SOURCES} has the suite {suite!r}; add Debian's main archive to them")


def _machine_sources() -> Iterator[Source]:
    """The sources, read from their files: `apt-get indextargets` lists a source only after its lists were downloaded,
    which is not so in a fresh container, and does not say which key signs it.
    """
    parts = APT_SOURCES / "sources.list.d"
    for path in sorted(parts.glob("*.sources")):
        for stanza in path.read_text().split("\n\n"):
            yield from _from_deb822(stanza)
    for path in [APT_SOURCES / "sources.list", *sorted(parts.glob("*.list"))]:
        if path.exists():
            for line in path.read_text().splitlines():
                yield from _from_one_line(line)


def _from_deb822(stanza: str) -> Iterator[Source]:
    """An entry in the format of sources.list(5), "DEB822-STYLE FORMAT"."""
    fields: dict[str, str] = {}
    last = ""
    for line in stanza.splitlines():
        if line.startswith("#") or not line.strip():
            continue
        if line[0] in " \t":
            fields[last] += f"\n{line}"
        else:
            key, _, value = line.partition(":")
            last = key.strip().lower()
            fields[last] = value.strip()
    if "deb" in fields.get("types", "").split() and fields.get("enabled", "yes").lower() != "no":
        kept = ("signed-by", "trusted", "architectures", "check-valid-until")
        options = tuple(f"{key}: {fields[key]}" for key in kept if key in fields)
        yield Source(fields.get("uris", ""), tuple(fields.get("suites", "").split()), options)


def _from_one_line(line: str) -> Iterator[Source]:
    """An entry in the format of sources.list(5), "ONE-LINE-STYLE FORMAT"."""
    kind, _, rest = line.partition("#")[0].strip().partition(" ")
    if kind != "deb":
        return
    options: list[str] = []
    rest = rest.strip()
    if rest.startswith("["):
        bracket, _, rest = rest[1:].partition("]")
        names = {"signed-by": "Signed-By", "trusted": "Trusted", "arch": "Architectures"}
        names["check-valid-until"] = "Check-Valid-Until"
        for option in bracket.split():
            key, _, value = option.partition("=")
            if key in names:
                options.append(f"{names[key]}: {value.replace(',', ' ')}")
    words = rest.split()
    if len(words) >= 2:
        yield Source(words[0], (words[1],), tuple(options))


def main(arguments: Sequence[str]) -> int:
    """Runs `debian.py install PACKAGE...`."""
    if len(arguments) < 2 or arguments[0] != "install":
        print(f"usage: {Path(__file__).name} install PACKAGE...", file=sys.stderr)
        return 2
    packages = arguments[1:]
    if not is_debian():
        print(f"not a Debian system: see to it that the likes of these are installed: {' '.join(packages)}")
        return 0
    try:
        install(packages)
    except DebianError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
