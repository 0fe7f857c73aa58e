"""Completion of tables for shells: targets, paths and options, from the arguments that specs declare."""

import os
import subprocess
from pathlib import Path

import click
import pytest

from blkloom.cli.table_completion import complete_table, complete_targets


def completed(text: str) -> list[str]:
    command = click.Command("any")
    parameter = click.Option(["--table"])
    return [item.value for item in complete_table(click.Context(command), parameter, text)]


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "disk.img").touch()
    (tmp_path / "disk 2.img").touch()
    (tmp_path / "dir").mkdir()
    (tmp_path / "dir" / "inner").touch()
    (tmp_path / ".hidden").touch()


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", []),
        ("0 8", []),
        ("0 8 l", ["0 8 linear", "0 8 log-writes", "0 8 loop"]),
        ("0 8 loop disk", ["0 8 loop disk\\ 2.img", "0 8 loop disk.img"]),
        ("0 8 loop disk\\ ", ["0 8 loop disk\\ 2.img"]),
        ("0 8 linear d", ["0 8 linear dir/", "0 8 linear disk\\ 2.img", "0 8 linear disk.img"]),
        ("0 8 qcow2 dir/", ["0 8 qcow2 dir/inner"]),
        ("0 8 loop .", ["0 8 loop .hidden"]),
        ("0 8 loop nowhere/x", []),
        ("0 8 loop disk.img ", []),
        ("0 8 loop disk.img 0 ", []),
        ("0 8 loop disk.img 0 1 read", ["0 8 loop disk.img 0 1 read_only", "0 8 loop disk.img 0 1 read_only=auto"]),
        ("0 8 ram 2 ", ["0 8 ram 2 huge_pages", "0 8 ram 2 preallocate"]),
        ("0 8 ram 2 huge_pages ", ["0 8 ram 2 huge_pages preallocate"]),
        ("0 8 qcow2 a 2 cache=1M ca", []),
        ("0 8 qcow2 a 1 ca", ["0 8 qcow2 a 1 cache="]),
        ("0 8 qcow2 a 2 allow_backing=/x allow", ["0 8 qcow2 a 2 allow_backing=/x allow_backing="]),
        ("0 8 zero ", []),
        ("0 8 striped ", []),
        ("0 8 nothing ", []),
        ("0 8 zero\n8 8 l", []),
    ],
)
def test_the_next_word_of_a_table(text: str, wanted: list[str]) -> None:
    assert completed(text) == wanted


def test_names_of_targets() -> None:
    found = complete_targets(click.Context(click.Command("any")), click.Option(["--any"]), "st")
    assert [item.value for item in found] == ["striped"]


def test_a_shell_is_told_within_quotes(blkloom: str) -> None:
    words = "blkloom\ncreate\ndisk\n--table\n'0 8 li"
    environment = {"_BLKLOOM_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": "4"}
    done = subprocess.run(
        [blkloom], env=os.environ | environment, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.stdout == "plain,0 8 linear\n"
