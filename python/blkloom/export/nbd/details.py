"""TLS and access of an NBD export: options of a call, and details in `ExportState`. Paths of keys, never keys."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import msgspec

from blkloom.errors import UsageError
from blkloom.export.nbd.access import AccessRules
from blkloom.export.nbd.tls import TlsSettings

if TYPE_CHECKING:
    from collections.abc import Mapping

    from blkloom.control.states import ExportState


class NbdDetails(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """`AddExport.options` and `ExportState.details`. per_host: see `ServerLimits`. Raises UsageError for rules about
    certificates without TLS that proves them.
    """

    tls: TlsSettings = TlsSettings()
    access: AccessRules = AccessRules()
    per_host: int = 0

    def __post_init__(self) -> None:
        if self.per_host < 0:
            raise UsageError(f"{self.per_host} connections of one host are not possible", cure="0: no limit")
        names = [*self.access.certificates, *(rule for rule in self.access.read_only_for if rule[:4] == "cert")]
        if names and not self.tls.proves_clients:
            what = f"a rule for '{names[0]}', and no client proves that it has this name"
            raise UsageError(what, cure="say --tls=require with --tls-verify-peer or --tls-psk")

    @classmethod
    def parse(cls, options: Mapping[str, Any]) -> Self:
        """The details that a call or a state has. Raises UsageError."""
        try:
            return msgspec.convert(dict(options), cls)
        except msgspec.ValidationError as error:
            cause = error.__cause__
            if isinstance(cause, UsageError):
                raise cause from None
            raise UsageError(f"options of an NBD export: {error}", cure="see blkloom.export.nbd.details") from error

    def put(self, state: ExportState) -> None:
        """Writes the details into a state."""
        state.details = msgspec.to_builtins(self)
