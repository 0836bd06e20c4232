"""KV events for cache-aware routers: they tell which blocks have become visible in the cache of this node."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.distributed.kv_events import MEDIUM_CPU, AllBlocksCleared, BlockStored, KVCacheEvent
from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash

from .geometry import Geometry

if TYPE_CHECKING:
    from .tracker import Tracker


class Events:
    """An event says that blocks were stored once every rank has stored them. What the engine evicts later is not announced: the
    cache is shared by all vLLMs of a node, and none of them evicts."""

    def __init__(self, geometry: Geometry):
        self._geometry = geometry
        self._announced: dict[int, BlockStored] = {}
        self._ready: list[KVCacheEvent] = []

    def announce(self, job: int, tracker: Tracker, first: int, count: int) -> None:
        """A store has been handed to the workers: keeps its event until they have reported it."""
        geometry = self._geometry
        start, end = first * geometry.hashes_per_chunk, (first + count) * geometry.hashes_per_chunk
        self._announced[job] = BlockStored(
            block_hashes=[maybe_convert_block_hash(tracker.hashes[index]) for index in range(start, end)],
            parent_block_hash=maybe_convert_block_hash(tracker.hashes[start - 1]) if start else None,
            token_ids=list(tracker.tokens[start * geometry.hash_tokens : end * geometry.hash_tokens]),
            block_size=geometry.hash_tokens,
            lora_id=None,
            medium=MEDIUM_CPU,
            lora_name=tracker.lora_name,
        )

    def stored(self, job: int, *, failed: bool) -> None:
        """Every rank has reported a store: its event is sent. Not where a rank could not store all of it, since routers rely on
        events."""
        event = self._announced.pop(job, None)
        if event is not None and not failed:
            self._ready.append(event)

    def cleared(self) -> None:
        """The cache was reset: drops all events, and tells routers that all blocks are gone."""
        self._announced.clear()
        self._ready = [AllBlocksCleared()]

    def take(self) -> list[KVCacheEvent]:
        """Returns the events that are ready, each once."""
        ready, self._ready = self._ready, []
        return ready
