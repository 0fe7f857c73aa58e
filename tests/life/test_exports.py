"""Additional exports of a device: Unix sockets and TCP, writable or read-only, and their removal."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from blkloom.control.client import Client
from blkloom.control.states import ExportState
from blkloom.errors import ListenError, UsageError
from blkloom.metrics.addresses import uri_of
from conformance.nbd_client import READ, READ_ONLY, WRITE, NbdClient, Style

from .conftest import Life, info, read, until

DATA = bytes(range(256)) * 2
pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("disk")]


@pytest.fixture
def life(shared: Life) -> Life:
    """The module's."""
    return shared


@pytest.fixture
def disk(client: Client, file: Path) -> None:
    """A device of that name on the file."""
    client.create("disk", table=f"0 16 linear {file} 0")


def over_tcp(export: ExportState, name: str = "") -> NbdClient:
    connected = socket.create_connection((export.host, export.port), 60)
    return NbdClient(connected, name, Style.EXTENDED)


def test_a_device_is_exported_over_tcp_read_only(client: Client, file: Path) -> None:
    export = client.export("disk", host="127.0.0.1", name="public", read_only=True)
    assert export in info(client, "disk").exports
    with closing(over_tcp(export, "public")) as nbd:
        assert nbd.flags & READ_ONLY
        assert read(nbd) == b"f" * 512
        assert nbd.ask(WRITE, 0, payload=DATA).error == errno.EPERM
    assert file.read_bytes() == b"f" * 8192
    client.unexport("disk", export.id)
    with pytest.raises(ConnectionRefusedError):
        over_tcp(export)
    assert len(info(client, "disk").exports) == 1


def test_a_port_alone_is_exported_on_localhost(client: Client) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    export = client.export("disk", port=port)
    assert (export.host, export.port) in (("127.0.0.1", port), ("::1", port))


def test_an_export_that_other_hosts_reach_must_be_allowed(client: Client) -> None:
    with pytest.raises(UsageError, match=r"other hosts can reach 0\.0\.0\.0, .* confirm it with --allow-remote"):
        client.export("disk", host="0.0.0.0")
    assert len(info(client, "disk").exports) == 1
    export = client.export("disk", host="0.0.0.0", allow_remote=True)
    with closing(over_tcp(export)) as nbd:
        assert read(nbd) == b"f" * 512
    assert urlsplit(uri_of(export)).hostname not in ("localhost", "0.0.0.0")


def test_taking_an_export_away_disconnects_its_clients_and_no_others(life: Life, client: Client) -> None:
    export = client.export("disk", host="127.0.0.1")
    with closing(over_tcp(export)) as gone, closing(NbdClient.unix(life.socket("disk"))) as staying:
        client.unexport("disk", export.id)
        with pytest.raises(ConnectionError):
            gone.ask(READ, 0, 512)
        assert read(staying) == b"f" * 512


def test_a_socket_of_ones_own_is_for_its_owner_alone_and_goes_by_its_path(client: Client, tmp_path: Path) -> None:
    path = tmp_path / "own.sock"
    export = client.export("disk", unix=str(path))
    assert (export.unix, path.stat().st_mode & 0o777) == (str(path), 0o600)
    with closing(NbdClient.unix(path, "disk")) as nbd:
        assert nbd.ask(WRITE, 0, payload=DATA).error == 0
    client.unexport("disk", str(path))
    assert not path.exists()


def test_the_automatic_socket_is_taken_away_and_had_again(life: Life, client: Client) -> None:
    client.unexport("disk", "auto")
    assert not life.socket("disk").exists()
    assert info(client, "disk").exports == []
    client.export("disk", read_only=True)
    with closing(NbdClient.unix(life.socket("disk"))) as nbd:
        assert nbd.flags & READ_ONLY
    with pytest.raises(UsageError, match=f"device 'disk' is exported at {life.socket('disk')} already"):
        client.export("disk")


def test_exports_outlive_the_worker_and_keep_their_addresses(client: Client, tmp_path: Path) -> None:
    over = client.export("disk", host="127.0.0.1", name="public")
    client.export("disk", unix=str(tmp_path / "own.sock"))
    before = info(client, "disk")
    os.kill(before.worker, signal.SIGKILL)
    after = until(client, "disk", lambda found: found.worker not in (0, before.worker))
    assert after.exports == before.exports
    for nbd in (over_tcp(over, "public"), NbdClient.unix(tmp_path / "own.sock")):
        assert read(nbd) == b"f" * 512
        nbd.close()


def test_an_export_keeps_the_name_its_clients_know_when_the_device_is_renamed(client: Client) -> None:
    export = client.export("disk", host="127.0.0.1")
    client.rename("disk", name="renamed")
    assert export in info(client, "renamed").exports
    with closing(over_tcp(export, "disk")) as nbd:
        assert read(nbd) == b"f" * 512


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ({"unix": "relative.sock"}, "relative.sock: the path of a socket must be absolute"),
        ({"unix": "/a", "host": "localhost"}, "on a Unix socket or on TCP, not on both"),
    ],
)
def test_an_export_that_is_none_is_refused(client: Client, call: dict[str, str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        client.export("disk", **call)
    assert len(info(client, "disk").exports) == 1


def test_where_another_listens_no_export_is_made_and_nothing_of_his_removed(client: Client, tmp_path: Path) -> None:
    path = tmp_path / "taken.sock"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        with pytest.raises(ListenError, match="another server listens there"):
            client.export("disk", unix=str(path))
        assert path.is_socket()
    with socket.create_server(("127.0.0.1", 0)) as other, pytest.raises(ListenError) as caught:
        client.export("disk", host="127.0.0.1", port=other.getsockname()[1])
    assert caught.value.errno == errno.EADDRINUSE
    (tmp_path / "file").write_bytes(b"precious")
    with pytest.raises(ListenError, match="exists and is not a socket"):
        client.export("disk", unix=str(tmp_path / "file"))
    assert (tmp_path / "file").read_bytes() == b"precious"
    assert len(info(client, "disk").exports) == 1


def test_an_export_that_is_not_there_cannot_be_taken_away_and_those_there_are_named(client: Client) -> None:
    with pytest.raises(UsageError, match=r"device 'disk' has no export 'e9'; it has: auto \(.*disk\)"):
        client.unexport("disk", "e9")


def test_exports_of_all_devices_are_listed_if_no_device_is_named(life: Life, client: Client, blkloom: str) -> None:
    def listed(*words: str) -> list[str]:
        command = [blkloom, "--run-dir", str(life.run_dir), "export", "--list", *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.splitlines()

    client.create("b", table="0 8 zero")
    public = client.export("disk", host="127.0.0.1", name="public")
    automatic = {name: uri_of(info(client, name).exports[0]) for name in ("b", "disk")}
    of_disk = [f"auto\t{automatic['disk']}", f"e1\t{uri_of(public)}"]
    assert listed("disk") == of_disk
    assert listed() == [f"b: auto\t{automatic['b']}", *(f"disk: {line}" for line in of_disk)]
