"""Device files: the text is a table and lines of options; what is written is read back as the same; errors name the
place.
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blkloom.boot.description import (
    AttachOptions,
    CreateOptions,
    Description,
    ExportOptions,
    LoopOptions,
    format,
    parse,
)
from blkloom.errors import TableError
from blkloom.table import parse_table
from blkloom.targets.registry import builtin_targets

TARGETS = builtin_targets()


def read(text: str) -> Description:
    return parse(text, targets=TARGETS, source="disk.table")


def table(text: str = "0 8 zero") -> Description:
    return Description(table=parse_table(text, targets=TARGETS))


WORDS = st.text(st.characters(exclude_characters="\0\n", exclude_categories=["Cs"]), min_size=1, max_size=20)
FLAGS = st.booleans()
NUMBERS = st.none() | st.integers(0, 1 << 31)
FILES = st.builds(
    ExportOptions,
    fuse=st.just(True),
    path=st.just("") | WORDS.map(lambda word: f"/{word}"),
    fuse_uring=FLAGS,
    allow_other=FLAGS,
    uid=NUMBERS,
    gid=NUMBERS,
    mode=st.none() | st.integers(0, 0o777),
    read_only=FLAGS,
    shared=FLAGS,
)
OCTALS = st.none() | st.integers(0, 0o777)
MACHINES = st.builds(
    ExportOptions,
    vhost_user=st.just(True),
    path=st.just("") | WORDS.map(lambda word: f"/{word}"),
    socket_mode=OCTALS,
    socket_owner=NUMBERS,
    socket_group=NUMBERS,
    read_only=FLAGS,
)
SOCKETS = st.builds(
    ExportOptions,
    socket=WORDS,
    socket_mode=OCTALS,
    socket_group=NUMBERS,
    name=st.just("") | WORDS,
    allow_remote=FLAGS,
    read_only=FLAGS,
    shared=FLAGS,
) | st.builds(ExportOptions, listen=WORDS, name=st.just("") | WORDS, allow_remote=FLAGS)
DESCRIPTIONS = st.builds(
    Description,
    table=WORDS.map(lambda path: table(f"0 8 zero\n8 8 loop {escape(path)} 512").table),
    fault=st.sampled_from(("", "slow 10ms --reads", "bad-blocks 8 100-107")),
    create=st.builds(
        CreateOptions,
        uuid=st.just("") | WORDS,
        read_only=FLAGS,
        shared=FLAGS,
        autoclear=FLAGS,
        mode=st.none() | st.integers(0, 0o777),
        uid=st.none() | st.integers(0, 1 << 32),
        gid=st.none() | st.integers(0, 1 << 32),
        no_scan=FLAGS,
    ),
    attach=st.none()
    | st.builds(
        AttachOptions,
        via=WORDS,
        read_only=FLAGS,
        partscan=FLAGS,
        shared=FLAGS,
        on_failure=st.just("") | WORDS,
        timeout=st.none() | st.integers(1, 3600),
        connections=st.none() | st.integers(1, 8),
    ),
    exports=st.lists(FILES | MACHINES | SOCKETS, max_size=4).map(tuple),
    loop=st.none() | st.builds(LoopOptions, sizelimit=st.integers(0, 1 << 40), partscan=FLAGS, shared=FLAGS),
)


def escape(word: str) -> str:
    return "".join(f"\\{character}" for character in word)


@given(DESCRIPTIONS, st.lists(WORDS.map(lambda word: word.replace("\r", "")), max_size=2))
def test_what_is_written_is_read_back(description: Description, comments: list[str]) -> None:
    assert read(format(description, comments=comments)) == description


def test_a_table_alone_is_a_description() -> None:
    assert read("# a disk\n\n0 8 zero # all of it\n") == table()


def test_options_are_those_of_the_commands() -> None:
    found = read(
        "create --read-only --uuid 'A'\n"
        "  attach --via=loop --partscan   # a node\n"
        "export --listen localhost:10809 --name d\n"
        "export --listen 0.0.0.0:10809 --tls require --tls-certificates /etc/pki/disk --tls-verify-peer"
        " --allow-certificate laptop --allow-certificate=CN=my\\ desk,O=Example --read-only-for=certificate=laptop"
        " --max-connections-per-peer 4\n"
        "export --fuse /srv/my\\ disk --mode 640 --gid 6\n"
        "0 8 zero\n"
    )
    assert found.create == CreateOptions(read_only=True, uuid="'A'")
    assert found.attach == AttachOptions(via="loop", partscan=True)
    assert found.exports == (
        ExportOptions(listen="localhost:10809", name="d"),
        ExportOptions(
            listen="0.0.0.0:10809",
            tls="require",
            tls_certificates="/etc/pki/disk",
            tls_verify_peer=True,
            allow_certificate=("laptop", "CN=my desk,O=Example"),
            read_only_for=("certificate=laptop",),
            max_connections_per_peer=4,
        ),
        ExportOptions(fuse=True, path="/srv/my disk", mode=0o640, gid=6),
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("0 8 zero\nmount\n", "disk.table:2:1: neither a line of a table nor of options: 'mount'"),
        ("attach --vai loop\n0 8 zero", "disk.table:1:8: no option of attach: '--vai'"),
        ("attach loop\n0 8 zero", "disk.table:1:8: no option of attach: 'loop'"),
        ("attach --via\n0 8 zero", "disk.table:1:8: the value is missing: '--via'"),
        ("attach --partscan=yes\n0 8 zero", "disk.table:1:8: an option without a value has one"),
        ("attach\nattach\n0 8 zero", "disk.table:2:1: a second line of the same command: 'attach'"),
        ("create --uuid a --uuid b\n0 8 zero", "disk.table:1:24: given twice: 'b'"),
        ("create --uuid=\n0 8 zero", "disk.table:1:8: an empty value"),
        ("export\n0 8 zero", "an export without an address"),
        ("export --fuse --listen a:1\n0 8 zero", "disk.table:1:8: options of a file and of an NBD export"),
        ("export --mode 640 --socket /s\n0 8 zero", "disk.table:1:8: these options are of a file"),
        ("export --vhost-user --name n\n0 8 zero", "options of --vhost-user and of another export"),
        ("export --listen a:1 --socket-mode 660\n0 8 zero", "these options are of a Unix socket"),
        ("export /srv/vm.sock\n0 8 zero", "a path without a kind of export"),
        ("export --fuse --mode 888\n0 8 zero", "disk.table:1:22: --mode is no number: '888'"),
        ("export --fuse --uid x\n0 8 zero", "--uid is no number: 'x'"),
        ("attach\n\n0 8 nothing\n", "disk.table:3:5"),
        ("create\n", "disk.table"),
        ("", "disk.table"),
    ],
)
def test_an_error_names_the_place_and_the_word(text: str, says: str) -> None:
    with pytest.raises(TableError) as raised:
        read(text)
    assert says in str(raised.value)
