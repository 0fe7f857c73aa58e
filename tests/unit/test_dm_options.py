"""Command lines, parsed as getopt_long parses dmsetup's."""

from __future__ import annotations

import pytest

from blkloom.cli.verbs import verb_first
from blkloom.dm.failing import NotACommandLine
from blkloom.dm.options import Words, read_words

GROUP = {"--run-dir": True, "-q": False, "--quiet": False, "-v": False, "--version": False}


@pytest.mark.parametrize(
    ("line", "options", "operands"),
    [
        ("one --table t two", ["--table=t"], ["one", "two"]),
        ("-u id -r one", ["--uuid=id", "--readonly"], ["one"]),
        ("-rfuid one", ["--readonly", "--force", "--uuid=id"], ["one"]),
        ("-Cofoo", ["--columns", "--options=foo"], []),
        ("--notab", ["--notable"], []),
        ("--table=x=y", ["--table=x=y"], []),
        ("--tab", None, []),
        ("a -- -r --force", [], ["a", "-r", "--force"]),
        ("a - b", [], ["a", "-", "b"]),
        ("-o -x", ["--options=-x"], []),
    ],
)
def test_options_stand_anywhere_and_may_be_short(line: str, options: list[str] | None, operands: list[str]) -> None:
    if options is None:
        with pytest.raises(NotACommandLine, match="requires an argument"):
            read_words(line.split())
    else:
        assert read_words(line.split()) == Words(options, operands)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("--nonsense", "unrecognized option '--nonsense'"),
        ("--no", "option '--no' is ambiguous; possibilities: '--noflush' '--noheadings'"),
        ("-x", "invalid option -- 'x'"),
        ("-u", "option requires an argument -- 'u'"),
        ("--force=1", "option '--force' doesn't allow an argument"),
    ],
)
def test_what_is_no_option_is_refused_with_getopts_words(line: str, complaint: str) -> None:
    with pytest.raises(NotACommandLine) as caught:
        read_words(line.split())
    assert f"blkloom: {complaint}" in caught.value.lines[0]
    assert caught.value.text().splitlines()[-1] == "Couldn't process command line."


def test_a_verb_has_options_of_its_own() -> None:
    assert read_words(["--timeout", "3", "--js"], {"timeout": True, "json": False}).options == ["--timeout=3", "--json"]


def test_what_is_short_for_an_option_of_dmsetups_stays_so() -> None:
    assert read_words(["--sh"], {"shared": False}).options == ["--showkeys"]


@pytest.mark.parametrize(
    ("line", "ordered"),
    [
        ("-r create x", "create -r x"),
        ("-u id table", "table -u id"),
        ("-uid table", "table -uid"),
        ("--uuid id table", "table --uuid id"),
        ("--uu id table", "table --uu id"),
        ("--uuid=id table", "table --uuid=id"),
        ("--run-dir d -c info", "--run-dir d info -c"),
        ("--run-dir=d -c info", "--run-dir=d info -c"),
        ("-q -v table a", "-q table -v a"),
        ("-v serve x", "-v serve x"),
        ("--noudevsync --noudevrules create x", "create --noudevsync --noudevrules x"),
        ("--version", "--version"),
        ("create -r x", "create -r x"),
    ],
)
def test_options_before_a_verb_of_dmsetups_go_behind_it(line: str, ordered: str) -> None:
    assert verb_first(line.split(), GROUP) == ordered.split()
