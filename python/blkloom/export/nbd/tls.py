"""TLS of a server: whether clients must use it, and the credentials.

`TlsSettings` are paths and words: they may be in messages, state files and logs. The contents of the files are the
engine's only.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Literal

import msgspec

from blkloom.errors import UsageError
from blkloom.printing import described

if TYPE_CHECKING:
    from blkloom import _engine

TlsMode = Literal["off", "allow", "require"]
"""off: STARTTLS is refused (NOTLS in the specification). allow: the client chooses (SELECTIVETLS). require: every
other option is refused before it (FORCEDTLS).
"""


class TlsSettings(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """certificates: a directory with the files that qemu-nbd and nbdkit use: `server-cert.pem`, `server-key.pem`,
    `ca-cert.pem`, `ca-crl.pem`. psk: a file of pre-shared keys. verify_peer: clients need a certificate of that
    authority. Raises UsageError.
    """

    mode: TlsMode = "off"
    certificates: str = ""
    psk: str = ""
    verify_peer: bool = False

    def __post_init__(self) -> None:
        if self.mode == "off":
            if self.certificates or self.psk or self.verify_peer:
                raise UsageError("certificates and keys without TLS", cure="say --tls=require or --tls=allow")
        elif bool(self.certificates) == bool(self.psk):
            what = "TLS needs either certificates or pre-shared keys"
            raise UsageError(what, cure="--tls-certificates DIRECTORY or --tls-psk FILE")
        if self.verify_peer and self.psk:
            raise UsageError("clients with a pre-shared key have no certificate", cure="leave out --tls-verify-peer")
        for path in (self.certificates, self.psk):
            if path and not os.path.isabs(path):
                raise UsageError(f"{path}: the path of credentials must be absolute", cure="begin it with /")

    @property
    def proves_clients(self) -> bool:
        """Whether clients over TLS have a name that was verified."""
        return self.mode != "off" and (self.verify_peer or bool(self.psk))

    @property
    def requires_proof(self) -> bool:
        """Whether every client must prove who it is: TLS alone only encrypts."""
        return self.mode == "require" and self.proves_clients


class Tls:
    """TLS of one server. Without credentials that can be used, it refuses clients until `reload`."""

    def __init__(self, settings: TlsSettings) -> None:
        self.settings = settings
        self._server: _engine.TlsServer | None = None

    @property
    def mode(self) -> TlsMode:
        """Whether clients must use TLS."""
        return self.settings.mode

    def reload(self) -> None:
        """Reads the credentials, for clients that connect from now on. If they cannot be used, those before stay, and
        this raises UsageError, which names the file.
        """
        self._server = _read(self.settings)

    def accept(self, descriptor: int) -> _engine.TlsSession:
        """A TLS session on a connected socket. Raises OSError."""
        if self._server is None:
            raise OSError(errno.EACCES, "this server has no TLS credentials that it can use")
        return self._server.accept(descriptor)


def _read(settings: TlsSettings) -> _engine.TlsServer | None:
    if settings.mode == "off":
        return None
    from blkloom import _engine  # a handshake needs no engine

    try:
        return _engine.TlsServer(
            certificates=settings.certificates or None,
            psk=settings.psk or None,
            verify_peer=settings.verify_peer,
        )
    except (OSError, ValueError) as error:
        said = described(error) if isinstance(error, OSError) else str(error)
        cure = "give the server credentials that it can read, and try again"
        raise UsageError(f"TLS cannot be used: {said}", cure=cure) from error
