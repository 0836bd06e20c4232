"""Stores that not every rank has reported, and the blocks that they read: nobody else writes there before they have.

* *Fence*: a request that is preempted, or whose sliding window goes on, loses blocks without a word. Its stores are flushed
  before the next forward pass.
* *Pin*: a request that ends would lose them as well. From then on its stores have a reference of their own to them, for as long
  as they are open, and for `flush_timeout_ms` at most.
* Pins are never in the way: vLLM has all of them back at once when it resets its cache, or needs blocks. Then the stores that
  have not been reported are flushed like the others.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .geometry import Geometry
from .metadata import Outcome

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.kv_cache_utils import KVCacheBlock

QUEUED_BYTES_MAX = 1 << 30
"""Of one rank's open stores. Copies run at several GB/s, so what is behind as much as this waits for longer than
`flush_timeout_ms`, and would be given up when vLLM needs the blocks."""


REPORT_STEPS = 100
"""Steps in which a flushed store is reported. It has ended by then, but for one that waits for an engine's restart; a report that
has not come is not waited for any more, or what was lost once would count as open for ever."""


@dataclass(slots=True)
class OpenStore:
    """A store that not every rank has reported."""

    job: int
    request: str
    admission: int
    first_chunk: int
    chunks: int
    blocks: list[int]
    """That it reads."""
    flushed: bool = False
    """The workers have been told to let go of them."""
    lost: bool = False
    """They may get another owner: it is to be flushed before the next forward pass."""
    pinned: list[KVCacheBlock] = field(default_factory=list)
    """The blocks, while it has a reference of its own to them."""
    pinned_until: float = 0.0
    outcome: Outcome = field(default_factory=Outcome)


class OpenStores:
    """By job."""

    def __init__(self, geometry: Geometry, flush_timeout_ms: float):
        self.manager: KVCacheManager | None = None
        self._geometry = geometry
        self._pinned_s = flush_timeout_ms / 1_000
        self._open: dict[int, OpenStore] = {}
        self._by_request: dict[str, dict[int, OpenStore]] = {}
        self._pinned: dict[int, OpenStore] = {}
        """The earliest first."""
        self._flushed: deque[tuple[int, int]] = deque()
        """(step, job), the earliest first."""
        self._step = 0
        self._queued_bytes = 0

    def __len__(self) -> int:
        return len(self._open)

    def get(self, job: int) -> OpenStore | None:
        """The store, if it is open."""
        return self._open.get(job)

    def add(self, store: OpenStore) -> None:
        """A store that is announced in this step."""
        self._open[store.job] = store
        self._by_request.setdefault(store.request, {})[store.job] = store
        self._queued_bytes += store.chunks * self._geometry.chunk_bytes

    def close(self, store: OpenStore) -> None:
        """Every rank has reported it, or nobody ever will."""
        if self._open.pop(store.job, None) is None:
            return
        self._queued_bytes -= store.chunks * self._geometry.chunk_bytes
        of_request = self._by_request[store.request]
        del of_request[store.job]
        if not of_request:
            del self._by_request[store.request]
        self._unpin(store)

    @property
    def is_full(self) -> bool:
        """Do so many bytes wait that no further ones are to be announced?"""
        return self._queued_bytes >= QUEUED_BYTES_MAX

    def fence(self, preempted: Collection[str] | None) -> list[int]:
        """Before blocks that a store reads get another owner: the stores to flush."""
        flush = []
        self._step += 1
        for store in self._open.values():
            if store.flushed or store.pinned:
                continue
            # By the stores' own account: a request may have been preempted, and aborted, between two steps.
            lost = store.lost or (preempted and store.request in preempted)
            if lost or (self._geometry.has_windows and not self._owns_blocks(store)):
                store.flushed = True
                flush.append(store.job)
                self._flushed.append((self._step, store.job))
        return flush

    def overdue(self) -> list[int]:
        """Stores that were flushed long ago: they read nothing any more, whether they are reported or not."""
        jobs = []
        while self._flushed and self._flushed[0][0] + REPORT_STEPS <= self._step:
            jobs.append(self._flushed.popleft()[1])
        return jobs

    def _owns_blocks(self, store: OpenStore) -> bool:
        """Does the request still own every block that this store reads? Sliding windows drop blocks from the front, so the first
        block of each window tells of all."""
        if self.manager is None:
            return False
        table = self.manager.get_blocks(store.request).blocks
        at = 0
        for group, blocks in zip(self._geometry.groups, table, strict=True):
            index = store.first_chunk * group.blocks
            if group.window is not None and (index >= len(blocks) or blocks[index].block_id != store.blocks[at]):
                return False
            at += group.blocks
        return True

    @property
    def has_pins(self) -> bool:
        """Would vLLM have more free blocks without us?"""
        return bool(self._pinned)

    def pin(self, request_id: str) -> None:
        """A request ends, and vLLM takes its blocks back: what is being stored of it keeps its content for now."""
        for store in self._by_request.get(request_id, {}).values():
            if not store.flushed and not store.pinned:
                self._pin(store)

    def _pin(self, store: OpenStore) -> None:
        assert self.manager is not None
        table = self.manager.get_blocks(store.request).blocks
        chunks = range(store.first_chunk, store.first_chunk + store.chunks)
        blocks = [block for chunk in chunks for block in self._geometry.of_chunk(table, chunk)]
        if [block.block_id for block in blocks] != store.blocks:
            # It has been preempted since the last step, or its window has gone on: they are others', or nobody's.
            store.lost = True
            return
        self.manager.block_pool.touch(blocks)
        store.pinned, store.pinned_until = blocks, time.monotonic() + self._pinned_s
        self._pinned[store.job] = store

    def _unpin(self, store: OpenStore) -> None:
        blocks, store.pinned = store.pinned, []
        if self._pinned.pop(store.job, None) is not None and self.manager is not None:
            # As vLLM frees a request's: the last ones are handed out first.
            self.manager.block_pool.free_blocks(reversed(blocks))

    def let_go(self) -> None:
        """Nothing is pinned any more; what has not been reported is flushed before the next forward pass."""
        for store in list(self._pinned.values()):
            store.lost = True
            self._unpin(store)

    def let_go_in_time(self) -> None:
        """The same, of what has been pinned for long enough."""
        now = time.monotonic()
        while self._pinned and (store := next(iter(self._pinned.values()))).pinned_until <= now:
            store.lost = True
            self._unpin(store)
