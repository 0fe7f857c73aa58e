"""The path policy: which files names in images may refer to."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from blkloom.errors import BackingError
from blkloom.image.path_policy import PathPolicy, Reached


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    inside = tmp_path / "images"
    (inside / "below").mkdir(parents=True)
    (tmp_path / "images-of-others").mkdir()
    for path in ("images/base", "images/below/base", "images-of-others/base", "elsewhere"):
        (tmp_path / path).write_bytes(b"x")
    return inside


def reach(folder: Path, name: bytes | Path, *allowed: Path) -> str:
    gate = PathPolicy.of_image(str(folder / "disk"), [str(path) for path in allowed])
    raw = name if isinstance(name, bytes) else os.fsencode(name)
    return gate.reach(raw, named_by=str(folder / "disk"), what="backing file").path


@pytest.mark.parametrize("name", [b"base", b"./base", b"below/base", b"below/../base"])
def test_names_below_the_images_own_directory_lead_there(folder: Path, name: bytes) -> None:
    assert reach(folder, name) == os.path.realpath(folder / name.decode())


def test_an_absolute_name_below_the_directory_is_as_good(folder: Path) -> None:
    assert reach(folder, folder / "base") == str(folder / "base")


@pytest.mark.parametrize(
    "name", [b"../elsewhere", b"../images-of-others/base", b"/etc/passwd", b"below/../../elsewhere"]
)
def test_names_outside_are_refused_and_the_error_says_how_to_allow_them(folder: Path, name: bytes) -> None:
    with pytest.raises(BackingError) as refused:
        reach(folder, name)
    real = os.path.realpath(folder / name.decode())
    assert f"allow_backing={os.path.dirname(real)}" in str(refused.value)
    assert real in str(refused.value)


def test_an_allowed_directory_or_file_is_reached(folder: Path) -> None:
    others = folder.parent / "images-of-others"
    assert reach(folder, others / "base", others) == str(others / "base")
    assert reach(folder, others / "base", others / "base") == str(others / "base")
    with pytest.raises(BackingError, match="outside"):
        reach(folder, folder.parent / "elsewhere", others)


def test_a_link_counts_where_it_leads(folder: Path) -> None:
    (folder / "link").symlink_to("../elsewhere")
    (folder / "good").symlink_to("below/base")
    with pytest.raises(BackingError, match="outside"):
        reach(folder, b"link")
    assert reach(folder, b"good") == str(folder / "below" / "base")


def test_the_image_may_be_named_by_a_link_and_its_own_directory_counts(folder: Path) -> None:
    (folder / "disk").write_bytes(b"")
    link = folder.parent / "link"
    link.symlink_to(folder / "disk")
    gate = PathPolicy.of_image(str(link))
    reached = gate.reach(os.fsencode(folder / "base"), named_by=str(link), what="backing file")
    assert reached.path == str(folder / "base")


def test_a_relative_name_begins_beside_the_name_of_the_image_and_what_it_leads_to_is_judged(folder: Path) -> None:
    outer = folder.parent
    (outer / "disk").symlink_to(folder / "disk")
    (outer / "base").write_bytes(b"x")
    named_by = str(outer / "disk")
    with pytest.raises(BackingError, match=f"is {outer / 'base'}, outside .*allow_backing={outer} "):
        PathPolicy.of_image(named_by).reach(b"base", named_by=named_by, what="backing file")
    allowed = PathPolicy.of_image(named_by, [str(outer)])
    assert allowed.reach(b"base", named_by=named_by, what="backing file") == Reached(
        str(outer / "base"), str(outer / "base")
    )
    (outer / "base").unlink()
    with pytest.raises(BackingError, match=f"looked for at '{outer / 'base'}'.*beside the name"):
        allowed.reach(b"base", named_by=named_by, what="backing file")
    (outer / "base").symlink_to(folder / "below" / "base")
    assert PathPolicy.of_image(named_by).reach(b"base", named_by=named_by, what="backing file") == Reached(
        str(folder / "below" / "base"), str(outer / "base")
    ), "names in that file begin beside the link"


def test_what_is_said_of_a_relative_data_file_is_where_it_was_looked_for(folder: Path) -> None:
    with pytest.raises(BackingError) as refused:
        PathPolicy.of_image(str(folder / "disk")).reach(b"data", named_by=str(folder / "disk"), what="data file")
    assert f"'data' was looked for at '{folder / 'data'}'" in str(refused.value)
    assert "QEMU looks in its working directory" in refused.value.cure


@pytest.mark.parametrize(
    "name", [b'json:{"driver":"file","filename":"base"}', b"nbd:unix:/x", b"nbd://h/x", b"file:base", b"base:1", b":"]
)
def test_protocols_are_not_followed(folder: Path, name: bytes) -> None:
    with pytest.raises(BackingError, match="protocol"):
        reach(folder, name, Path("/"))


@pytest.mark.parametrize("name", [b"", b"\0", b"base\0", b"base\0.qcow2"])
def test_what_is_no_path_is_refused(folder: Path, name: bytes) -> None:
    with pytest.raises(BackingError, match="no path"):
        reach(folder, name)


@pytest.mark.parametrize("name", [b"nothing", b"base/x", b"x" * 1000, b"\xff\xfe"])
def test_what_is_not_there_is_named_with_the_reason(folder: Path, name: bytes) -> None:
    with pytest.raises(BackingError, match=r"No such file|Not a directory|too long"):
        reach(folder, name)


def test_directories_pipes_and_character_devices_are_refused(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    for name, allowed in ((b"below", folder), (b"pipe", folder), (b"/dev/zero", Path("/"))):
        with pytest.raises(BackingError, match="neither a regular file nor a block device"):
            reach(folder, name, allowed)


@pytest.mark.parametrize("name", [b"/dev/null", b"/proc/1/status", b"/proc/self/maps", b"/sys/kernel/mm"])
def test_nothing_is_advised_that_would_be_refused_again(folder: Path, name: bytes) -> None:
    """Neither /dev for a device nor /proc/PID for a file of the kernel's."""
    for allowed in ([], [Path("/")]):
        with pytest.raises(BackingError) as caught:
            reach(folder, name, *allowed)
        assert "allow_backing" not in str(caught.value)
        assert caught.value.cure


def test_who_follows_the_advice_reaches_the_file(folder: Path) -> None:
    elsewhere = folder.parent / "else where"
    elsewhere.mkdir()
    (elsewhere / "base").write_bytes(bytes(512))
    with pytest.raises(BackingError, match=r"--allow-backing '(.*)'\) allows it") as caught:
        reach(folder, os.fsencode(elsewhere / "base"))
    (advised,) = re.findall("--allow-backing '(.*)'", caught.value.cure)
    assert reach(folder, os.fsencode(elsewhere / "base"), Path(advised)) is not None


def test_a_circle_of_links_ends_in_an_error(folder: Path) -> None:
    (folder / "a").symlink_to("b")
    (folder / "b").symlink_to("a")
    with pytest.raises(BackingError, match="symbolic links"):
        reach(folder, b"a")


def test_of_a_block_device_elsewhere_nothing_but_that_is_offered(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = folder.parent / "elsewhere"
    monkeypatch.setattr("blkloom.image.path_policy.stat.S_ISBLK", lambda mode: True)
    with pytest.raises(BackingError, match=f"allow_backing={elsewhere} "):
        reach(folder, elsewhere)
    assert reach(folder, elsewhere, elsewhere) == str(elsewhere)
