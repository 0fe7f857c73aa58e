"""`blkloom info`: the state of devices, for people, for scripts and as JSON."""

from __future__ import annotations

import json

import click
import msgspec

from blkloom.cli.dm_verb import MANY, verb
from blkloom.cli.session import Session
from blkloom.dm.failing import NotACommandLine
from blkloom.dm.fields import DEFAULT
from blkloom.dm.report import HELP, Layout, lay_out, list_fields, read_fields, sort_rows
from blkloom.dm.selecting import parse_selection
from blkloom.dm.showing import info_lines

_HEADINGS = {"none": 0, "0": 0, "abbrev": 1, "1": 1, "full": 2, "2": 2}


@verb("[DEVICE...]", selectors=MANY)
@click.option("-c", "-C", "--columns", is_flag=True, help="Columns instead of lines.")
@click.option("-o", "--options", metavar="FIELDS", help="Columns to print; +FIELDS adds columns; `help` lists them.")
@click.option("-O", "--sort", metavar="FIELDS", help="Sort by these fields; -FIELD sorts in descending order.")
@click.option("--noheadings", is_flag=True, help="No headings, and : between columns.")
@click.option("--headings", metavar="HOW", help="none, abbrev or full.")
@click.option("--separator", metavar="TEXT", help="Separator between columns, which are then not aligned.")
@click.option("--nameprefixes", is_flag=True, help="Print shell assignments: DM_NAME='disk'.")
@click.option("--unquoted", is_flag=True, help="No quotes around the values of --nameprefixes.")
@click.option("--rows", is_flag=True, help="Columns as rows.")
@click.option("--unbuffered", is_flag=True, help="Do not widen columns to fit their contents.", hidden=True)
@click.option("--inactive", is_flag=True, hidden=True)
@click.option("--json", "as_json", is_flag=True, help="Print the full state as JSON.")
def info(
    session: Session,
    operands: tuple[str, ...],
    columns: bool,
    options: str | None,
    sort: str | None,
    noheadings: bool,
    headings: str | None,
    separator: str | None,
    nameprefixes: bool,
    unquoted: bool,
    rows: bool,
    unbuffered: bool,
    inactive: bool,
    as_json: bool,
) -> None:
    """Print the state of devices (of all, without DEVICE).

    \b
    blkloom info disk
    blkloom info -c -o name,size,clients,socket
    blkloom info -c --noheadings -o name -S 'open=0'
    blkloom info --json disk
    """
    if as_json:
        infos = session.everything() if not operands and session.several(operands) else list(session.found(operands))
        click.echo(json.dumps([msgspec.to_builtins(info) for info in infos], indent=2))
        return
    if not columns and session.select is None:
        for found in session.found(operands):
            click.echo("\n".join(info_lines(found, session.show(found.name))))
        return
    if options in HELP:
        click.echo("\n".join(list_fields()))
        return
    fields = read_fields(options or DEFAULT)
    layout = Layout(
        separator=separator if separator is not None else ":" if noheadings else " ",
        aligned=separator is None and not noheadings and not nameprefixes,
        headings=_headings(noheadings, headings),
        prefixes=nameprefixes,
        quoted=not unquoted,
        as_rows=rows,
    )
    if session.select is not None:
        parse_selection(session.select)  # an invalid selection is an error before the supervisor is asked
    chosen = session.rows(list(session.found(operands)))
    for line in lay_out(sort_rows(chosen, sort or ""), fields, layout):
        click.echo(line)


def _headings(noheadings: bool, given: str | None) -> int:
    if given is None:
        return 0 if noheadings else 1
    if noheadings:
        raise NotACommandLine("Only one of --headings and --noheadings permitted.")
    if given.lower() not in _HEADINGS:
        raise NotACommandLine("Unknown headings type.", what="none, abbrev or full")
    return _HEADINGS[given.lower()]
