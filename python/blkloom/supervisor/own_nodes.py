"""Refuses tables whose files lie on a node of their own device: a request would wait for itself.

A file may lie on a file system on the node, or be the node, with other devices between. Runs on the event loop; asks
no file system.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator

from blkloom.attach.hosting import hosts_of, numbers_of
from blkloom.control.descriptor_store import DescriptorStore
from blkloom.control.states import file_path
from blkloom.errors import BackingError
from blkloom.supervisor.registry import Entry, Registry


def check_files(registry: Registry, store: DescriptorStore, entry: Entry, load: int, below: frozenset[int]) -> None:
    """Raises BackingError. load: of the table, whose files are in the store. below: the devices below it."""
    owners = {number: other for other in registry for number in numbers_of(other.node, other.exports)}
    if not owners:
        return
    seen = {entry.minor}
    pending = [(entry, frozenset({load}), below)]
    while pending:
        device, loads, lowers = pending.pop()
        for path, descriptor in _files(store, device, loads):
            for owner in [owners[number] for number in hosts_of(descriptor) if number in owners]:
                if owner is entry:
                    through = "" if device is entry else f" (below device '{device.name}')"
                    what = f"lies on the node of device '{entry.name}', which needs it{through}"
                    raise BackingError(what, path=path, errno=errno.ELOOP, cure="keep it elsewhere")
                lowers |= {owner.minor}
        for lower in [other for minor in lowers - seen if (other := registry.get(minor)) is not None]:
            if lower is not entry:
                seen.add(lower.minor)
                pending.append((lower, lower.loads, lower.below))


def _files(store: DescriptorStore, device: Entry, loads: frozenset[int]) -> Iterator[tuple[str, int]]:
    """Path and descriptor of each file of these tables."""
    for label, descriptor in store.of([device.minor]):
        if label.role == "file" and label.load in loads:
            yield file_path(label), descriptor
