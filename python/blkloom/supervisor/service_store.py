"""systemd's descriptor store of the supervisor's service: copies of descriptors that outlive supervisor and workers.

systemd keeps FUSE connections and memory of RAM devices (`FileDescriptorStoreMax=` of the unit). If supervisor and
workers are killed together, it passes them to the next supervisor, and mounted file systems and the contents of memory
go on. Files are not stored: they are opened again by path. Without systemd nothing is stored. On the event loop.

A descriptor's name is `<role>.<device>.<load>.<key>`. Source: sd_notify(3), sd_listen_fds(3), systemd.service(5).
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable
from typing import Final, cast

from blkloom import open_files
from blkloom.control.descriptor_store import DescriptorStore
from blkloom.control.states import Label, Role, export_key, export_label
from blkloom.export.systemd import PassedDescriptor, ServiceNotifier
from blkloom.supervisor.registry import Registry

_log = logging.getLogger(__name__)
_NAME: Final = re.compile(r"(export|memory|changes)\.([0-9]{1,18})\.([0-9]{1,18})\.(.+)")


class ServiceStore:
    """Implements `descriptor_store.Mirror`."""

    def __init__(self, notifier: ServiceNotifier) -> None:
        self._notifier = notifier

    def keep(self, label: Label, fd: int) -> None:
        """Stores a copy, if it is of a role that is stored."""
        if (name := stored_name(label)) is not None:
            self._notifier.store(name, fd)

    def forget(self, label: Label) -> None:
        """Closes the stored copy."""
        if (name := stored_name(label)) is not None:
            self._notifier.forget(name)


def stored_name(label: Label) -> str | None:
    """The name of a descriptor in systemd's store; None: it is not stored. Memory without a load (0) belongs to a
    hand-over, which ends with its processes.
    """
    if label.role == "export" or (label.role in ("memory", "changes") and label.load):
        return f"{label.role}.{label.device}.{label.load}.{label.key}"
    return None


def stored_label(name: str) -> Label | None:
    """The label for a name of `stored_name`; None for another name."""
    if (found := _NAME.fullmatch(name)) is None:
        return None
    return Label(role=cast("Role", found[1]), device=int(found[2]), load=int(found[3]), key=found[4])


def take_stored(store: DescriptorStore, passed: Iterable[PassedDescriptor]) -> list[PassedDescriptor]:
    """Moves the stored ones of the descriptors that systemd has passed into the store. Returns the others."""
    others, taken = [], []
    for descriptor in passed:
        if (label := stored_label(descriptor.name)) is None:
            others.append(descriptor)
        else:
            os.set_inheritable(descriptor.fd, False)
            store.adopt(label, descriptor.fd)
            taken.append(label)
    if taken:
        _drop_incomplete(store, taken)
    return others


def _drop_incomplete(store: DescriptorStore, labels: Iterable[Label]) -> None:
    """Drops what is left of FUSE connections that have ended: systemd has closed their descriptor. Their files are
    mounted again.
    """
    from blkloom.export.fuse.endpoints import DEVICE, RECORD

    for label in labels:
        export, key = export_key(label)
        if label.role == "export" and key == RECORD:
            connection = export_label(label.device, export, label.role, DEVICE)
            if store.find(connection) is None:
                store.drop([label])


def drop_unknown(store: DescriptorStore, registry: Registry) -> None:
    """Drops the descriptors of devices, exports and tables that do not exist any more; logs them."""

    def is_known(label: Label) -> bool:
        if (entry := registry.get(label.device)) is None:
            return False
        if label.role == "export":
            return export_key(label)[0] in {export.id for export in entry.exports}
        return label.load in entry.loads or not label.load

    for label in store.drop_unknown(is_known):
        _log.info("a stored descriptor belongs to nothing and was closed: %s", stored_name(label) or label.role)


def close_unused(passed: Iterable[PassedDescriptor]) -> None:
    """Closes passed descriptors that nothing uses, with a warning."""
    for descriptor in passed:
        _log.warning("systemd has passed a descriptor of unknown use, which is closed: '%s'", descriptor.name)
        open_files.close(descriptor.fd)
