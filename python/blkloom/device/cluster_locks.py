"""Locks on the clusters of a segment: if two requests touch the same cluster, the later one waits.

Pure: it decides which request may begin, but starts none. Each request enters once, with all its clusters, and waits
for earlier requests with a common cluster. So there is no deadlock, and requests for a cluster run in their order.
"""

from __future__ import annotations

from typing import Final

MOST_CLUSTERS: Final = 1024
"""A request for more clusters should lock all of them (None)."""


class ClusterLock:
    """The lock of one request. clusters: None for all clusters of the segment."""

    __slots__ = ("_behind", "_gone", "_waits_for", "clusters")

    def __init__(self) -> None:
        self.clusters: range | None = None
        self._waits_for = 0
        self._behind: list[ClusterLock] = []
        self._gone = False


class ClusterLocks:
    """The locks of one segment, for requests that have entered and not left."""

    def __init__(self) -> None:
        self._entered: set[ClusterLock] = set()
        self._last: dict[int, ClusterLock] = {}
        """The last request by cluster, since the last one that locked all clusters."""
        self._all: ClusterLock | None = None
        """The last request that locked all clusters."""

    def enter(self, lock: ClusterLock, clusters: range | None) -> bool:
        """Queues a request behind all others that touch one of `clusters`. Returns whether it has the lock at once."""
        lock.clusters = clusters
        before = self._before(clusters)
        if clusters is None:
            self._all = lock
            self._last.clear()  # later requests wait for this one, and so for the earlier ones
        else:
            self._last.update(dict.fromkeys(clusters, lock))
        self._entered.add(lock)
        lock._waits_for = len(before)
        for earlier in before:
            earlier._behind.append(lock)
        return not before

    def leave(self, lock: ClusterLock) -> list[ClusterLock]:
        """Removes a request that has ended, or waits no more. Returns the requests that have their lock now."""
        ready: list[ClusterLock] = []
        lock._gone = True
        leaving = [lock] if not lock._waits_for else []  # else the later wait for the earlier
        while leaving:
            ended = leaving.pop()
            self._forget(ended)
            for later in ended._behind:
                later._waits_for -= 1
                if not later._waits_for:
                    (leaving if later._gone else ready).append(later)
            ended._behind.clear()
        return ready

    def is_free(self, clusters: range | None) -> bool:
        """Whether `enter` would get the lock at once."""
        return not self._before(clusters)

    def _before(self, clusters: range | None) -> set[ClusterLock]:
        if clusters is None:
            return set(self._entered)
        before = {self._last[cluster] for cluster in clusters if cluster in self._last}
        if self._all is not None:
            before.add(self._all)
        return before

    def _forget(self, lock: ClusterLock) -> None:
        self._entered.discard(lock)
        if self._all is lock:
            self._all = None
        for cluster in lock.clusters or ():
            if self._last.get(cluster) is lock:
                del self._last[cluster]
