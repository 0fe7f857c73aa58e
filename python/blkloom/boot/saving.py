"""The description of a device that exists, for its file: tables with absolute paths, and the options it was made with.

What cannot be made again from a file is an error: a failed device, a device without a table, a path that leads to
another file now.
"""

from __future__ import annotations

import errno
import ipaddress
import os
from collections.abc import Mapping, Sequence
from typing import Final

from blkloom.boot.description import AttachOptions, CreateOptions, Description, ExportOptions, LoopOptions
from blkloom.boot.snapshots import check_store, has_memory, store_of
from blkloom.boot.stacking import is_absolute, is_device, paths, with_paths
from blkloom.control.client import Client
from blkloom.control.states import DeviceInfo, ExportState, NodeState, OpenedFile
from blkloom.errors import BackingError, DeviceFailed, UsageError
from blkloom.export.fuse.state import FuseDetails
from blkloom.export.kernel_nbd.state import KernelNbdDetails, KernelNbdOptions, usual_connections
from blkloom.export.nbd.details import NbdDetails
from blkloom.export.ublk.state import UblkDetails, UblkOptions
from blkloom.table import Table, parse_table
from blkloom.targets.registry import Targets

_DELETED: Final = " (deleted)"
"""End of the name of a deleted file in /proc."""
_LOAD_AGAIN: Final = "load it by its present path"
_WITH_FILE: Final = "fuse"
_OF_MACHINES: Final = "vhost-user"
_ON_FAILURE: Final = UblkOptions().on_failure
_TIMEOUT: Final = KernelNbdOptions().timeout
_FILE_MODE: Final = 0o600
"""Permissions of a FUSE file by default."""


def describe(client: Client, info: DeviceInfo, *, targets: Targets, links: Mapping[str, str]) -> Description:
    """The description of a device. links: stable names, by the paths of nodes. Raises DeviceFailed, UsageError,
    BackingError, TableError.
    """
    if info.state == "FAILED":
        cure = f"blkloom resume {info.name}, or blkloom remove {info.name}"
        raise DeviceFailed(f"device '{info.name}' has failed: {info.reason}", cure=cure)
    if not info.live:
        raise UsageError(f"device '{info.name}' has no table", cure="load one, and resume it")
    table = live_table(client, info, targets=targets, links=links)
    _check_snapshots(client, info, table, targets)
    return Description(
        table=table,
        create=_create_options(info),
        fault=info.fault,
        attach=_attach_options(info),
        exports=tuple(_export_options(info, export) for export in info.exports if _is_own(info, export)),
        loop=_loop_options(info),
    )


def live_table(client: Client, info: DeviceInfo, *, targets: Targets, links: Mapping[str, str]) -> Table:
    """The live table of a device, with absolute paths, and stable names in place of nodes. Raises BackingError."""
    table = parse_table(client.table(info.name), targets=targets, source=f"table of {info.name}")
    opened = {file.path: file for file in client.files(info.name)}

    def changed(path: str) -> str:
        if path in links:
            return links[path]
        if is_device(path):
            return path
        numbers = is_absolute(path) and not os.path.isabs(path)
        found = opened.get(f"/dev/block/{path}" if numbers else path)
        if found is None:  # a socket of a device, or a file that the target has not open now
            if not os.path.isabs(path):
                raise BackingError("is relative, and not open", path=path, errno=errno.ENOENT, cure="load it again")
            return path
        _check_same(path, found)
        return path if os.path.isabs(path) else found.name

    table = with_paths(table, changed)
    known = set(paths(table))
    for path, file in opened.items():
        if not (os.path.isabs(path) or {path, file.name} & known):
            what = "is relative, and its target does not say which of its arguments are paths"
            raise BackingError(what, path=path, errno=errno.EINVAL, cure="load it with an absolute path")
    return table


def _check_snapshots(client: Client, info: DeviceInfo, table: Table, targets: Targets) -> None:
    """Raises UsageError for a snapshot that is partly in memory, and for the memory of one."""
    folder = str(client.run_dir.devices)

    def lower(name: str) -> Table:
        return parse_table(client.table(name), targets=targets, source=f"table of {name}")

    check_store(info.name, table, lower, folder)
    for holder in info.holders if has_memory(table) else ():
        if store_of(lower(holder), folder) == info.name:
            what = f"device '{info.name}' is the store of '{holder}' in memory"
            raise UsageError(what, cure="take snapshots with --file")


def _check_same(path: str, opened: OpenedFile) -> None:
    """Raises BackingError if the path would lead to another file than the open one, or to none."""
    try:
        status = os.stat(path if os.path.isabs(path) else opened.name)
    except OSError as error:
        if opened.name.endswith(_DELETED):
            cure = "its data ends with the device: copy it"
            raise BackingError("was deleted", path=path, errno=errno.ENOENT, cure=cure) from error
        what = f"the device has it open, and its path does not lead there now: {error.strerror}"
        raise BackingError(what, path=path, errno=error.errno or errno.EIO, cure=_LOAD_AGAIN) from error
    if (status.st_dev, status.st_ino) != (opened.device, opened.inode):
        what = "leads to another file now than the one that the device has open"
        raise BackingError(what, path=path, errno=errno.ESTALE, cure=_LOAD_AGAIN)


def _create_options(info: DeviceInfo) -> CreateOptions:
    node = info.node_options
    return CreateOptions(
        uuid=info.uuid,
        read_only=info.read_only,
        shared=info.shared,
        autoclear=info.autoclear,
        mode=node.mode,
        uid=node.uid,
        gid=node.gid,
        no_scan=not node.scan,
    )


def _attach_options(info: DeviceInfo) -> AttachOptions | None:
    node = info.node
    if node is None or not node.path or node.lazy:
        return None
    export = next(export for export in info.exports if export.id == node.export)
    on_failure = UblkDetails.of(export).on_failure if export.kind == "ublk" else _ON_FAILURE
    of_nbd = KernelNbdDetails.of(export) if export.kind == "kernel-nbd" else None
    return AttachOptions(
        via=node.via,
        read_only=node.read_only,
        partscan=node.partitions,
        shared=_is_shared(info, node),
        on_failure="" if on_failure == _ON_FAILURE else on_failure,
        timeout=None if of_nbd is None or of_nbd.timeout == _TIMEOUT else of_nbd.timeout,
        connections=None if of_nbd is None or of_nbd.connections == usual_connections() else of_nbd.connections,
    )


def _is_shared(info: DeviceInfo, node: NodeState) -> bool:
    """Whether it was attached with --shared: other exports may be for writing."""
    return node.via != _WITH_FILE and not (node.exclusive or node.read_only or info.read_only)


def _is_own(info: DeviceInfo, export: ExportState) -> bool:
    """Whether a user has added the export: not the socket that every device has, nor what a node uses."""
    if info.node is not None and export.id == info.node.export:
        return False
    return export.kind in {_WITH_FILE, _OF_MACHINES} or (export.kind == "nbd" and not export.automatic)


def _export_options(info: DeviceInfo, export: ExportState) -> ExportOptions:
    shared = info.node is not None and info.node.exclusive and not export.read_only
    if export.kind == _WITH_FILE:
        details = FuseDetails.of(export)
        user, group, mode = details.owner
        return ExportOptions(
            fuse=True,
            path="" if export.automatic else export.path,
            fuse_uring=details.uring,
            allow_other=details.allow_other,
            uid=user if user != os.geteuid() else None,
            gid=group if group != os.getegid() else None,
            mode=mode if mode != _FILE_MODE else None,
            read_only=export.read_only,
            shared=shared,
        )
    if export.kind == _OF_MACHINES:
        return ExportOptions(
            vhost_user=True,
            path="" if export.automatic else export.path,
            socket_mode=export.socket.mode,
            socket_owner=export.socket.uid,
            socket_group=export.socket.gid,
            read_only=export.read_only,
            shared=shared,
        )
    host = f"[{export.host}]" if ":" in export.host else export.host
    of_nbd = NbdDetails.parse(export.details)
    return ExportOptions(
        tls="" if of_nbd.tls.mode == "off" else of_nbd.tls.mode,
        tls_certificates=of_nbd.tls.certificates,
        tls_verify_peer=of_nbd.tls.verify_peer,
        tls_psk=of_nbd.tls.psk,
        allow_address=of_nbd.access.addresses,
        allow_user=tuple(map(str, of_nbd.access.users)),
        allow_certificate=of_nbd.access.certificates,
        read_only_for=of_nbd.access.read_only_for,
        max_connections_per_peer=of_nbd.per_host,
        socket_mode=export.socket.mode,
        socket_owner=export.socket.uid,
        socket_group=export.socket.gid,
        socket=export.unix,
        listen="" if export.unix else f"{host}:{export.port}",
        allow_remote=not export.unix and not _is_loopback(export.host),
        name=export.name if export.name != info.name else "",
        read_only=export.read_only,
        shared=shared,
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _loop_options(info: DeviceInfo) -> LoopOptions | None:
    if (loop := info.loop) is None:
        return None
    return LoopOptions(sizelimit=loop.sizelimit, partscan=loop.partscan, partition=loop.partition, shared=loop.shared)


def stable_names(infos: Sequence[DeviceInfo]) -> dict[str, str]:
    """The stable names of nodes, by their paths."""
    return {info.node.path: info.node.link for info in infos if info.node is not None and info.node.path}
