"""JSON of messages and of saved states, in which paths need not be UTF-8.

Python has bytes that are not UTF-8 as lone surrogates (`os.fsdecode`). JSON can write them as escapes, but msgspec
neither writes nor reads those: values that have some take the way through the standard library, which is imported then.
"""

from __future__ import annotations

from typing import Any, Final, TypeVar

import msgspec

T = TypeVar("T")
_ENCODER: Final = msgspec.json.Encoder()


def encode(value: Any) -> bytes:
    """One line. Raises UnicodeEncodeError: text that is no path either; OverflowError: an integer of more than
    64 bits.
    """
    try:
        return _ENCODER.encode(value)
    except UnicodeEncodeError:
        import json

        plain = msgspec.to_builtins(value)
        _check(plain)
        return json.dumps(plain, allow_nan=False, separators=(",", ":")).encode("ascii")


def decode(data: bytes, decoder: msgspec.json.Decoder[T]) -> T:
    """Raises msgspec.ValidationError: JSON, but not of the decoder's type. msgspec.DecodeError: no JSON."""
    try:
        return decoder.decode(data)
    except msgspec.ValidationError:
        raise
    except msgspec.DecodeError as error:
        if b"\\u" not in data:
            raise
        import json

        try:
            value = json.loads(data.decode("utf-8"), parse_constant=_no_number)
            _check(value)
        except (ValueError, RecursionError):
            raise error from None
        found: T = msgspec.convert(value, decoder.type)
        return found


def _check(value: Any) -> None:
    """Raises UnicodeEncodeError for surrogates that stand for no byte."""
    import json

    json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogateescape")


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number of JSON")
