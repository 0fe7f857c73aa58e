"""Metadata of a new image: header, refcount table, refcount blocks and an empty L1 table, one after the other.

Version 3, with refcounts of 16 bits and without optional features, which every program reads. The tables of qemu-img
create with the same cluster size are of the same sizes. Pure. May fail: UsageError.

Source: QEMU docs/interop/qcow2.
"""

from __future__ import annotations

import struct
from typing import Final

from blkloom.errors import UsageError
from blkloom.image.qcow2.format.geometry import Geometry
from blkloom.image.qcow2.format.header import L1_LIMIT, Header, encode
from blkloom.image.types import HostOffset
from blkloom.units import format_size

CLUSTER_BITS: Final = 16
"""Clusters of 64 KiB, as qemu-img makes them."""
_REFCOUNT: Final = 2
"""Bytes of a refcount."""
_POINTER: Final = 8
"""Bytes of an entry of the L1 or refcount table."""
_HEADER_LENGTH: Final = 112
"""Bytes of the header's fields, with the compression type, as in QEMU 5.1 and newer."""


def new_image(size: int, cluster_bits: int = CLUSTER_BITS) -> bytes:
    """The first bytes of an image with an empty disk of `size` bytes, a multiple of 512. The file may end there."""
    geometry = Geometry(cluster_bits)
    cluster = geometry.cluster
    l1_size = geometry.l1_entries(size)
    if l1_size * _POINTER > L1_LIMIT:
        most = format_size(L1_LIMIT // _POINTER * geometry.l2_span)
        raise UsageError(
            f"a disk of {format_size(size)} does not fit into an image with clusters of {format_size(cluster)}",
            cure=f"the most is {most}; make the image with larger clusters (qemu-img create -o cluster_size=2M)",
        )
    l1_clusters = -(-l1_size * _POINTER // cluster)
    counted = cluster // _REFCOUNT
    blocks, table = 1, 1
    while (used := 1 + table + blocks + l1_clusters) > blocks * counted:
        blocks = -(-used // counted)
        table = -(-blocks * _POINTER // cluster)
    l1_offset = (1 + table + blocks) * cluster
    header = Header(
        version=3,
        cluster_bits=cluster_bits,
        size=size,
        l1_size=l1_size,
        l1_offset=HostOffset(l1_offset if l1_size else 0),
        refcount_table_offset=HostOffset(cluster),
        refcount_table_clusters=table,
        header_length=_HEADER_LENGTH,
    )
    pointers = struct.pack(f">{blocks}Q", *((1 + table + index) * cluster for index in range(blocks)))
    refcounts = struct.pack(">H", 1) * used
    parts = (
        encode(header, path=""),
        pointers.ljust(table * cluster, b"\0"),
        refcounts.ljust(blocks * cluster, b"\0"),
        bytes(l1_clusters * cluster),
    )
    return b"".join(parts)
