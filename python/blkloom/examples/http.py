"""An example of a target with coroutines: a file on a web server as a disk, read in ranges when first touched.

Many ranges are on their way at once. What was read stays in memory and is mapped there, so only the first access of
a cluster runs Python; what is written stays in memory, too, and never reaches the server. Try it:

    blkloom.open("0 2048 http http://localhost:8000/disk.img", targets=[Http])
"""

import asyncio
import errno
import http.client
import os
from contextlib import closing
from urllib.parse import urlsplit

from blkloom import (
    RETRY,
    Bytes,
    ClusterTable,
    Extent,
    FaultError,
    File,
    LoadContext,
    LoadedTarget,
    Retry,
    TargetSpec,
    entries,
    syntax,
)

CLUSTER = 65536


class Http(TargetSpec):
    """The file at `url`, as a table names it. The server must know ranges."""

    url: str

    name = "http"
    arguments = (syntax.word("url"),)
    summary = "a file on a web server, read when first touched; writes stay in memory"

    def load(self, context: LoadContext, start: Bytes, length: Bytes) -> LoadedTarget:
        """Called when a table with it is loaded."""
        return LoadedHttp(self, context, length)


class LoadedHttp(LoadedTarget):
    """Reads as the file until written."""

    spec: Http
    writes = True
    most_in_flight = 64

    def __init__(self, spec: Http, context: LoadContext, length: Bytes) -> None:
        """A cluster table over a scratch file in memory: empty, so that all of it faults."""
        parts = urlsplit(spec.url)
        self.host, self.port, self.path = parts.hostname or "", parts.port or 80, parts.path or "/"
        with closing(http.client.HTTPConnection(self.host, self.port, timeout=10)) as connection:
            connection.request("HEAD", self.path)
            self.size = int(connection.getresponse().getheader("Content-Length", "0"))
        if self.size < length:
            raise context.refuse(f"the file has {self.size} bytes", value=spec.url, cure=f"it needs {length}")
        self.idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self.read_only = context.read_only
        self.memory = os.memfd_create("http")
        os.ftruncate(self.memory, -(-length // CLUSTER) * CLUSTER)
        self.table = ClusterTable(length, CLUSTER, [File(self.memory, writable=True, label=spec.url)])
        super().__init__(spec, [(Bytes(0), length, Extent.table(self.table))])

    async def read(self, offset: Bytes, length: Bytes) -> Retry:
        """First touch: fetch the clusters, map them, and have the engine look again. No other handler is busy with
        them meanwhile.
        """
        first, last = offset // CLUSTER, -(-(offset + length) // CLUSTER)
        missing = [cluster for cluster in range(first, last) if self.table.entry(cluster) == entries.FAULT]
        if missing:
            first, last = missing[0], missing[-1] + 1
            data = memoryview(await self.fetch(first * CLUSTER, min(last * CLUSTER, self.size)))
            for cluster in missing:
                at = (cluster - first) * CLUSTER
                os.pwrite(self.memory, data[at : at + CLUSTER], cluster * CLUSTER)
                self.table.fill(cluster, 1, entries.data(cluster * CLUSTER, read_only=self.read_only))
        return RETRY

    async def write(self, offset: Bytes, data: bytes, *, fua: bool) -> Retry:
        """The same; the data then goes to the memory without us."""
        return await self.read(offset, Bytes(len(data)))

    async def write_zeroes(self, offset: Bytes, length: Bytes, *, may_unmap: bool, fast: bool) -> None:
        """Always comes here (see ClusterTable), so it is done here."""
        await self.read(offset, length)
        os.pwrite(self.memory, bytes(length), offset)

    async def fetch(self, start: int, end: int) -> bytes:
        """Bytes of the file, over a connection that is idle, or else over a new one."""
        while self.idle and self.idle[-1][0].at_eof():
            self.idle.pop()[1].close()
        reader, writer = self.idle.pop() if self.idle else await asyncio.open_connection(self.host, self.port)
        try:
            asked = f"GET {self.path} HTTP/1.1\r\nHost: {self.host}\r\nRange: bytes={start}-{end - 1}\r\n\r\n"
            writer.write(asked.encode())
            status, _, _ = (await reader.readuntil(b"\r\n\r\n")).partition(b"\r\n")
            if not status.startswith(b"HTTP/1.1 206"):
                raise FaultError(errno.EIO, f"{self.spec.url}: {status.decode('latin-1')}")
            data = await reader.readexactly(end - start)
        except BaseException:  # cancelled, too: what is still to come of the answer must not meet the next request
            writer.close()
            raise
        self.idle.append((reader, writer))
        return data

    def close(self) -> None:
        """The device has closed."""
        for _, writer in self.idle:
            writer.close()
        os.close(self.memory)
