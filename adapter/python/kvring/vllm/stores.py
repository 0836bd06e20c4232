"""Stores that not every rank has reported, and the blocks that they read. Nothing else writes to these blocks before the stores
have read them.

* *Fence*: a request that is preempted, or whose sliding window moves on, loses blocks, and vLLM does not say so. Its stores are
  flushed before the next forward pass.
* *Pin*: a request that ends would lose its blocks as well. From then on its stores hold references of their own to the blocks,
  for as long as the stores are open, and for `flush_timeout_ms` at most.
* Pins are never in the way: vLLM gets all pinned blocks back at once when it resets its cache, or needs blocks. Then the stores
  that have not been reported are flushed like the others.
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
"""The limit for the bytes of one rank's open stores. Copies run at several GB/s, so a store behind so many bytes would wait for
longer than `flush_timeout_ms`, and be given up when vLLM needs the blocks."""


REPORT_STEPS = 100
"""How many steps the scheduler's side waits for the report of a flushed store. Such a store has ended by then, unless it waits
for an engine's restart. After that its report is not waited for, because a lost one would count as open for ever."""


@dataclass(slots=True)
class OpenStore:
    """A store that not every rank has reported."""

    job: int
    request: str
    admission: int
    first_chunk: int
    chunks: int
    blocks: list[int]
    """The ids of the blocks that it reads."""
    flushed: bool = False
    """The workers have been told to stop reading them."""
    lost: bool = False
    """The blocks may get another owner: the store is to be flushed before the next forward pass."""
    pinned: list[KVCacheBlock] = field(default_factory=list)
    """The blocks, while the store holds a reference of its own to them."""
    pinned_until: float = 0.0
    outcome: Outcome = field(default_factory=Outcome)


class OpenStores:
    """All open stores, by job."""

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
        """Adds a store that is announced in this step."""
        self._open[store.job] = store
        self._by_request.setdefault(store.request, {})[store.job] = store
        self._queued_bytes += store.chunks * self._geometry.chunk_bytes

    def close(self, store: OpenStore) -> None:
        """Forgets a store and unpins its blocks: every rank has reported it, or no further report will come."""
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
        """Are so many bytes open that no further stores may be announced?"""
        return self._queued_bytes >= QUEUED_BYTES_MAX

    def fence(self, preempted: Collection[str] | None) -> list[int]:
        """Begins a step: marks the stores that must be flushed, because blocks that they read may get another owner, and returns
        their jobs."""
        flush = []
        self._step += 1
        for store in self._open.values():
            if store.flushed or store.pinned:
                continue
            # Stores are asked, not requests: a request may have been preempted and then aborted between two steps.
            lost = store.lost or (preempted and store.request in preempted)
            if lost or (self._geometry.has_windows and not self._owns_blocks(store)):
                store.flushed = True
                flush.append(store.job)
                self._flushed.append((self._step, store.job))
        return flush

    def overdue(self) -> list[int]:
        """Takes the stores that were flushed `REPORT_STEPS` ago: they read nothing any more, reported or not."""
        jobs = []
        while self._flushed and self._flushed[0][0] + REPORT_STEPS <= self._step:
            jobs.append(self._flushed.popleft()[1])
        return jobs

    def _owns_blocks(self, store: OpenStore) -> bool:
        """Does the request still own every block that this store reads? Sliding windows drop blocks from the front, so it is
        enough to compare the first block in each group with a window."""
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
        """Are blocks pinned, which vLLM could use otherwise?"""
        return bool(self._pinned)

    def pin(self, request_id: str) -> None:
        """A request ends, and vLLM takes its blocks back: pins those that its stores read, so that they keep their content."""
        for store in self._by_request.get(request_id, {}).values():
            if not store.flushed and not store.pinned:
                self._pin(store)

    def _pin(self, store: OpenStore) -> None:
        assert self.manager is not None
        table = self.manager.get_blocks(store.request).blocks
        chunks = range(store.first_chunk, store.first_chunk + store.chunks)
        blocks = [block for chunk in chunks for block in self._geometry.of_chunk(table, chunk)]
        if [block.block_id for block in blocks] != store.blocks:
            # The request was preempted since the last step, or its window has moved on: it no longer owns these blocks.
            store.lost = True
            return
        self.manager.block_pool.touch(blocks)
        store.pinned, store.pinned_until = blocks, time.monotonic() + self._pinned_s
        self._pinned[store.job] = store

    def _unpin(self, store: OpenStore) -> None:
        blocks, store.pinned = store.pinned, []
        if self._pinned.pop(store.job, None) is not None and self.manager is not None:
            # In the order in which vLLM frees a request's blocks: the last ones are handed out first.
            self.manager.block_pool.free_blocks(reversed(blocks))

    def let_go(self) -> None:
        """Unpins all blocks. Their stores, which have not been reported, are flushed before the next forward pass."""
        for store in list(self._pinned.values()):
            store.lost = True
            self._unpin(store)

    def let_go_in_time(self) -> None:
        """Unpins the blocks that have been pinned for `flush_timeout_ms`, and has their stores flushed."""
        now = time.monotonic()
        while self._pinned and (store := next(iter(self._pinned.values()))).pinned_until <= now:
            store.lost = True
            self._unpin(store)
