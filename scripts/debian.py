"""Debian packages for the demo and the tests: what is missing, and installing it.

`debian.py install PACKAGE...` exits 0 when all are installed at the end. As root it installs what is
missing; otherwise it names what is missing, and the command that would install it, and exits 1. On a
system without dpkg it only prints what the packages are called in Debian: the tests name each
program that they then do not find.

Nothing installed is ever removed or downgraded. A machine that has some of QEMU from backports gets
the rest of QEMU from there too, since the parts conflict across versions. Backports are read through
an apt configuration of our own (see `BackportsApt`), so that the machine's sources and lists stay as
they are. The addresses of Debian's mirrors are always those that the machine's own sources name.

Runs on Python 3.11 without any package, before there is a virtual environment.
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
    """What is missing or went wrong, and what to do about it."""


def is_debian() -> bool:
    """Whether packages can be looked up and installed here."""
    return all(shutil.which(program) for program in ("dpkg-query", "apt-get"))


def missing(packages: Iterable[str]) -> list[str]:
    """Those of the packages that are not installed, in their order."""
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
    """Installs what is missing.

    Raises DebianError when there is something to install and this is not root, or apt cannot.
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
        apt = BackportsApt(Path(directory))
        apt.update()
        _install(["apt-get", *apt.options, "--target-release", apt.suite], wanted)


def _installs_cleanly(packages: Sequence[str]) -> bool:
    """Whether apt would neither refuse nor remove anything."""
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
    """An entry of apt's sources: where a suite is read from."""

    uris: str
    suites: tuple[str, ...]
    options: tuple[str, ...]
    """Further fields as deb822 lines, such as `Signed-By: PATH`."""


class BackportsApt:
    """apt with the machine's main suite and its backports, its lists and downloads in a directory of ours.

    It reads the machine's package database, so what it says about dependencies is true here. Needs
    no root, except to install.
    """

    def __init__(self, directory: Path) -> None:
        """Writes the configuration. Raises DebianError when the machine's sources do not name Debian's."""
        codename = _codename()
        main = _main_source(codename)
        self.suite = f"{codename}-backports"
        self.directory = directory
        for folder in ("sources", "lists/partial", "cache/archives/partial"):
            (directory / folder).mkdir(parents=True, exist_ok=True)
        lines = [
            "Types: deb",
            f"URIs: {main.uris}",
            f"Suites: {codename} {self.suite}",
            "Components: main",
            *main.options,
        ]
        (directory / "sources" / "backports.sources").write_text("\n".join(lines) + "\n")
        settings = {
            "Dir::Etc::SourceList": "/dev/null",
            "Dir::Etc::SourceParts": directory / "sources",
            "Dir::State::Lists": directory / "lists",
            "Dir::Cache": directory / "cache",
            # Root's downloads would otherwise be done as a user that cannot enter the directory.
            "APT::Sandbox::User": "root",
        }
        self.options = [word for key, value in settings.items() for word in ("-o", f"{key}={value}")]

    def update(self) -> None:
        """Reads the lists of packages. Raises DebianError."""
        _run(["apt-get", *self.options, *PATIENT, "update"], quiet=True)

    def field(self, package: str, name: str) -> str | None:
        """A field of the newest version in backports, or None when there is no such package."""
        shown = subprocess.run(
            ["apt-cache", *self.options, "show", "--no-all-versions", f"{package}/{self.suite}"],
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


def _codename() -> str:
    for line in OS_RELEASE.read_text().splitlines():
        key, _, value = line.partition("=")
        if key == "VERSION_CODENAME":
            return value.strip('"')
    raise DebianError(f"{OS_RELEASE} names no VERSION_CODENAME; backports are those of a Debian release")


def _main_source(codename: str) -> Source:
    for source in _machine_sources():
        if codename in source.suites:
            return source
    raise DebianError(f"no source under {APT_SOURCES} has the suite {codename!r}; add Debian's main archive to them")


def _machine_sources() -> Iterator[Source]:
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
