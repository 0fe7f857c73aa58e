"""`Session`: the control protocol of one front-end, and the queues of its device.

Requests are handled one after the other. Before memory, features or anything of a vring changes, its queue is detached
from the engine, which leaves waiting requests in the region of the requests in flight; then the queue is served again.
A vring that the front-end stops (GET_VRING_BASE) is drained first: all requests that were taken are answered.

During a live migration (Feature.LOG) no queue is served without the log in which written pages are marked. A queue that
is stopped then is also flushed: another host continues with the disk.

A session is paused between two requests for another worker. A request whose handling waits (for a queue to be drained)
is not handled then, and the other worker handles it. Runs on the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import os
import socket
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from typing import Any, Final

import msgspec

from blkloom import _engine
from blkloom.export.limited_log import LimitedLog
from blkloom.export.vhost_user.configuration import (
    MOST_DESCRIPTORS,
    MOST_QUEUES,
    PROTOCOL_FEATURES,
    WRITE_CACHE,
    Disk,
)
from blkloom.export.vhost_user.connection import Connection, Message
from blkloom.export.vhost_user.descriptors import is_event
from blkloom.export.vhost_user.messages import (
    CONFIGURATION_CHANGED,
    MOST_CONFIGURATION,
    MOST_SLOTS,
    Configuration,
    Feature,
    Inflight,
    Log,
    ProtocolError,
    ProtocolFeature,
    Region,
    Request,
    VringAddresses,
    VringEvent,
    VringValue,
    number,
    parse_number,
    parse_region,
    parse_regions,
    reply,
    request,
)
from blkloom.export.vhost_user.shared_files import SharedFiles, sealed_memory
from blkloom.export.vhost_user.vring import Vring, VringState
from blkloom.export.vhost_user.write_cache import WriteCache
from blkloom.peer_credentials import peer_credentials
from blkloom.printing import described


class SessionState(msgspec.Struct, kw_only=True, omit_defaults=True):
    """The part of a session that is no descriptor."""

    features: int = 0
    protocol_features: int = 0
    regions: list[Region] = []
    inflight: Inflight | None = None
    log: Log | None = None
    vrings: dict[int, VringState] = {}


class Session:
    """A front-end. disk: its configuration at present. engine, engine_disk, notices: of the engine. Each transport has
    a token of `tokens`.
    """

    def __init__(
        self,
        connection: Connection,
        disk: Callable[[], Disk],
        cache: WriteCache,
        engine: _engine.Engine,
        engine_disk: _engine.VhostUserDisk,
        log: LimitedLog,
    ) -> None:
        self._connection = connection
        self._disk = disk
        self._cache = cache
        self._engine = engine
        self._engine_disk = engine_disk
        self._log = log
        self._notices = _engine.Notices()
        self._tokens = itertools.count(1)
        self._served: dict[int, Vring] = {}
        """Vrings with a transport, by its token."""
        peer = peer_credentials(connection.socket)
        cache.begin(peer.pid)
        self._changed = asyncio.Event()
        """A transport has ended."""
        self.state = SessionState()
        self.vrings: dict[int, Vring] = {}
        # It has the user of this process, or is root.
        self.shared = SharedFiles(self._close, may_end_this=peer.may_command)
        self.backend: socket.socket | None = None
        """For requests to the front-end."""
        self._flushes: dict[int, asyncio.Future[None]] = {}
        """Flushes of the device, by token."""
        self._handled: Message | None = None
        """The request that is being handled."""
        asyncio.get_running_loop().add_reader(self._notices.fileno(), self._take_notices)

    # life

    async def run(self) -> str:
        """Handles requests until the front-end leaves. Returns why it has ended; the queues are served on."""
        try:
            while (message := await self._connection.receive()) is not None:
                self._handled = message
                await self._handle(message)
                self._handled = None
                self._close(message.descriptors)
        except ConnectionResetError:
            return "left"
        except ProtocolError as error:
            return f"dropped, it broke the protocol: {error}"
        except OSError as error:
            return f"lost: {described(error)}"
        return "left"

    async def pause(self, timeout: float | None) -> None:
        """Detaches all queues; requests that wait stay in flight. `run` was cancelled. Raises TimeoutError."""
        if self._handled is not None:
            self._connection.put_back(self._handled)
            self._handled = None
        await self._detach(self.vrings.values(), drain=False, timeout=timeout)

    async def resume(self) -> None:
        """Serves the queues again after a `pause` that took too long: waits for its end. Raises ProtocolError."""
        await self._detach(self.vrings.values(), drain=False, timeout=None)
        self._start_all()

    async def end(self, *, drain: float) -> bool:
        """Ends the queues and closes everything. drain: seconds for requests in flight to be answered. Returns whether
        that was enough; otherwise requests are left in flight.
        """
        drained = True
        if drain:
            try:
                await self._detach(self.vrings.values(), drain=True, timeout=drain)
            except TimeoutError:
                drained = False
        await self._detach(self.vrings.values(), drain=False, timeout=None)
        self._connection.hang_up()
        self.close()
        return drained

    def close(self) -> None:
        """Closes everything, also the queues."""
        asyncio.get_running_loop().remove_reader(self._notices.fileno())
        for vring in self.vrings.values():
            vring.close()
        if self._handled is not None:
            self._close(self._handled.descriptors)
        self.shared.close()
        if self.backend is not None:
            self._close([self.backend.detach()])
        self._connection.close()

    async def closed(self) -> None:
        """Waits until all descriptors are closed, for which a front-end can make it wait."""
        await self._connection.closing.wait()

    @property
    def connected(self) -> int:
        """Descriptor of the connection."""
        return self._connection.socket.fileno()

    @property
    def unhandled(self) -> tuple[bytes, list[int]]:
        """See `Connection.unhandled`."""
        return self._connection.unhandled

    def adopt(self) -> None:
        """Serves the queues of a session that another worker has paused; state, vrings and descriptors are set. Raises
        ProtocolError.
        """
        self._map_memory()
        self.shared.map_inflight(self.state.inflight)
        self.shared.map_log(self.state.log)
        self._start_all()

    def configuration_changed(self) -> None:
        """Tells the front-end to read the configuration again, where it wants to know."""
        if self.backend is None or not ProtocolFeature.CONFIGURATION & self.state.protocol_features:
            return
        try:
            # The front-end may make the socket blocking at any time.
            self.backend.send(request(CONFIGURATION_CHANGED), socket.MSG_DONTWAIT)
        except OSError as error:
            self._log.error("the front-end could not be told of a new size: %s", described(error))

    # requests

    async def _handle(self, message: Message) -> None:
        header = message.header
        try:
            known = Request(header.request)
        except ValueError:
            raise ProtocolError(f"request {header.request} is not known") from None
        if known in _ANSWERED:
            payload, descriptors = await _ANSWERED[known](self, message)
            try:
                self._connection.send(reply(known, payload), descriptors)
            finally:
                for descriptor in descriptors:
                    os.close(descriptor)
            return
        confirms = header.needs_reply and bool(ProtocolFeature.REPLY_ACK & self.state.protocol_features)
        try:
            await _OTHERS[known](self, message)
        except ProtocolError as error:
            if not confirms:
                raise
            self._log.error("%s of the front-end is refused: %s", known.name, error)
            self._connection.send(reply(known, number(1)))
        else:
            if confirms:
                self._connection.send(reply(known, number(0)))

    async def _get_features(self, _: Message) -> tuple[bytes, list[int]]:
        return number(self._disk().features()), []

    async def _get_protocol_features(self, _: Message) -> tuple[bytes, list[int]]:
        return number(PROTOCOL_FEATURES), []

    async def _get_queue_num(self, _: Message) -> tuple[bytes, list[int]]:
        return number(MOST_QUEUES), []

    async def _get_config(self, message: Message) -> tuple[bytes, list[int]]:
        wanted = Configuration.parse(message.payload)
        end = wanted.offset + wanted.size
        if end > MOST_CONFIGURATION:
            return b"", []  # the protocol's sign for an error
        disk = msgspec.structs.replace(self._disk(), write_cache=self._cache.is_on and not self._lacks_flush())
        data = disk.space()[wanted.offset : end]
        return Configuration(wanted.offset, wanted.size, wanted.flags, data).format(), []

    async def _get_vring_base(self, message: Message) -> tuple[bytes, list[int]]:
        index = VringValue.parse(message.payload).vring
        vring = self._vring(index)
        await self._drain([vring], flush=bool(Feature.LOG & self.state.features))
        vring.set_kick(-1)
        vring.state.failed = False
        if not any(other.kick >= 0 for other in self.vrings.values()):
            self._forget_log()  # the front-end takes no more marks from it, and sets another one before the next start
        if self.state.inflight is None and self.shared.inflight_memory is not None:
            self.shared.forget_inflight(index, self._inflight_stride())
        return VringValue(index, vring.state.base).format(), []

    async def _get_inflight_fd(self, message: Message) -> tuple[bytes, list[int]]:
        wanted = Inflight.parse(message.payload)
        if not (0 < wanted.queues <= MOST_QUEUES and 0 < wanted.queue_size <= MOST_DESCRIPTORS):
            what = f"{wanted.queues} queues of {wanted.queue_size} descriptors"
            raise ProtocolError(f"{what}; {MOST_QUEUES} of {MOST_DESCRIPTORS} are possible")
        size = wanted.queues * _engine.vhost_user_inflight_length(wanted.queue_size)
        return Inflight(size, 0, wanted.queues, wanted.queue_size).format(), [sealed_memory(size)]

    async def _set_features(self, message: Message) -> None:
        features = parse_number(message.payload)
        if other := features & ~int(self._disk().features()):
            raise ProtocolError(f"features {other:#x} were not offered")
        async with self._stopped(self.vrings.values()):
            self.state.features = features
            if not Feature.LOG & features:
                self._forget_log()

    async def _set_protocol_features(self, message: Message) -> None:
        features = parse_number(message.payload)
        if other := features & ~int(PROTOCOL_FEATURES):
            raise ProtocolError(f"protocol features {other:#x} were not offered")
        self.state.protocol_features = features

    async def _nothing(self, _: Message) -> None:
        """SET_OWNER, RESET_OWNER: the first begins a session, the second is deprecated and may be ignored."""

    async def _set_config(self, message: Message) -> None:
        wanted = Configuration.parse(message.payload)
        if (wanted.offset, wanted.size, len(wanted.data)) != (WRITE_CACHE, 1, 1):
            what = f"{wanted.size} bytes of the configuration at {wanted.offset}, in {len(wanted.data)} bytes"
            raise ProtocolError(f"{what}; only the write cache can be changed, 1 byte at {WRITE_CACHE}")
        async with self._stopped(self.vrings.values()):
            self._cache.switch(is_on=bool(wanted.data[0]))

    async def _set_mem_table(self, message: Message) -> None:
        regions = parse_regions(message.payload)
        if len(message.descriptors) != len(regions):
            raise ProtocolError(f"{len(regions)} regions of memory with {len(message.descriptors)} descriptors")
        async with self._stopped(self.vrings.values()):
            self.state.regions = regions
            self.shared.set_regions(message.descriptors)
            message.descriptors = []
            self._map_memory()

    async def _get_max_mem_slots(self, _: Message) -> tuple[bytes, list[int]]:
        return number(MOST_SLOTS), []

    async def _add_mem_reg(self, message: Message) -> None:
        region = parse_region(message.payload)
        if len(self.state.regions) >= MOST_SLOTS:
            raise ProtocolError(f"more than {MOST_SLOTS} regions of memory")
        async with self._stopped(self.vrings.values()):
            self.shared.regions.append(message.take())
            self.state.regions.append(region)
            try:
                self._map_memory()
            except ProtocolError:
                self.state.regions.pop()
                self._close([self.shared.regions.pop()])
                raise

    async def _rem_mem_reg(self, message: Message) -> None:
        region = parse_region(message.payload)
        found = [known for known in self.state.regions if _is_same(known, region)]
        if not found:
            raise ProtocolError(f"no region of memory of {region.size} bytes at {region.guest:#x}")
        async with self._stopped(self.vrings.values()):
            index = self.state.regions.index(found[0])
            del self.state.regions[index]
            self._close([self.shared.regions.pop(index)])
            self._map_memory()

    async def _set_log_base(self, message: Message) -> tuple[bytes, list[int]]:
        log = Log.parse(message.payload)
        async with self._stopped(self.vrings.values()):
            self.shared.set_log(message.take())
            self.state.log = log
            self.shared.map_log(self.state.log)
        return number(0), []

    async def _set_log_fd(self, message: Message) -> None:
        self.shared.set_log_event(self._take_event(message))

    async def _set_vring_num(self, message: Message) -> None:
        value = VringValue.parse(message.payload)
        vring = self._vring(value.vring)
        async with self._stopped([vring]):
            vring.set_size(value.value)

    async def _set_vring_addr(self, message: Message) -> None:
        addresses = VringAddresses.parse(message.payload)
        vring = self._vring(addresses.vring)
        async with self._stopped([vring]):
            vring.set_addresses(addresses)

    async def _set_vring_base(self, message: Message) -> None:
        value = VringValue.parse(message.payload)
        vring = self._vring(value.vring)
        async with self._stopped([vring]):
            vring.state.base = value.value & 0xFFFF

    async def _set_vring_kick(self, message: Message) -> None:
        event = VringEvent.parse(message.payload)
        vring = self._vring(event.vring)
        if not event.present:
            raise ProtocolError("a queue without an eventfd for kicks is not served: the worker would always poll it")
        async with self._stopped([vring]):
            vring.set_kick(self._event(message))
            vring.state.failed = False
            if not Feature.PROTOCOL & self.state.features:
                vring.state.enabled = True

    async def _set_vring_call(self, message: Message) -> None:
        self._vring(VringEvent.parse(message.payload).vring).set_call(self._event(message))

    async def _set_vring_err(self, message: Message) -> None:
        self._vring(VringEvent.parse(message.payload).vring).set_error(self._event(message))

    async def _set_vring_enable(self, message: Message) -> None:
        value = VringValue.parse(message.payload)
        vring = self._vring(value.vring)
        if not value.value:  # often followed by GET_VRING_BASE, after which the front-end expects no more answers
            await self._drain([vring])
        vring.state.enabled = bool(value.value)
        self._start_all()

    async def _set_backend_req_fd(self, message: Message) -> None:
        descriptor = message.take()
        try:
            backend = socket.socket(fileno=descriptor)
        except OSError as error:
            self._close([descriptor])
            raise ProtocolError(f"the channel for requests to the front-end is no socket: {error.strerror}") from error
        if (backend.family, backend.type) != (socket.AF_UNIX, socket.SOCK_STREAM):
            self._close([backend.detach()])
            raise ProtocolError("the channel for requests to the front-end is no Unix stream socket")
        backend.setblocking(False)
        if self.backend is not None:
            self._close([self.backend.detach()])
        self.backend = backend

    async def _set_inflight_fd(self, message: Message) -> None:
        inflight = Inflight.parse(message.payload)
        if not 0 < inflight.queue_size <= MOST_DESCRIPTORS:
            raise ProtocolError(f"requests in flight of queues of {inflight.queue_size} descriptors")
        async with self._stopped(self.vrings.values()):
            self.shared.set_inflight(message.take())
            self.state.inflight = inflight
            self.shared.map_inflight(self.state.inflight)

    # parts

    def _vring(self, index: int) -> Vring:
        if not 0 <= index < MOST_QUEUES:
            raise ProtocolError(f"vring {index}; there are {MOST_QUEUES}")
        return self.vrings.setdefault(index, Vring())

    def _event(self, message: Message) -> int:
        """The eventfd of a message; -1: none. Whether it blocks stays as it is: its file belongs to the front-end, too.
        Raises ProtocolError.
        """
        return self._take_event(message) if VringEvent.parse(message.payload).present else -1

    def _take_event(self, message: Message) -> int:
        descriptor = message.take()
        # Any other file might make the event loop of the engine wait.
        if not is_event(descriptor):
            self._close([descriptor])
            raise ProtocolError("a descriptor for kicks, calls or errors is no eventfd")
        return descriptor

    def _close(self, descriptors: list[int]) -> None:
        while descriptors:
            self._connection.closing.close(descriptors.pop())

    def _map_memory(self) -> None:
        self.shared.map_memory(self.state.regions)

    def _forget_log(self) -> None:
        self.shared.set_log(-1)
        self.state.log = None

    def _lacks_flush(self) -> bool:
        """Whether the driver may switch the cache, but cannot flush it: it has none then."""
        return (Feature.CACHE_SWITCH | Feature.FLUSH) & Feature(self.state.features) == Feature.CACHE_SWITCH

    def _is_written_through(self) -> bool:
        """Whether a write must be durable when it is answered. Source: VIRTIO 1.2, 5.2.6.2."""
        features = Feature(self.state.features)
        return not Feature.FLUSH & features or (bool(Feature.CACHE_SWITCH & features) and not self._cache.is_on)

    def _inflight_stride(self) -> int:
        inflight = self.state.inflight
        return _engine.vhost_user_inflight_length(inflight.queue_size if inflight else MOST_DESCRIPTORS)

    # queues

    @contextlib.asynccontextmanager
    async def _stopped(self, vrings: Iterable[Vring]) -> AsyncIterator[None]:
        """Serves none of the vrings meanwhile; afterwards those that are wanted, also if the change is refused. Raises
        ProtocolError.
        """
        await self._detach(vrings, drain=False, timeout=None)
        try:
            yield
        except ProtocolError:
            with contextlib.suppress(ProtocolError):  # the reason is the first error
                self._start_all()
            raise
        self._start_all()

    def _start_all(self) -> None:
        for index, vring in self.vrings.items():
            if vring.is_wanted and vring.transport is None:
                self._start(index, vring)

    def _start(self, index: int, vring: Vring) -> None:
        """Starts to serve a vring, if there is memory, and a log where one is kept. Raises ProtocolError."""
        features = Feature(self.state.features)
        logs = Feature.LOG & features
        if self.shared.guest_memory is None or (logs and self.shared.dirty_log is None):
            return
        if self.shared.inflight_memory is None:
            self.shared.map_inflight(self.state.inflight)
        assert self.shared.inflight_memory is not None
        token = next(self._tokens)
        try:
            vring.transport = _engine.serve_vhost_user(
                self._engine,
                self._engine_disk,
                self.shared.guest_memory,
                self._notices,
                token,
                inflight=(self.shared.inflight_memory, index * self._inflight_stride()),
                event_idx=bool(Feature.EVENT_IDX & features),
                indirect=bool(Feature.INDIRECT & features),
                write_through=self._is_written_through(),
                log=self.shared.dirty_log if logs else None,
                used_log=vring.state.used_log if logs else None,
                **vring.arguments(),
            )
        except (OSError, ValueError, OverflowError) as error:
            vring.state.failed = True
            raise ProtocolError(f"queue {index} cannot be served: {error}") from error
        self._served[token] = vring

    async def _drain(self, vrings: Iterable[Vring], *, flush: bool = False) -> None:
        """Takes vrings out of the engine after all of their requests, which may wait while the device is suspended.
        flush: makes them durable, too. Raises OSError; ConnectionResetError if the front-end leaves meanwhile.
        """
        left = asyncio.Event()

        def leave() -> None:
            left.set()
            self._changed.set()

        with self._connection.calling_at_hang_up(leave):
            await self._detach(vrings, drain=True, timeout=None, unless=left)
            if flush and not left.is_set():
                await self._flush(left)
        if left.is_set():
            raise ConnectionResetError(errno.ECONNRESET, "the front-end has hung up")

    async def _flush(self, unless: asyncio.Event) -> None:
        """Flushes the device. unless: waits no longer. Raises OSError."""
        token, end = next(self._tokens), asyncio.get_running_loop().create_future()
        if self._engine_disk.export.device.submit(self._notices, token, "flush", 0, 0):
            return
        self._flushes[token] = end
        waits = asyncio.ensure_future(unless.wait())
        try:
            await asyncio.wait([end, waits], return_when=asyncio.FIRST_COMPLETED)
            if end.done():
                end.result()
        finally:
            waits.cancel()
            del self._flushes[token]

    async def _detach(
        self, vrings: Iterable[Vring], *, drain: bool, timeout: float | None, unless: asyncio.Event | None = None
    ) -> None:
        """Takes vrings out of the engine. drain: after all of their requests. unless: waits no longer; set it together
        with `_changed`. Raises TimeoutError.
        """
        vrings = list(vrings)
        for vring in vrings:
            if vring.transport is not None:
                vring.transport.detach(drain=drain)
        async with asyncio.timeout(timeout):
            while any(vring.transport is not None for vring in vrings) and not (unless and unless.is_set()):
                self._changed.clear()
                await self._changed.wait()

    def _take_notices(self) -> None:
        for token, result, error in self._notices.take():
            if token not in self._served:
                self._take_flush(token, error)
                continue
            vring = self._served.pop(token)
            vring.transport = None
            vring.state.base = result.next
            if result.failure is not None:
                self._log.error("a queue has ended: %s", result.failure)
                vring.report_failure()
        self._changed.set()

    def _take_flush(self, token: int, error: int) -> None:
        end = self._flushes.get(token)  # None: the front-end has left meanwhile
        if end is None:
            return
        if error:
            end.set_exception(OSError(error, os.strerror(error)))
        else:
            end.set_result(None)


def _is_same(one: Region, other: Region) -> bool:
    return (one.guest, one.user, one.size) == (other.guest, other.user, other.size)


_Answering = Callable[[Session, Message], Coroutine[Any, Any, tuple[bytes, list[int]]]]
_Handling = Callable[[Session, Message], Coroutine[Any, Any, None]]
_ANSWERED: Final[dict[Request, _Answering]] = {
    Request.GET_FEATURES: Session._get_features,
    Request.GET_PROTOCOL_FEATURES: Session._get_protocol_features,
    Request.GET_QUEUE_NUM: Session._get_queue_num,
    Request.GET_CONFIG: Session._get_config,
    Request.GET_VRING_BASE: Session._get_vring_base,
    Request.GET_INFLIGHT_FD: Session._get_inflight_fd,
    Request.GET_MAX_MEM_SLOTS: Session._get_max_mem_slots,
    Request.SET_LOG_BASE: Session._set_log_base,
}
_OTHERS: Final[dict[Request, _Handling]] = {
    Request.SET_OWNER: Session._nothing,
    Request.RESET_OWNER: Session._nothing,
    Request.SET_FEATURES: Session._set_features,
    Request.SET_PROTOCOL_FEATURES: Session._set_protocol_features,
    Request.SET_MEM_TABLE: Session._set_mem_table,
    Request.SET_LOG_FD: Session._set_log_fd,
    Request.SET_VRING_NUM: Session._set_vring_num,
    Request.SET_VRING_ADDR: Session._set_vring_addr,
    Request.SET_VRING_BASE: Session._set_vring_base,
    Request.SET_VRING_KICK: Session._set_vring_kick,
    Request.SET_VRING_CALL: Session._set_vring_call,
    Request.SET_VRING_ERR: Session._set_vring_err,
    Request.SET_VRING_ENABLE: Session._set_vring_enable,
    Request.SET_BACKEND_REQ_FD: Session._set_backend_req_fd,
    Request.SET_CONFIG: Session._set_config,
    Request.SET_INFLIGHT_FD: Session._set_inflight_fd,
    Request.ADD_MEM_REG: Session._add_mem_reg,
    Request.REM_MEM_REG: Session._rem_mem_reg,
}
