"""The target `nbd` over TLS: certificates and pre-shared keys, with nbdkit, qemu-nbd and blkloom as servers."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

import blkloom
from blkloom.errors import BackingError, TableError
from certificates import Authority, pre_shared_keys
from nbd_sources import Source

pytestmark = pytest.mark.timeout(120)

MiB = 1 << 20
SIZE = 8 * MiB
Program = Callable[[str, str], str]


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(SIZE))
    return path


def nbds(source: Source, user: str = "", **parameters: str | Path) -> str:
    query = "&".join(f"{name.replace('_', '-')}={value}" for name, value in parameters.items())
    return f"nbds+unix://{user and f'{user}@'}/?socket={source.path}&{query}"


def exercise(uri: str, *, while_open: Callable[[], None] = lambda: None) -> None:
    """Writes and reads back, in small and in large requests."""
    data = random.Random(5).randbytes(3 * MiB)
    with blkloom.open(f"0 {SIZE // 512} nbd {uri}") as device:
        device.pwrite(data, 4096)
        device.batch([("w", data[at : at + 4096], 4 * MiB + at) for at in range(0, MiB, 4096)])
        while_open()
        assert device.pread(3 * MiB, 4096) == data
        assert device.pread(MiB, 4 * MiB) == data[:MiB]
        device.flush()


def command(server: str, program: Program, blkloom_command: str, files: Path, disk: Path) -> list[str | Path]:
    if server == "blkloom":
        return [blkloom_command, "serve", disk, "--tls=require", f"--tls-certificates={files}", "--tls-verify-peer"]
    if server == "nbdkit":
        options = ["--tls=require", f"--tls-certificates={files}", "--tls-verify-peer"]
        return [program("nbdkit", "nbdkit"), "-f", *options, "file", disk]
    credentials = f"tls-creds-x509,id=t,dir={files},endpoint=server,verify-peer=yes"
    return [
        program("qemu-nbd", "qemu-utils"), "-t", "-f", "raw", "-x", "", "-e", "8",
        "--object", credentials, "--tls-creds", "t", disk,
    ]  # fmt: skip


@pytest.mark.parametrize("server", ["nbdkit", "qemu-nbd", "blkloom"])
def test_certificates(
    program: Program, blkloom: str, tmp_path: Path, disk: Path, server_files: Path, client_files: Path, server: str
) -> None:
    with Source(tmp_path, *command(server, program, blkloom, server_files, disk)) as source:
        uri = nbds(source, tls_certificates=client_files, tls_hostname="localhost")

        def restart() -> None:
            source.kill()
            source.start()

        exercise(uri, while_open=restart)


def test_pre_shared_keys(program: Program, tmp_path: Path, disk: Path) -> None:
    keys = pre_shared_keys(tmp_path / "keys.psk", "alice")
    kit = program("nbdkit", "nbdkit")
    with Source(tmp_path, kit, "-f", "--tls=require", f"--tls-psk={keys}", "file", disk) as source:
        exercise(nbds(source, "alice", tls_psk_file=keys))
        with pytest.raises(BackingError, match="it has no key of the user"):
            exercise(nbds(source, "bob", tls_psk_file=keys))


def test_a_server_that_is_not_the_one_is_not_used(
    program: Program, blkloom: str, tmp_path: Path, disk: Path, server_files: Path, client_files: Path
) -> None:
    other = Authority(tmp_path, "other").issue("laptop", "/CN=laptop", role="client")
    with Source(tmp_path, *command("nbdkit", program, blkloom, server_files, disk)) as source:
        for files, host, said in [
            (client_files, "elsewhere", "hostname mismatch"),
            (other, "localhost", "certificate verify failed"),
        ]:
            with pytest.raises(BackingError, match=said):
                exercise(nbds(source, tls_certificates=files, tls_hostname=host))


def test_there_is_no_downgrade(
    program: Program, blkloom: str, tmp_path: Path, disk: Path, server_files: Path, client_files: Path
) -> None:
    with (
        Source(tmp_path, program("nbdkit", "nbdkit"), "-f", "--tls=off", "file", disk) as source,
        pytest.raises(BackingError, match="TLS: the server does not"),
    ):
        exercise(nbds(source, tls_certificates=client_files, tls_hostname="localhost"))


def test_a_server_that_requires_tls_says_so_to_others(
    program: Program, blkloom: str, tmp_path: Path, disk: Path, server_files: Path
) -> None:
    with (
        Source(tmp_path, *command("nbdkit", program, blkloom, server_files, disk)) as source,
        pytest.raises(BackingError, match="use an nbds URI"),
    ):
        exercise(source.uri())


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("nbd://host/?tls-certificates=/x", "goes with TLS only"),
        ("nbds://host/?tls-psk-file=/x", "need a user"),
        ("nbds://host/?tls-verify-peer=perhaps", "true or false"),
        ("nbds://host/?tls-colour=red", "unknown parameter"),
        ("nbds+unix:///?socket=/x&tls-certificates=/x", "add tls-hostname=NAME"),
        ("nbds+unix:///?socket=/x", "add tls-hostname=NAME"),
        ("nbds://host/?tls-hostname=a%00b&tls-verify-peer=false", "NUL"),
        ("nbds://a%00b@host/?tls-psk-file=/x", "NUL"),
    ],
)
def test_wrong_parameters_are_refused(uri: str, said: str) -> None:
    with pytest.raises(TableError, match=said):
        blkloom.open(f"0 8 nbd {uri}")
