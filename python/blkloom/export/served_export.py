"""Base of the export servers whose clients the engine serves by one `Export`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blkloom import _engine
    from blkloom.control.states import ExportState


class ServedExport:
    """The methods of `export.exporter.ExportServer` that are the same for them. A subclass sets `_state` and `_export`,
    and, where users can remove what is served, `_gone`.
    """

    _state: ExportState
    _export: _engine.Export
    _gone: bool = False

    @property
    def state(self) -> ExportState:
        """The state of the export."""
        return self._state

    @property
    def export(self) -> _engine.Export:
        """The engine's."""
        return self._export

    @property
    def gone(self) -> bool:
        """Whether users have removed what is served."""
        return self._gone

    def stats(self) -> dict[str, Any]:
        """Counters since its start."""
        return self._export.stats()

    async def ready(self) -> None:
        """It is from the start."""

    async def end_handshakes(self) -> None:
        """There are none."""
