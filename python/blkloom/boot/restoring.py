"""Makes the devices that files describe, in the order of their stacking.

A device that exists is not changed: what its file says and it lacks (exports, a node) is added, and a difference is an
error. An error concerns one device, and those that need it; the others are made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from typing import Any

import msgspec

from blkloom.boot.description import AttachOptions, CreateOptions, Description, ExportOptions, parse
from blkloom.boot.directory import Directory
from blkloom.boot.saving import describe, stable_names
from blkloom.boot.snapshots import Use, has_memory, snapshots_first, use_of
from blkloom.boot.stacking import in_order, is_absolute, needs, paths
from blkloom.control.client import Client
from blkloom.control.faults import messages_of
from blkloom.control.states import DeviceInfo, LoopNotes, NodeOptions, SocketPermissions
from blkloom.device_names import check_new_name
from blkloom.errors import BlkloomError, DeviceExists, UsageError
from blkloom.export.nbd.details import NbdDetails
from blkloom.printing import described
from blkloom.table import parse_table
from blkloom.table.printing import format_table
from blkloom.targets.registry import Targets


class Report(msgspec.Struct, frozen=True):
    """What was done with one device. error: "" where all is as its file says."""

    name: str
    done: str = ""
    error: str = ""


def read_all(
    directory: Directory, wanted: list[str], *, targets: Targets
) -> tuple[dict[str, Description], list[Report]]:
    """Reads the files of the wanted devices (all, if there are none). Returns the descriptions, and the errors."""
    found: dict[str, Description] = {}
    errors = []
    for name in wanted or directory.names():
        try:
            check_new_name(name)
            text = directory.read(name)
            found[name] = parse(text, targets=targets, source=str(directory.file(name)))
            for path in paths(found[name].table):
                if not is_absolute(path):
                    raise UsageError(f"{directory.file(name)}: '{path}' is relative", cure="write an absolute path")
        except (BlkloomError, OSError) as error:
            found.pop(name, None)
            errors.append(Report(name, error=described(error)))
    return found, errors


class Restore:
    """Makes devices by one client."""

    def __init__(self, client: Client, *, targets: Targets, known: Mapping[str, Description]) -> None:
        """known: what all files describe, also those of devices that are not wanted."""
        self._client = client
        self._targets = targets
        self._known = known
        self._folder = str(client.run_dir.devices)
        self._failed: set[str] = set()

    def run(self, wanted: Mapping[str, Description], report: Callable[[Report], None]) -> bool:
        """Makes devices; lower ones first. report: called after each. Returns whether there was no error."""
        infos = {info.name: info for info in self._client.info()}
        nodes = {path: info.name for info in infos.values() if info.node and (path := info.node.path)}
        needed = {name: needs(one.table, self._client.run_dir, nodes) for name, one in wanted.items()}
        tables = {name: one.table for name, one in wanted.items()}
        kept = snapshots_first({name: one.table for name, one in self._known.items()} | tables, self._folder)
        before = {name: lowers | kept.get(name, set()) for name, lowers in needed.items()}
        order, cycles = in_order(before)
        self._failed |= cycles.keys()
        for name in order:
            try:
                for lower in sorted(needed[name] & self._failed):
                    raise UsageError(f"device '{name}' needs '{lower}', which could not be made", cure="see its error")
                if name not in infos:
                    self._check_snapshots(name, kept.get(name, set()), infos.keys() | wanted.keys())
                    self._check_origin(name, wanted[name], infos)
                report(Report(name, done=self._make(name, wanted[name], infos.get(name))))
            except (BlkloomError, OSError) as error:
                self._failed.add(name)
                report(Report(name, error=described(error)))
        for name, cycle in cycles.items():
            report(Report(name, error=described(cycle)))
        return not self._failed

    def _check_snapshots(self, name: str, snapshots: Set[str], there: Set[str]) -> None:
        """Raises UsageError if a device would write to an origin without one of the snapshots. there: devices that
        exist or are wanted.
        """
        for snapshot in sorted(snapshots):
            if snapshot in there and snapshot not in self._failed:
                continue
            what = f"device '{name}' would overwrite what its snapshot '{snapshot}' needs, which is not there"
            cure = "see its error" if snapshot in self._failed else "restore both"
            raise UsageError(what, cure=f"{cure}; to give the snapshot up, delete the file of '{snapshot}'")

    def _check_origin(self, name: str, wanted: Description, infos: Mapping[str, DeviceInfo]) -> None:
        """Raises UsageError if a snapshot comes after a device that writes to its origin."""
        use = use_of(wanted.table, self._folder)
        if use is None or use.writes:
            return
        for info in infos.values():
            if info.types not in (["snapshot-origin"], ["snapshot-merge"]) or not info.live:
                continue
            there = parse_table(self._client.table(info.name), targets=self._targets, source=f"table of {info.name}")
            if use_of(there, self._folder) == Use(use.origin, writes=True):
                what = f"device '{info.name}' writes to the origin of '{name}', which misses what was overwritten"
                raise UsageError(what, cure="delete its file, and take another snapshot")

    def _make(self, name: str, wanted: Description, info: DeviceInfo | None) -> str:
        done = []
        if info is None:
            self._create(name, wanted)
            done.append("made, empty: its memory was not saved" if has_memory(wanted.table) else "made")
            missing, attach = list(wanted.exports), wanted.attach
        else:
            there = self._compare(name, wanted, info)
            missing = [export for export in wanted.exports if _shape(export) not in map(_shape, there.exports)]
            attach = wanted.attach if there.attach is None else None
        for export in missing:
            done.append(f"exported at {self._export(name, export)}")
        if attach is not None:
            done.append(f"attached at {self._attach(name, attach)}")
        return ", ".join(done)

    def _create(self, name: str, wanted: Description) -> None:
        create, loop = wanted.create, wanted.loop
        self._client.create(
            name,
            table=format_table(wanted.table),
            source=f"table of {name}",
            uuid=create.uuid,
            read_only=create.read_only,
            shared=create.shared,
            autoclear=create.autoclear,
            loop=None if loop is None else LoopNotes(**msgspec.structs.asdict(loop)),
            node=NodeOptions(mode=create.mode, uid=create.uid, gid=create.gid, scan=not create.no_scan),
            fault=wanted.fault,
        )
        for text in messages_of(wanted.fault):
            self._client.message(name, 0, text)

    def _compare(self, name: str, wanted: Description, info: DeviceInfo) -> Description:
        """The description of a device that exists. Raises DeviceExists if its file describes another one."""
        links = stable_names(self._client.info())
        there = describe(self._client, info, targets=self._targets, links=links)
        differing = []
        if format_table(there.table) != format_table(wanted.table):
            differing.append("table")
        if there.fault != wanted.fault:
            differing.append("fault")
        differing += [
            field for field in CreateOptions.__struct_fields__ if _differs(there.create, wanted.create, field)
        ]
        if there.attach is not None and wanted.attach is not None:
            fields = [
                field for field in AttachOptions.__struct_fields__ if _differs(there.attach, wanted.attach, field)
            ]
            differing += [f"attach --{field}" for field in fields if field != "via" or wanted.attach.via != "auto"]
        shapes = {_shape(export): export for export in there.exports}
        for export in wanted.exports:
            other = shapes.get(_shape(export), export)
            if _access(other) != _access(export):
                address = export.path or export.socket or export.listen
                differing.append(f"export {address}: TLS, or who may use it")
        if differing:
            what = f"device '{name}' exists and differs from its file in: {', '.join(differing)}"
            cure = f"change the file, or remove the device; blkloom save {name} writes what is there"
            raise DeviceExists(what.replace("_", "-"), cure=cure)
        return there

    def _export(self, name: str, export: ExportOptions) -> str:
        options = {"user": export.uid, "group": export.gid, "mode": export.mode, "allow_other": export.allow_other}
        if export.fuse_uring:
            options["uring"] = True
        host, port = _host_port(export.listen)
        made = self._client.export(
            name,
            kind="fuse" if export.fuse else "vhost-user" if export.vhost_user else "nbd",
            name=export.name,
            unix=export.socket,
            host=host,
            port=port,
            path=export.path,
            read_only=export.read_only,
            allow_remote=export.allow_remote,
            shared=export.shared,
            socket=SocketPermissions(mode=export.socket_mode, uid=export.socket_owner, gid=export.socket_group),
            options=options if export.fuse else _nbd_options(export),
        )
        return made.address

    def _attach(self, name: str, attach: AttachOptions) -> str:
        options: dict[str, Any] = {"on_failure": attach.on_failure} if attach.on_failure else {}
        of_nbd = {"timeout": attach.timeout, "connections": attach.connections}
        options |= {field: value for field, value in of_nbd.items() if value is not None}
        made = self._client.attach(
            name,
            via=attach.via,
            read_only=attach.read_only,
            partitions=attach.partscan,
            shared=attach.shared,
            options=options,
        )
        return made.node.path


def _nbd_options(export: ExportOptions) -> dict[str, Any]:
    """The options of an NBD export (`export.nbd.details`); none for other kinds. Raises UsageError."""
    tls = {
        "mode": export.tls,
        "certificates": export.tls_certificates,
        "psk": export.tls_psk,
        "verify_peer": export.tls_verify_peer,
    }
    if not all(user.isascii() and user.isdigit() for user in export.allow_user):
        raise UsageError(f"--allow-user {' '.join(export.allow_user)}: no number", cure="write the number of the user")
    access = {
        "addresses": export.allow_address,
        "users": tuple(map(int, export.allow_user)),
        "certificates": export.allow_certificate,
        "read_only_for": export.read_only_for,
    }
    options = {
        "tls": {key: value for key, value in tls.items() if value},
        "access": {key: value for key, value in access.items() if value},
        "per_host": export.max_connections_per_peer,
    }
    return {key: value for key, value in options.items() if value}


def _access(export: ExportOptions) -> tuple[NbdDetails, bool]:
    """Who may do what with an export. Raises UsageError."""
    return NbdDetails.parse({} if export.fuse or export.vhost_user else _nbd_options(export)), export.read_only


def _differs(there: msgspec.Struct, wanted: msgspec.Struct, field: str) -> bool:
    return bool(getattr(there, field) != getattr(wanted, field))


def _shape(export: ExportOptions) -> tuple[str, ...]:
    """Where clients find an export: two with the same address are the same."""
    if export.fuse:
        return ("fuse", export.path)
    if export.vhost_user:
        return ("vhost-user", export.path)
    return ("nbd", export.socket, export.listen)


def _host_port(listen: str) -> tuple[str, int]:
    """HOST:PORT, [HOST]:PORT. Raises UsageError."""
    if not listen:
        return "", 0
    host, _, port = listen.rpartition(":")
    if not (host and port.isascii() and port.isdigit() and int(port) <= 65535):
        raise UsageError(f"--listen '{listen}' is no address", cure="write HOST:PORT, as in localhost:10809")
    return host.removeprefix("[").removesuffix("]"), int(port)
