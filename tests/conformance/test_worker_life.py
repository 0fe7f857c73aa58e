"""Workers as the supervisor uses them: forked, killed, forked again with stored descriptors, and without a
supervisor.
"""

from __future__ import annotations

import errno
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import msgspec
import pytest

from blkloom.control.messages import (
    Describe,
    Hold,
    Leave,
    Release,
    Unserve,
    WorkerClear,
    WorkerLoad,
    WorkerMessage,
    WorkerRename,
    WorkerResume,
    WorkerStats,
    WorkerStatus,
    WorkerSuspend,
)
from blkloom.control.replies import Description, TableLoaded
from blkloom.control.states import DeviceInfo, DeviceState, ExportState, Loaded
from blkloom.errors import BackingError, BusyError, TableError, UsageError
from blkloom.targets.claim import Claim

from .nbd_client import FLUSH, READ, WRITE, NbdClient
from .supervisor_by_hand import PATIENCE, Store, Worker, Zygote, zygote

SIZE = 1 << 20
SECTORS = SIZE // 512


@pytest.fixture
def worker(nursery: Zygote, store: Store) -> Iterator[Worker]:
    worker = nursery.fork("w1", store)
    yield worker
    if worker.pidfd >= 0:
        worker.kill()


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    path.write_bytes(bytes(SIZE))
    return path


def claim_again(path: Path) -> None:
    fd = os.open(path, os.O_RDWR)
    try:
        Claim(fd, str(path), writable=True).release()
    finally:
        os.close(fd)


def test_a_worker_leads_a_session_of_its_own_and_keeps_no_mounts_to_itself(worker: Worker) -> None:
    """Its own mount namespace hears of unmounts outside; where mounts are private it would not, and has none."""
    assert os.getsid(worker.pid) == worker.pid == worker.greeting.pid
    theirs, ours = (os.readlink(f"/proc/{pid}/ns/mnt") for pid in (worker.pid, os.getpid()))
    mounts = [line.partition(" - ")[0].split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    shared = any(fields[4] == "/" and "shared:" in " ".join(fields[6:]) for fields in mounts)
    assert (theirs != ours) == (os.geteuid() == 0 and shared)


def test_a_killed_worker_s_devices_go_on_in_another_with_every_byte(
    nursery: Zygote, worker: Worker, store: Store, disk: Path, tmp_path: Path
) -> None:
    worker.create(1, "ram", f"0 {SECTORS} ram", load=1)
    worker.create(2, "loop", f"0 {SECTORS} loop {disk}", load=2)
    paths = {1: tmp_path / "ram.sock", 2: tmp_path / "loop.sock"}
    exports = {minor: worker.serve(minor, path) for minor, path in paths.items()}
    for minor, path in paths.items():
        client = NbdClient.unix(path)
        assert client.ask(WRITE, 4096, payload=bytes([minor]) * 8192).error == 0
        assert client.ask(FLUSH).error == 0
        client.close()
    asked = len(worker.opened)
    assert asked == 1
    worker.kill()
    assert nursery.status("w1") == -signal.SIGKILL
    with pytest.raises(BusyError):
        claim_again(disk)  # the lock lives in the store

    again = nursery.fork("w2", store)
    disk.rename(tmp_path / "moved")  # nothing is opened by its path again
    again.hold(
        [
            DeviceState(name="ram", minor=1, active=Loaded(load=1, table=f"0 {SECTORS} ram"), exports=[exports[1]]),
            DeviceState(
                name="loop", minor=2, active=Loaded(load=2, table=f"0 {SECTORS} loop {disk}"), exports=[exports[2]]
            ),
        ]
    )
    assert again.opened == []
    for minor, path in paths.items():
        client = NbdClient.unix(path)
        expected = bytes(4096) + bytes([minor]) * 8192 + bytes(4096)
        assert client.ask(READ, 0, 16384).data == expected
        client.close()
    with pytest.raises(BusyError):
        claim_again(tmp_path / "moved")
    for minor in paths:
        again.call(Release(minor=minor))
    claim_again(tmp_path / "moved")
    assert {label.role for label in store.kept} == {"listen"}
    again.call(Leave())
    again.wait()
    assert nursery.status("w2") == 0


def test_clients_that_connect_while_no_worker_lives_are_served_by_the_next(
    nursery: Zygote, worker: Worker, store: Store, tmp_path: Path
) -> None:
    worker.create(1, "ram", f"0 {SECTORS} ram", load=1)
    export = worker.serve(1, tmp_path / "s")
    worker.kill()
    waiting = socket.socket(socket.AF_UNIX)
    waiting.settimeout(PATIENCE)
    waiting.connect(str(tmp_path / "s"))
    again = nursery.fork("w2", store)
    again.hold([DeviceState(name="ram", minor=1, active=Loaded(load=1, table=f"0 {SECTORS} ram"), exports=[export])])
    assert waiting.recv(8) == b"NBDMAGIC"
    waiting.close()
    again.kill()


def test_without_its_descriptors_a_device_is_refused_and_its_claim_stays(
    nursery: Zygote, worker: Worker, store: Store, disk: Path
) -> None:
    worker.create(1, "loop", f"0 {SECTORS} loop {disk}", load=1)
    worker.kill()
    store.drop([label for label in store.kept if label.role == "file"])
    again = nursery.fork("w2", store)
    again.refuse = errno.ESTALE
    state = DeviceState(name="loop", minor=1, active=Loaded(load=1, table=f"0 {SECTORS} loop {disk}"))
    with pytest.raises(BackingError, match="its descriptor was lost with the process that had it") as caught:
        again.hold([state])
    assert caught.value.path == str(disk)
    assert "resume the device" in str(caught.value)
    with pytest.raises(BusyError):
        claim_again(disk)
    assert msgspec.convert(again.call(Describe()), Description).devices == []
    again.refuse = None  # a client waits for the device, and can open the file
    again.hold([state])
    assert store.roles() == {(1, "file", f"w-{disk}"), (1, "claim", str(disk))}
    again.kill()


def test_a_restored_device_is_as_it_was_suspended_with_its_inactive_table_and_event_number(
    nursery: Zygote, worker: Worker, store: Store, disk: Path
) -> None:
    worker.create(1, "d", f"0 {SECTORS} loop {disk}", load=1)
    worker.call(WorkerLoad(minor=1, loaded=Loaded(load=2, table=f"0 8 linear {disk} 8", read_only=True)))
    worker.call(WorkerSuspend(minor=1))
    (state,) = msgspec.convert(worker.call(Describe())["devices"], list[DeviceState])
    assert state.suspended
    assert state.inactive
    worker.kill()
    state.event = 7
    again = nursery.fork("w2", store)
    again.hold([state])
    assert msgspec.convert(again.call(Describe())["devices"], list[DeviceState]) == [state]
    answer = again.call(WorkerResume(minor=1))
    assert answer == {"targets": 1, "types": ["linear"], "size": 4096, "block_size": 512, "event": 8}
    (info,) = msgspec.convert(again.call(Describe())["infos"], list[DeviceInfo])
    assert (info.state, info.read_only, info.live, info.inactive) == ("ACTIVE", True, True, False)
    assert {label.load for label in store.kept} == {2}
    again.kill()


def test_files_are_opened_by_the_caller_and_refusals_are_his(worker: Worker, disk: Path) -> None:
    worker.call(Hold(devices=[DeviceState(name="d", minor=1)]))
    worker.refuse = errno.EACCES
    with pytest.raises(BackingError) as caught:
        worker.call(WorkerLoad(minor=1, loaded=Loaded(load=1, table=f"0 8 loop {disk}")))
    assert (caught.value.errno, caught.value.path) == (errno.EACCES, str(disk))
    worker.refuse = None
    answer = worker.call(WorkerLoad(minor=1, loaded=Loaded(load=2, table=f"0 8 loop {disk} 0 1 direct_io")))
    assert msgspec.convert(answer, TableLoaded) == TableLoaded(deps=[str(disk)])
    assert [(wish.path, wish.writable, wish.direct) for wish in worker.opened] == [
        (str(disk), True, False),
        (str(disk), True, True),
    ]


def test_a_failed_load_changes_nothing_and_keeps_nothing(worker: Worker, store: Store, disk: Path) -> None:
    worker.create(1, "d", f"0 8 loop {disk}", load=1)
    before = store.roles()
    with pytest.raises(TableError, match="Target maps area after file end") as caught:
        worker.call(
            WorkerLoad(minor=1, loaded=Loaded(load=2, table=f"0 8 zero\n8 {SECTORS} loop {disk} 512"), source="here")
        )
    assert (caught.value.place.source, caught.value.place.line) == ("here", 2)
    assert store.roles() == before


def test_descriptors_of_a_table_are_dropped_with_it_while_its_claim_goes_on_under_the_next(
    nursery: Zygote, worker: Worker, store: Store, disk: Path
) -> None:
    worker.create(1, "d", f"0 8 loop {disk}", load=1)
    assert store.roles() == {(1, "file", f"w-{disk}"), (1, "claim", str(disk))}
    worker.call(WorkerLoad(minor=1, loaded=Loaded(load=2, table=f"0 16 loop {disk}")))
    worker.call(WorkerResume(minor=1))
    assert store.roles() == {(2, "file", f"w-{disk}"), (2, "claim", str(disk))}
    worker.kill()
    with pytest.raises(BusyError):
        claim_again(disk)
    again = nursery.fork("w2", store)
    again.hold([DeviceState(name="d", minor=1, active=Loaded(load=2, table=f"0 16 loop {disk}"))])
    again.call(WorkerLoad(minor=1, loaded=Loaded(load=3, table="0 8 zero")))
    again.call(WorkerClear(minor=1))
    assert store.roles() == {(2, "file", f"w-{disk}"), (2, "claim", str(disk))}
    again.call(WorkerLoad(minor=1, loaded=Loaded(load=4, table="0 8 zero")))
    again.call(WorkerResume(minor=1))
    assert store.roles() == set()
    claim_again(disk)
    again.kill()


def test_a_worker_without_supervisor_serves_on_and_tells_the_next_everything(
    nursery: Zygote, worker: Worker, store: Store, disk: Path, tmp_path: Path
) -> None:
    worker.create(1, "d", f"0 {SECTORS} loop {disk}", load=1)
    export = worker.serve(1, tmp_path / "s")
    client = NbdClient.unix(tmp_path / "s")
    assert client.ask(WRITE, 0, payload=b"before").error == 0
    worker.channel.close()
    assert client.ask(WRITE, 512, payload=b"between").error == 0
    control = nursery.run_dir / "workers" / "w1.sock"
    assert control.stat().st_mode & 0o777 == 0o600
    connected = socket.socket(socket.AF_UNIX)
    connected.connect(str(control))
    fresh = Store()
    back = Worker("w1", connected, fresh)
    described = back.call(Describe())
    assert msgspec.convert(described["devices"], list[DeviceState]) == [
        DeviceState(
            name="d", minor=1, active=Loaded(load=1, table=f"0 {SECTORS} loop {disk}"), exports=[export], opened=True
        )
    ]
    (info,) = msgspec.convert(described["infos"], list[DeviceInfo])
    assert (info.connections, info.worker, info.deps, info.size) == (1, worker.pid, [str(disk)], SIZE)
    assert fresh.roles() == {(1, "file", f"w-{disk}"), (1, "claim", str(disk)), (0, "listen", "e1")}
    assert fresh.roles() == store.roles()
    client.close()
    back.until(1, connections=0)
    back.close()
    fresh.close()
    signal.pidfd_send_signal(worker.pidfd, signal.SIGTERM)
    assert nursery.status("w1") == 0
    assert not control.exists()
    assert disk.read_bytes().startswith(b"before")
    os.close(worker.pidfd)
    worker.pidfd = -1


def test_the_second_supervisor_succeeds_the_first(nursery: Zygote, worker: Worker) -> None:
    connected = socket.socket(socket.AF_UNIX)
    connected.connect(str(nursery.run_dir / "workers" / "w1.sock"))
    second = Worker("w1", connected, worker.store)
    assert msgspec.convert(second.call(Describe()), Description) == Description()
    with pytest.raises(ConnectionError):
        worker.channel.receive(PATIENCE)
    second.create(1, "d", "0 8 zero", load=1)
    second.close()


def test_the_zygote_s_end_leaves_its_workers_alone(tmp_path: Path, store: Store) -> None:
    with zygote(tmp_path / "run") as nursery:
        worker = nursery.fork("w1", store)
    worker.create(1, "d", "0 8 ram", load=1)
    worker.serve(1, tmp_path / "s")
    client = NbdClient.unix(tmp_path / "s")
    assert client.ask(READ, 0, 512).data == bytes(512)
    client.close()
    worker.kill()


def test_stacked_devices_are_found_by_name_and_by_the_path_of_their_socket(
    nursery: Zygote, worker: Worker, tmp_path: Path
) -> None:
    worker.create(1, "low er", "0 8 ram", load=1)
    answers = []
    for minor, path in ((2, "blkloom:low\\ er"), (3, f"{nursery.run_dir}/dev/low\\\\x20er")):
        worker.call(Hold(devices=[DeviceState(name=f"upper{minor}", minor=minor)]))
        loaded = Loaded(load=minor, table=f"0 4 striped 1 4 {path} 4")
        answers.append(worker.call(WorkerLoad(minor=minor, loaded=loaded))["deps"])
        worker.call(WorkerResume(minor=minor))
    assert answers == [["blkloom:low er"]] * 2
    with pytest.raises(TableError, match="would be stacked on itself"):
        worker.call(WorkerLoad(minor=1, loaded=Loaded(load=9, table="0 4 linear blkloom:upper2 0")))
    assert worker.call(WorkerStatus(minor=2)) == [[0, 4, "striped", "1 blkloom:low er 1 A"]]
    worker.call(WorkerRename(minor=1, name="new"))
    described = msgspec.convert(worker.call(Describe())["devices"], list[DeviceState])
    assert [device.active.table for device in described if device.active] == [
        "0 8 ram",
        "0 4 striped 1 4 blkloom:new 4",
        f"0 4 striped 1 4 {nursery.run_dir}/dev/new 4",
    ]
    assert described[0].event == 1


def test_restored_stacks_stand_on_each_other_again(
    nursery: Zygote, worker: Worker, store: Store, tmp_path: Path
) -> None:
    worker.create(1, "lower", "0 8 ram", load=1)
    worker.create(2, "upper", "0 8 linear blkloom:lower 0", load=2)
    worker.serve(2, tmp_path / "s")
    client = NbdClient.unix(tmp_path / "s")
    client.ask(WRITE, 0, payload=b"through")
    client.close()
    devices = msgspec.convert(worker.call(Describe())["devices"], list[DeviceState])
    worker.kill()
    again = nursery.fork("w2", store)
    again.hold(devices)
    client = NbdClient.unix(tmp_path / "s")
    assert client.ask(READ, 0, 7).data == b"through"
    client.close()
    again.kill()


def test_messages_reach_the_target_that_holds_the_sector_and_unknown_ones_are_refused(worker: Worker) -> None:
    worker.create(1, "d", "0 8 zero\n8 8 error", load=1)
    with pytest.raises(UsageError, match="Invalid argument: target error"):
        worker.call(WorkerMessage(minor=1, sector=8, text="do it"))
    with pytest.raises(UsageError, match="Target message sector outside device"):
        worker.call(WorkerMessage(minor=1, sector=16, text="do it"))


def test_counters_come_by_device_and_export(worker: Worker, tmp_path: Path) -> None:
    worker.create(1, "d", "0 8 ram", load=1)
    worker.serve(1, tmp_path / "s")
    client = NbdClient.unix(tmp_path / "s")
    client.ask(READ, 0, 512)
    client.disconnect()
    worker.until(1, connections=0)  # a request is counted after it is answered, before its client is gone
    stats = worker.call(WorkerStats())
    assert stats["1"]["device"]["read"]["bytes"] == stats["1"]["exports"]["e1"]["read"]["bytes"] == 512


def test_an_export_that_is_taken_away_disconnects_its_clients_even_while_their_requests_wait(
    worker: Worker, tmp_path: Path
) -> None:
    worker.create(1, "d", "0 8 ram", load=1)
    worker.serve(1, tmp_path / "s")
    client = NbdClient.unix(tmp_path / "s")
    worker.call(WorkerSuspend(minor=1))
    client.send(READ, 0, 512)
    worker.call(Unserve(minor=1, id="e1"))
    with pytest.raises(ConnectionError):
        client.receive()
    client.close()
    worker.until(1, connections=0)


def test_a_size_that_changes_under_a_client_is_an_event_and_errors_beyond_the_end(
    worker: Worker, tmp_path: Path
) -> None:
    worker.create(1, "d", "0 16 ram", load=1)
    worker.serve(1, tmp_path / "s")
    client = NbdClient.unix(tmp_path / "s")
    assert client.ask(READ, 4096, 512).error == 0
    worker.call(WorkerLoad(minor=1, loaded=Loaded(load=2, table="0 8 ram")))
    assert worker.call(WorkerResume(minor=1))["event"] == 1
    assert client.ask(READ, 4096, 512).error == errno.EINVAL
    assert client.ask(READ, 0, 512).error == 0
    client.close()


def test_unknown_devices_are_refused(worker: Worker) -> None:
    with pytest.raises(UsageError, match="no device 5"):
        worker.call(WorkerSuspend(minor=5))
    worker.create(1, "d", "0 8 zero", load=1)
    with pytest.raises(UsageError, match="no export"):
        worker.call(Unserve(minor=1, id="e9"))


def test_many_descriptors_come_in_several_messages(nursery: Zygote, store: Store, tmp_path: Path) -> None:
    with ExitStack() as stack:
        worker = nursery.fork("w1", store)
        lines = []
        for number in range(200):
            path = tmp_path / f"f{number}"
            path.write_bytes(bytes(512))
            lines.append(f"{number} 1 linear {path} 0")
        table = "\n".join(lines)
        worker.create(1, "d", table, load=1)
        stack.callback(worker.close)
        assert len(store.kept) == 400
        worker.kill()
        again = nursery.fork("w2", store)
        again.hold([DeviceState(name="d", minor=1, active=Loaded(load=1, table=table))])
        assert again.opened == []
        again.kill()


def test_the_automatic_export_takes_the_new_name_of_its_device(worker: Worker, tmp_path: Path) -> None:
    worker.create(1, "d", "0 8 ram", load=1)
    export = worker.serve(1, tmp_path / "s")
    assert export == ExportState(id="e1", name="x", unix=str(tmp_path / "s"))
    worker.call(WorkerRename(minor=1, name="e", uuid="U"))
    (state,) = msgspec.convert(worker.call(Describe())["devices"], list[DeviceState])
    assert (state.name, state.uuid, state.event, state.exports) == ("e", "U", 1, [export])
