"""Formats numbers for narrow columns. Pure."""

from __future__ import annotations

from typing import Final

_COUNTS: Final = ("", "k", "M", "G", "T")
_SIZES: Final = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


def short_count(value: float) -> str:
    """`"0"`, `"0.5"`, `"12"`, `"9,876"`, `"98.8k"`, `"1.23M"`: six characters at most, up to 10^15."""
    if value < 9.95:
        return f"{value:.1f}".removesuffix(".0")
    if value < 9999.5:
        return f"{value:,.0f}"
    for suffix in _COUNTS:
        if value < 999.5 or suffix == _COUNTS[-1]:
            break
        value /= 1000
    return f"{_three_digits(value)}{suffix}"


def short_size(count: float) -> str:
    """`"0 B"`, `"512 B"`, `"1.5 KiB"`, `"64 MiB"`, `"0.98 GiB"`: eight characters at most."""
    for unit in _SIZES:
        if count < 999.5 or unit == _SIZES[-1]:
            break
        count /= 1024
    digits = f"{count:.0f}" if unit == "B" else _three_digits(count)
    return f"{digits.rstrip('0').rstrip('.') if '.' in digits else digits} {unit}"


def _three_digits(value: float) -> str:
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:.0f}"
