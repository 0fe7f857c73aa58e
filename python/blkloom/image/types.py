"""Types of addresses and arrays that every image format uses. Pure."""

from __future__ import annotations

from typing import NewType, TypeAlias

import numpy as np
from numpy.typing import NDArray

GuestOffset = NewType("GuestOffset", int)
"""Bytes from the start of the disk that the guest sees."""

HostOffset = NewType("HostOffset", int)
"""Bytes from the start of a file: the image, its data file, a raw backing file."""

Words: TypeAlias = NDArray[np.uint64]
"""64-bit numbers of a table, in the machine's byte order."""
