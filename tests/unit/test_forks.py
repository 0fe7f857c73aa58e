"""Forked children of a process with open devices do not hang, and do not change the devices of the parent.

Each program runs in a separate process with a timeout, because a child that hangs must only fail its test.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest

PATIENCE = 60.0
"""Seconds after which a child is taken to hang."""

FORKED = """
import errno, os, sys
import blkloom
from blkloom.errors import ForkedError

def refused(what, call):
    try:
        call()
    except ForkedError as error:
        assert error.errno == errno.ESHUTDOWN and isinstance(error, OSError), error
        assert "spawn" in str(error), error
        print(what, "refused", flush=True)
    else:
        print(what, "done", flush=True)

def wait(pid):
    print("child ended with", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


def run(program: str, *arguments: str | Path) -> list[str]:
    """The lines that it printed, its children's among them."""
    command = [sys.executable, "-c", FORKED + dedent(program), *map(str, arguments)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        printed, said = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        printed, said = process.communicate()
        pytest.fail(f"it hangs after: {printed}{said}")
    assert process.returncode == 0, printed + said
    return printed.splitlines()


@pytest.fixture
def image(tmp_path: Path, qemu_tools: None) -> Path:
    path = tmp_path / "disk.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, "8M"], check=True)
    return path


def test_a_forked_child_is_told_that_the_devices_are_its_parent_s(image: Path) -> None:
    printed = run(
        """
        device = blkloom.open(sys.argv[1])
        device.pwrite(b"before", 0)
        table = device.table
        if pid := os.fork():
            wait(pid)
            device.pwrite(b"after", 1 << 20)
            device.flush()
            print(device.pread(6, 0), device.pread(5, 1 << 20))
            device.close()
        else:
            raw = device.raw()
            refused("pread", lambda: device.pread(6, 0))
            refused("pread_into", lambda: device.pread_into(bytearray(6), 0))
            refused("pwrite", lambda: device.pwrite(b"child!", 0))
            refused("discard", lambda: device.discard(0, 4096))
            refused("write_zeroes", lambda: device.write_zeroes(0, 4096))
            refused("batch", lambda: device.batch([("w", b"child!", 0)]))
            refused("extents", lambda: device.extents())
            refused("flush", lambda: device.flush())
            refused("load", lambda: device.load(table))
            refused("suspend", lambda: device.suspend())
            refused("resume", lambda: device.resume())
            refused("status", lambda: device.status())
            refused("message", lambda: device.message(0, ["help"]))
            refused("raw read", lambda: raw.read(6))
            refused("raw write", lambda: raw.write(b"child!"))
            refused("close", lambda: device.close())
        """,
        image,
    )
    operations = "pread pread_into pwrite discard write_zeroes batch extents flush load suspend resume status message"
    refused = [*operations.split(), "raw read", "raw write"]
    assert printed == [
        *(f"{operation} refused" for operation in refused),
        "close done",
        "child ended with 0",
        "b'before' b'after'",
    ]
    subprocess.run(["qemu-img", "check", "-q", image], check=True)


def test_what_a_child_leaves_open_at_its_end_stays_the_parent_s(image: Path, tmp_path: Path) -> None:
    """Neither its exit nor what Python finalizes there unlocks, flushes or marks the image."""
    raw = tmp_path / "raw.img"
    raw.write_bytes(bytes(1 << 20))
    printed = run(
        """
        import fcntl, gc, multiprocessing, subprocess
        from blkloom.errors import BusyError

        engine = blkloom.Engine(loops=1)
        devices = [blkloom.open(path, engine=engine) for path in sys.argv[1:]] + [blkloom.open("0 2048 ram")]
        for device in devices:
            device.pwrite(b"before", 0)

        def child():
            globals().pop("devices")[-1].close()
            engine.close()
            gc.collect()

        def header():
            with open(sys.argv[1], "rb") as file:
                return file.read(4096)

        def is_locked(path):
            code = "import sys, blkloom; blkloom.open(sys.argv[1])"
            return "already in use" in subprocess.run(
                [sys.executable, "-c", code, path], stderr=subprocess.PIPE, text=True).stderr

        before = header()
        process = multiprocessing.get_context("fork").Process(target=child)
        process.start()
        process.join()
        print("child ended with", process.exitcode)
        print("as it was" if header() == before else "changed", *map(is_locked, sys.argv[1:]))
        for device in devices:
            device.pwrite(b"after!", 0)
            device.flush()
            print(device.pread(6, 0))
            device.close()
        """,
        image,
        raw,
    )
    assert printed == ["child ended with 0", "as it was True True", *["b'after!'"] * 3]
    subprocess.run(["qemu-img", "check", "-q", image], check=True)
    assert raw.read_bytes()[:6] == b"after!"


def test_a_child_opens_devices_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(4096))
    printed = run(
        """
        device = blkloom.open("0 2048 ram")
        device.pwrite(b"parent", 0)
        if pid := os.fork():
            wait(pid)
            print(device.pread(6, 0))
        else:
            with blkloom.open(sys.argv[1]) as own:
                own.pwrite(b"child", 0)
                own.flush()
            if pid := os.fork():
                wait(pid)
            else:
                refused("pread of the grandparent's", lambda: device.pread(6, 0))
        """,
        path,
    )
    assert printed == ["pread of the grandparent's refused", "child ended with 0", "child ended with 0", "b'parent'"]
    assert path.read_bytes()[:5] == b"child"


def test_a_fork_with_requests_under_way_ends(tmp_path: Path) -> None:
    """Threads of the parent may have had any lock at the fork."""
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(1 << 20))
    printed = run(
        """
        import threading

        device = blkloom.open(sys.argv[1], direct_io=True)
        stop = threading.Event()

        def work():
            while not stop.is_set():
                device.batch([("w", bytes(4096), at) for at in range(1, 1 << 19, 8192)])
                device.flush()

        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for _ in range(10):
            if pid := os.fork():
                assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
            else:
                refused("flush", device.flush)
                sys.exit()
        stop.set()
        for thread in threads:
            thread.join()
        device.close()
        """,
        path,
    )
    assert printed == ["flush refused"] * 10


def test_views_and_servers_of_the_parent_go_on_after_a_fork(tmp_path: Path) -> None:
    path = tmp_path / "nbd.sock"
    printed = run(
        """
        import asyncio, socket
        from blkloom import _engine
        from blkloom.export.nbd.server import NbdServer
        from blkloom.export.nbd.session import NbdExport

        async def greeted():
            connected = socket.socket(socket.AF_UNIX)
            connected.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(connected, sys.argv[1])
            return await loop.sock_recv(connected, 8)

        async def main():
            async with NbdServer(device.engine, [NbdExport("", _engine.Export(device))]) as server:
                await server.listen_unix(sys.argv[1])
                async with device.asyncio() as view:
                    await view.pwrite(b"before", 0)
                    pid = os.fork()
                    if not pid:
                        try:
                            await view.pread(6, 0)
                        except ForkedError:
                            print("pread refused", flush=True)
                        print("left open:", await server.stop(), flush=True)
                    else:
                        wait(pid)
                        print(await view.pread(6, 0), await greeted())

        with blkloom.open("0 2048 ram") as device:
            asyncio.run(main())
        """,
        path,
    )
    assert printed == ["pread refused", "left open: 0", "child ended with 0", "b'before' b'NBDMAGIC'"]


def test_a_client_of_the_supervisor_is_its_process_s_alone(tmp_path: Path) -> None:
    printed = run(
        """
        from blkloom.control.client import Client

        client = Client(sys.argv[1])
        client.create("disk", table="0 2048 ram")
        if pid := os.fork():
            wait(pid)
            print([info.name for info in client.info()])
            client.stop()
        else:
            refused("info", client.info)
            refused("stop", client.stop)
            client.close()
            with Client(sys.argv[1]) as own:
                print([info.name for info in own.info()], flush=True)
        """,
        tmp_path / "run",
    )
    assert printed == ["info refused", "stop refused", "['disk']", "child ended with 0", "['disk']"]
