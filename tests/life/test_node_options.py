"""dmsetup's options for nodes: made at create or resume, with an owner and permissions that last."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
from pathlib import Path

import pytest

from blkloom.control.client import Client
from blkloom.control.states import NodeOptions
from blkloom.errors import UsageError
from partition_images import mbr

from .attached import disk, life, said
from .conftest import Life, info, until

__all__ = ["disk", "life"]
pytestmark = pytest.mark.timeout(120)


def node_of(client: Client, name: str = "disk") -> str:
    """The path of its node; "" without one."""
    node = info(client, name).node
    return node.path if node else ""


def permissions(path: str) -> tuple[int, int, int]:
    """Owner, group and permission bits."""
    status = os.stat(path)
    return status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)


def test_the_node_is_made_when_create_or_resume_returns(blkloom: str, life: Life, client: Client) -> None:
    for option in ("--addnodeoncreate", "--addnodeonresume"):
        assert said(blkloom, life, "create", "disk", option, "--table", "0 2048 ram") == ""
        assert Path(node_of(client)).exists()
        said(blkloom, life, "remove", "disk")
    said(blkloom, life, "create", "disk", "--notable", "--addnodeonresume")
    life.kill()
    life.start()
    with life.client() as again:
        assert node_of(again) == ""
        said(blkloom, life, "load", "disk", "--table", "0 2048 ram")
        assert node_of(again) == ""
        said(blkloom, life, "resume", "disk")
        assert Path(node_of(again)).exists()
        again.detach("disk")
        for options, made in (([], False), (["--addnodeoncreate"], False), (["--addnodeonresume"], True)):
            said(blkloom, life, "resume", "disk", *options)
            assert bool(node_of(again)) is made
        said(blkloom, life, "resume", "disk", "--addnodeonresume")
        again.remove("disk")


def test_a_device_without_a_table_has_no_node(blkloom: str, life: Life, client: Client) -> None:
    words = ["create", "disk", "--notable", "--addnodeoncreate"]
    done = subprocess.run([blkloom, "--run-dir", life.run_dir, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "--addnodeonresume makes the node at the next resume" in done.stderr
    client.create("disk")
    with pytest.raises(UsageError, match="has no table, and a node needs a size"):
        client.attach("disk")
    client.remove("disk")


def test_owner_and_permissions_last(blkloom: str, life: Life, client: Client, tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(mbr((0, 0x83, 64, 64)) + bytes(1 << 20))
    table = f"0 2048 loop {path}"
    said(blkloom, life, "create", "disk", "--table", table, "-M", "640", "-U", "12", "-G", "34", "--attach", "-P")
    mine = (12, 34, 0o640)
    node = node_of(client)
    assert [permissions(node), permissions(f"{node}p1")] == [mine, mine]
    client.detach("disk")
    usual = permissions(node)
    assert usual != mine
    assert permissions(client.attach("disk", via="loop").node.path) == mine
    client.rename("disk", name="other")
    (record,) = (life.run_dir / "kernel" / "properties").iterdir()
    assert (record.name, record.read_text()) == ("other", "BLKLOOM_MODE=0640\nBLKLOOM_UID=12\nBLKLOOM_GID=34\n")
    former = node_of(client, "other")
    worker = until(client, "other", lambda found: found.worker != 0).worker
    life.kill()
    with open(former, "rb"):  # so that the next node has another number
        os.kill(worker, signal.SIGKILL)
        life.start()
        with life.client() as again:
            until(again, "other", lambda found: found.node is not None and found.node.path not in ("", former))
    with life.client() as again:
        until(again, "other", lambda found: found.node is not None and found.node.former is not None)
        assert permissions(node_of(again, "other")) == mine
        assert permissions(former) == usual
        last = node_of(again, "other")
        again.remove("other")
    assert permissions(last) == usual


def test_a_file_has_the_given_permissions(client: Client) -> None:
    client.create("disk", table="0 2048 ram", node=NodeOptions(mode=0o640, uid=12, gid=34))
    assert permissions(client.attach("disk", via="fuse").node.path) == (12, 34, 0o640)
    client.remove("disk")


def test_mknodes_removes_names_that_lead_nowhere(blkloom: str, client: Client, disk: str, life: Life) -> None:
    node = client.attach(disk, via="loop").node
    links = Path(node.link).parent
    for name in ("other", "disk-part1"):
        (links / name).symlink_to("/dev/null")
    said(blkloom, life, "mknodes")
    assert sorted(link.name for link in links.iterdir()) == ["disk", "disk-part1"]
    (links / "disk-part1").unlink()
    client.detach(disk)
    Path(node.link).symlink_to(node.path)
    said(blkloom, life, "mknodes", disk)
    assert list(links.iterdir()) == []
    for name in ("other", "third"):
        (links / name).symlink_to("/dev/null")
    said(blkloom, life, "mknodes", "other")
    assert [link.name for link in links.iterdir()] == ["third"]
    (links / "third").unlink()


def test_partitions_are_not_scanned_where_nothing_is_to_be_scanned(client: Client) -> None:
    client.create("disk", table="0 2048 ram", node=NodeOptions(scan=False))
    with pytest.raises(UsageError, match="--partscan is a scan of the node; leave --no-scan out"):
        client.attach("disk", partitions=True)
    client.attach("disk")
    client.remove("disk")


def test_save_and_restore_keep_the_options_of_nodes(blkloom: str, life: Life, client: Client, tmp_path: Path) -> None:
    for name in ("shared", "quiet", "file", "loop"):
        (tmp_path / name).write_bytes(mbr((0, 0x83, 64, 64)) + bytes(1 << 20))
    permitted = ("-M", "640", "-U", "12", "-G", "34")
    for line in (
        ["create", "shared", "--table", f"0 2048 loop {tmp_path}/shared", *permitted],
        ["create", "quiet", "--table", f"0 2048 loop {tmp_path}/quiet", "--no-scan"],
        ["create", "file", "--table", f"0 2048 loop {tmp_path}/file", *permitted],
        ["attach", "shared", "--via", "loop", "-P", "--shared"],
        ["attach", "quiet", "--via", "loop", "--read-only"],
        ["attach", "file", "--via", "fuse"],
        ["loop", "--name", "other", "-f", "--autoclear", "--no-scan", str(tmp_path / "loop")],
        ["save", "--directory", str(tmp_path / "saved")],
    ):
        said(blkloom, life, *line)
    before = _what_is_saved(client)
    assert [found["permissions"] for found in before[:3:2]] == [(12, 34, 0o640)] * 2
    client.close()
    life.stop()
    life.start()
    said(blkloom, life, "restore", "--directory", str(tmp_path / "saved"))
    with life.client() as again:
        assert _what_is_saved(again) == before
    again_saved = said(blkloom, life, "save", "--directory", str(tmp_path / "saved")).splitlines()
    assert [line.rpartition(": ")[2] for line in again_saved] == ["unchanged"] * 4


def _what_is_saved(client: Client) -> list[dict[str, object]]:
    """What `save` writes of the nodes of all devices, and what the nodes have, by name of the device."""
    found = []
    for one in sorted(client.info(), key=lambda one: ["shared", "quiet", "file", "other"].index(one.name)):
        node = one.node
        assert node is not None
        found.append(
            {
                "options": one.node_options,
                "node": (node.via, node.read_only, node.partitions, node.exclusive, Path(node.link).exists()),
                "device": (one.name, one.autoclear, one.loop),
                "permissions": permissions(node.path) if one.node_options.has_permissions else None,
            }
        )
    return found
