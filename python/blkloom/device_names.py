r"""Names and uuids of devices: what dmsetup allows, and how it mangles them.

Characters that udev would not like in a node's name are written `\xNN`, a byte each. blkloom keeps the
*real* name ("my disk"); the *mangled* one (`my\x20disk`) names its socket, and is what a dmsetup user
may type and sees with `--manglename none`. Pure functions; what can fail raises `DeviceNameError`, whose
text is dmsetup's. Source: libdm-common.c (mangle_string, unmangle_string, dm_task_set_name), dm-ioctl.h.
"""

from __future__ import annotations

import os
import re
from enum import Enum
from typing import Final

from blkloom.errors import UsageError

MAJOR: Final = 0
"""What stands where the kernel has a major number: blkloom's devices have none of the kernel's."""
LONGEST_NAME: Final = 127
"""Bytes of a mangled name (DM_NAME_LEN without the NUL)."""
LONGEST_UUID: Final = 128
"""Bytes of a mangled uuid (DM_UUID_LEN without the NUL)."""
STACKED: Final = "blkloom:"
"""Prefix of a name where a path may be, too: in tables, for example."""

_RESERVED: Final = frozenset({".", "..", "control"})
_FOREIGN: Final = re.compile(rb"[^A-Za-z0-9#+\-.:=@_]")
_MANGLED: Final = re.compile(rb"\\x([0-9A-Fa-f]{2})")


class DeviceNameError(UsageError):
    """A name or uuid that no device can have."""

    exit_code = 1


class MangleError(DeviceNameError):
    """One that cannot be mangled."""


class ReservedNameError(DeviceNameError):
    """One with a meaning of its own."""


class Mangling(Enum):
    """How names on the command line are meant and shown (`--manglename`)."""

    AUTO = "auto"
    """Real names; one with `\\xNN` in it is taken as mangled already."""
    HEX = "hex"
    """Real names, whatever is in them."""
    NONE = "none"
    """Names as device-mapper keeps them: mangled."""


def mangle(text: str) -> str:
    r"""The mangled form, in ASCII: every byte that is not one of `A-Za-z0-9#+-.:=@_` as `\xNN`."""
    return _FOREIGN.sub(lambda found: b"\\x%02x" % found[0][0], os.fsencode(text)).decode("ascii")


def unmangle(text: str) -> str:
    r"""Every `\xNN` as the byte it stands for: `unmangle(mangle(x)) == x`."""
    return os.fsdecode(_MANGLED.sub(lambda found: bytes([int(found[1], 16)]), os.fsencode(text)))


def read_name(text: str, mode: Mangling, *, what: str = "name") -> str:
    """The real name that `text` of a command line means. Raises DeviceNameError.

    what: "name", "new name" or "UUID", for the error.
    """
    if mode is Mangling.HEX:
        return text
    raw = os.fsencode(text)
    if mode is Mangling.AUTO:
        if b"\\x5cx" in raw:
            raise DeviceNameError(
                f'The {what} "{text}" seems to be mangled more than once. This is not allowed in auto mode.',
                cure="write it without \\x, or use --manglename hex",
            )
        parts = raw.split(b"\\x")
        rest = b"".join([parts[0], *(part[2:] for part in parts[1:])])
        # As dmsetup: four characters from the backslash on are taken as they are, then looked at here.
        well_formed = all(re.match(rb"[0-9A-Fa-f]{2}", part) for part in parts[1:])
        if len(parts) > 1 and (not well_formed or _FOREIGN.search(rest)):
            raise MangleError(
                f'The {what} "{text}" contains mixed mangled and unmangled characters '
                "or it's already mangled improperly.",
                cure="mangle every character outside A-Za-z0-9#+-.:=@_, or none",
            )
    return unmangle(text)


def show_name(name: str, mode: Mangling) -> str:
    """A real name as the command shows it."""
    return mangle(name) if mode is Mangling.NONE else name


def check_name(name: str, *, what: str = "name") -> str:
    """`name`, if a device may have it. Raises DeviceNameError: empty, too long, with a slash."""
    if not name:
        raise DeviceNameError("Non empty new name is required." if what == "new name" else "No device specified.")
    if "/" in name:
        raise DeviceNameError(f'Name "{name}" invalid. It contains "/".', cure="a name is one word, not a path")
    _check_text(name, what)
    if len(os.fsencode(name)) > LONGEST_NAME:
        raise DeviceNameError(
            f'Name "{name}" too long' + ("" if what == "new name" else "."), cure=f"{LONGEST_NAME} bytes at most"
        )
    if len(mangle(name)) > LONGEST_NAME:
        raise MangleError(
            f'Mangled form of the {what} too long for "{name}".', cure=f"{LONGEST_NAME} bytes at most, \\xNN being four"
        )
    return name


def check_new_name(name: str, *, what: str = "name") -> str:
    """`name`, if a device may be given it. Raises DeviceNameError as `check_name`, and for `.`, `..` and
    `control`, which the kernel refuses too.
    """
    if check_name(name, what=what) in _RESERVED:
        raise ReservedNameError(f'Name "{name}" is reserved.', cure="take another")
    return name


def check_uuid(uuid: str) -> str:
    """`uuid`, if a device may have it. Raises DeviceNameError: too long."""
    _check_text(uuid, "UUID")
    if len(mangle(uuid)) > LONGEST_UUID:
        raise MangleError(f'Mangled form of the UUID too long for "{uuid}".', cure=f"{LONGEST_UUID} bytes at most")
    return uuid


def _check_text(text: str, what: str) -> None:
    """A name travels in JSON and ends up in a path."""
    if "\0" in text:
        raise DeviceNameError(f"The {what} '{text}' contains a NUL character.")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DeviceNameError(f"The {what} '{text}' is not UTF-8.", cure="blkloom's names are text") from None
