"""`blkloom save`, `restore`: devices in files, for the next boot."""

from __future__ import annotations

import os
from pathlib import Path

import click

from blkloom.cli.completing import complete_devices
from blkloom.cli.dm_verb import verb
from blkloom.cli.session import Session
from blkloom.dm.failing import VerbFailed
from blkloom.errors import BlkloomError
from blkloom.printing import described, printable

_directory_option = click.option(
    "--directory",
    type=click.Path(file_okay=False),
    metavar="DIR",
    help="The directory (/etc/blkloom/devices.d; for users ~/.config/blkloom/devices.d).",
)


@verb("[DEVICE...]", complete=complete_devices)
@_directory_option
def save(session: Session, operands: tuple[str, ...], directory: str | None) -> None:
    """Write devices to files, from which restore makes them again (all devices, without DEVICE).

    \b
    blkloom save disk               writes /etc/blkloom/devices.d/disk.table
    systemctl enable blkloom-devices.service

    A file has the table, with absolute paths, and the options of create, attach and export. A file that says the
    same already is not changed. The bytes of memory are not saved.
    """
    from blkloom.boot.description import format, parse
    from blkloom.boot.directory import Directory
    from blkloom.boot.saving import describe, stable_names
    from blkloom.boot.snapshots import has_memory
    from blkloom.targets.registry import all_targets

    everything = session.everything()
    infos = [session.info(session.named(text)) for text in operands] if operands else everything
    links, targets, failed = stable_names(everything), all_targets(), False
    with Directory(_path(directory), make=True) as files:
        for info in infos:
            try:
                described_device = describe(session.client, info, targets=targets, links=links)
                memory = has_memory(described_device.table)
                comments = ["Its memory is not saved: it comes back empty."] if memory else []
                text = format(described_device, comments=comments)
                if info.inactive:
                    _warn(info.name, "its inactive table is not saved, the live one is")
                if info.name in files.names():
                    try:
                        former = parse(files.read(info.name), targets=targets, source="file")
                    except (BlkloomError, OSError):
                        former = None
                    if former == described_device:
                        click.echo(f"{printable(str(files.file(info.name)))}: unchanged")
                        continue
                files.write(info.name, text)
            except (BlkloomError, OSError) as error:
                failed = True
                click.echo(f"blkloom: {printable(info.name)}: not saved: {described(error)}", err=True)
                continue
            note = ", which does not have the bytes of its memory" if memory else ""
            click.echo(f"{printable(str(files.file(info.name)))}: written{note}")
    if failed:
        raise VerbFailed()


@verb("[DEVICE...]", complete=None)
@_directory_option
def restore(session: Session, operands: tuple[str, ...], directory: str | None) -> None:
    """Make the devices that files describe, lower ones first (all files, without DEVICE).

    \b
    blkloom restore                 what blkloom-devices.service runs at boot

    A device that exists is not changed: missing exports and a missing node are added, a difference from its file
    is an error. Errors are printed, the other devices are made, and the exit status is 1.
    """
    from blkloom.boot.directory import Directory
    from blkloom.boot.restoring import Report, Restore, read_all
    from blkloom.targets.registry import all_targets

    targets = all_targets()
    try:
        with Directory(_path(directory)) as files:
            found, errors = read_all(files, [session.name(text) for text in operands], targets=targets)
            known = read_all(files, [], targets=targets)[0] if operands else found
    except FileNotFoundError:
        if directory is not None or operands:
            raise
        return  # there are no devices to make

    def report(one: Report) -> None:
        name = printable(one.name)
        if one.error:
            click.echo(f"blkloom: {name}: {one.error}", err=True)
        else:
            click.echo(f"{name}: {one.done or 'there already'}")

    for error in errors:
        report(error)
    complete = not found or Restore(session.start(), targets=targets, known=known).run(found, report)
    if errors or not complete:
        raise VerbFailed()


def _path(directory: str | None) -> Path:
    from blkloom.boot.directory import default_directory

    return default_directory(os.environ) if directory is None else Path(directory)


def _warn(name: str, what: str) -> None:
    click.echo(f"blkloom: WARNING: {printable(name)}: {what}", err=True)
