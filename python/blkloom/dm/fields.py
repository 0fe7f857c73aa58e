"""The columns of `info -c`: those of dmsetup, with its names, headings and widths, and those of blkloom.

A field has a text to show, and a value for sorting and selection. Source: dmsetup.c
(_report_fields).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import msgspec

from blkloom.control.states import DeviceInfo
from blkloom.device_names import MAJOR, mangle
from blkloom.dm.dependencies import Dependency, block_name, dependencies
from blkloom.dm.showing import files
from blkloom.units import SECTOR

Value = str | int


class Row(msgspec.Struct, frozen=True):
    """A device as input of the fields. others: every device, by name. directory: where its socket is."""

    info: DeviceInfo
    others: Mapping[str, DeviceInfo] = msgspec.field(default_factory=dict)
    directory: str = ""
    shown: str = ""
    """The name in the mangling mode of the output."""

    def deps(self) -> list[Dependency]:
        """Its dependencies, in the order of the kernel."""
        return dependencies(self.info, self.others)

    def holders(self) -> list[DeviceInfo]:
        """The devices above it, by name."""
        return [self.others[name] for name in sorted(self.info.holders) if name in self.others]


class Field(msgspec.Struct, frozen=True):
    """One column. value: returns its content; numbers are aligned to the right."""

    id: str
    heading: str
    width: int
    value: Callable[[Row], Value]
    help: str
    number: bool = False


class Section(msgspec.Struct, frozen=True):
    """A group of fields. prefix: `<prefix>all` selects all of them."""

    title: str
    prefix: str
    fields: tuple[Field, ...]


def attributes(info: DeviceInfo) -> str:
    """The four attribute letters of dmsetup."""
    letters = ("L" if info.live else "-", "I" if info.inactive else "-")
    return "".join(letters) + ("s" if info.state == "SUSPENDED" else "-") + ("r" if info.read_only else "w")


def _tables(info: DeviceInfo) -> str:
    return {(True, True): "Both", (True, False): "Live", (False, True): "Inactive"}.get(
        (info.live, info.inactive), "None"
    )


def _numbers(info: DeviceInfo) -> str:
    return f"{MAJOR}:{info.minor}"


SECTIONS: Final = (
    Section(
        "Mapped Device Name",
        "name_",
        (
            Field("name", "Name", 16, lambda row: row.shown or row.info.name, "Name of mapped device."),
            Field(
                "mangled_name",
                "MangledName",
                16,
                lambda row: mangle(row.info.name),
                "Mangled name of mapped device.",
            ),
            Field(
                "unmangled_name",
                "UnmangledName",
                16,
                lambda row: row.info.name,
                "Unmangled name of mapped device.",
            ),
            Field(
                "uuid",
                "UUID",
                32,
                lambda row: row.info.uuid,
                "Unique (optional) identifier for mapped device.",
            ),
            Field(
                "mangled_uuid",
                "MangledUUID",
                32,
                lambda row: mangle(row.info.uuid),
                "Mangled unique (optional) identifier for mapped device.",
            ),
            Field(
                "unmangled_uuid",
                "UnmangledUUID",
                32,
                lambda row: row.info.uuid,
                "Unmangled unique (optional) identifier for mapped device.",
            ),
            Field("read_ahead", "RAhead", 6, lambda _: 0, "Read ahead value (0: clients read ahead).", number=True),
        ),
    ),
    Section(
        "Mapped Device Information",
        "info_",
        (
            Field(
                "blkdevname",
                "BlkDevName",
                16,
                lambda row: mangle(block_name(row.info)),
                "Kernel's name of its node; else the name of its socket in the run directory's dev.",
            ),
            Field(
                "attr",
                "Stat",
                4,
                lambda row: attributes(row.info),
                "(L)ive, (I)nactive, (s)uspended, (r)ead-only, read-(w)rite.",
            ),
            Field(
                "tables_loaded",
                "Tables",
                6,
                lambda row: _tables(row.info),
                "Which of the live and inactive table slots are filled.",
            ),
            Field(
                "suspended",
                "Suspended",
                9,
                lambda row: "Suspended" if row.info.state == "SUSPENDED" else "Active",
                "Whether the device is suspended.",
            ),
            Field(
                "readonly",
                "Read-only",
                9,
                lambda row: "Read-only" if row.info.read_only else "Writeable",
                "Whether the device is read-only or writeable.",
            ),
            Field("devno", "DevNo", 5, lambda row: _numbers(row.info), "Device major and minor numbers"),
            Field("major", "Maj", 3, lambda _: MAJOR, "Block device major number (none: 0).", number=True),
            Field("minor", "Min", 3, lambda row: row.info.minor, "Block device minor number.", number=True),
            Field(
                "open",
                "Open",
                4,
                lambda row: row.info.open_count,
                "Number of references to open device.",
                number=True,
            ),
            Field(
                "segments",
                "Targ",
                4,
                lambda row: row.info.targets,
                "Number of segments in live table, if present.",
                number=True,
            ),
            Field("events", "Event", 6, lambda row: row.info.event, "Number of most recent event.", number=True),
        ),
    ),
    Section(
        "Mapped Device Relationship Information",
        "deps_",
        (
            Field(
                "device_count",
                "#Devs",
                5,
                lambda row: len(row.deps()),
                "Number of devices used by this one.",
                number=True,
            ),
            Field(
                "devs_used",
                "DevNamesUsed",
                16,
                lambda row: ",".join(dep.device.name for dep in row.deps() if dep.device),
                "List of names of mapped devices used by this one.",
            ),
            Field(
                "devnos_used",
                "DevNosUsed",
                16,
                lambda row: ",".join(dep.number(":") for dep in row.deps()),
                "List of device numbers (of files: paths) of devices used by this one.",
            ),
            Field(
                "blkdevs_used",
                "BlkDevNamesUsed",
                16,
                lambda row: ",".join(dep.block_name for dep in row.deps()),
                "List of names of block devices (of files: paths) used by this one.",
            ),
            Field(
                "device_ref_count",
                "#Refs",
                5,
                lambda row: len(row.holders()),
                "Number of mapped devices referencing this one.",
                number=True,
            ),
            Field(
                "names_using_dev",
                "RefNames",
                8,
                lambda row: ",".join(holder.name for holder in row.holders()),
                "List of names of mapped devices using this one.",
            ),
            Field(
                "devnos_using_dev",
                "RefDevNos",
                9,
                lambda row: ",".join(_numbers(holder) for holder in row.holders()),
                "List of device numbers of mapped devices using this one.",
            ),
        ),
    ),
    Section(
        "blkloom",
        "loom_",
        (
            Field("size", "Size", 10, lambda row: row.info.size, "Bytes.", number=True),
            Field("sectors", "Sectors", 9, lambda row: row.info.size // SECTOR, "Sectors of 512 bytes.", number=True),
            Field("state", "State", 9, lambda row: row.info.state, "ACTIVE, SUSPENDED or FAILED."),
            Field("reason", "Reason", 6, lambda row: row.info.reason, "Why it failed."),
            Field("fault", "Fault", 5, lambda row: row.info.fault, "What `blkloom fault` has made of it."),
            Field("targets", "Targets", 8, lambda row: ",".join(row.info.types), "Targets of the live table."),
            Field("clients", "Clients", 7, lambda row: row.info.connections, "Connected clients.", number=True),
            Field("worker", "Worker", 6, lambda row: row.info.worker, "Process id of its worker.", number=True),
            Field("restarts", "Restarts", 8, lambda row: row.info.restarts, "Deaths of its worker.", number=True),
            Field(
                "io_errors", "IOErrs", 6, lambda row: row.info.io_errors, "Requests its storage failed.", number=True
            ),
            Field("last_io_error", "LastIOErr", 9, lambda row: row.info.last_io_error, "The last of them."),
            Field(
                "socket",
                "Socket",
                16,
                lambda row: next((e.address for e in row.info.exports if e.automatic), ""),
                "Its Unix socket, for NBD clients.",
            ),
            Field(
                "file",
                "File",
                16,
                lambda row: ",".join(files(row.info)),
                "Its files, for programs that open one.",
            ),
            Field(
                "node",
                "Node",
                12,
                lambda row: row.info.node.path if row.info.node else "",
                "Its node, where it is attached: a block device, or a file.",
            ),
            Field("node_via", "Via", 4, lambda row: row.info.node.via if row.info.node else "", "How it is attached."),
            Field(
                "node_users",
                "NodeUsers",
                9,
                lambda row: ",".join(row.info.node.used_by) if row.info.node else "",
                "Who uses the node.",
            ),
            Field(
                "exports",
                "Exports",
                7,
                lambda row: ",".join(e.address for e in row.info.exports),
                "All places where it is reached.",
            ),
        ),
    ),
)

DEFAULT: Final = "name,major,minor,attr,open,segments,events,uuid"
