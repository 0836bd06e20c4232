"""Connectors that are wrong on purpose, and failures on demand: patches of kvring's classes in vLLM's process.

A *broken variant* is a mistake that a connector could make; the suite must notice each (`test_broken.py`). A *failure* is
something that happens to a connector that is right. Both are named in `Vllm(broken=…)` and applied in every process of that
vLLM before it makes its connector. They know the insides of `kvring.vllm`, and break loudly when those change.
"""

from types import SimpleNamespace
from typing import Any


class OtherTables:
    """A `KVCacheManager` that answers with block tables of our own."""

    def __init__(self, tables: dict[str, list[list[int]]], real: Any) -> None:
        self.tables, self.real = tables, real

    def get_blocks(self, request: str) -> Any:
        if request not in self.tables:
            return self.real.get_blocks(request)
        all_blocks = self.real.block_pool.blocks
        return SimpleNamespace(blocks=tuple([all_blocks[block] for block in table] for table in self.tables[request]))


# Broken variants.


def prompt_only_lookup() -> None:
    """A lookup over the prompt: the tokens that a preempted request had generated are computed again."""
    from kvring.vllm.scheduler import SchedulerSide

    lookup = SchedulerSide._lookup

    def of_prompt(self, tracker, request):
        hashes = tracker.hashes
        tracker.hashes = list(hashes[: request.num_prompt_tokens // self.geometry.hash_tokens])
        try:
            return lookup(self, tracker, request)
        finally:
            tracker.hashes = hashes

    SchedulerSide._lookup = of_prompt


def consumed_lookup() -> None:
    """A lookup whose answer is used up by reading it: vLLM asks again every step while a request waits for room."""
    from kvring.vllm.scheduler import SchedulerSide

    ask = SchedulerSide.get_num_new_matched_tokens
    given: set[tuple[str, int]] = set()

    def once(self, request, num_computed_tokens):
        admission = (request.request_id, request.num_preemptions)
        if admission in given:
            return 0, False
        answer = ask(self, request, num_computed_tokens)
        if answer[0] is not None:
            given.add(admission)
        return answer

    SchedulerSide.get_num_new_matched_tokens = once


def appended_block_ids() -> None:
    """A block table of one's own, extended by the blocks of each step: on a resume vLLM sends the whole table, not a delta."""
    from kvring.vllm.scheduler import SchedulerSide

    build = SchedulerSide.build_connector_meta
    tables: dict[str, list[list[int]]] = {}

    def appended(self, output):
        for new in output.scheduled_new_reqs:
            tables[new.req_id] = [list(group) for group in new.block_ids]
        cached = output.scheduled_cached_reqs
        for request, blocks in zip(cached.req_ids, cached.new_block_ids, strict=True):
            for table, more in zip(tables[request], blocks or (), strict=False):
                table.extend(more)
        real = self.kv_cache_manager
        self.kv_cache_manager = OtherTables(tables, real)
        try:
            return build(self, output)
        finally:
            self.kv_cache_manager = real

    SchedulerSide.build_connector_meta = appended


def stores_after_a_failed_load() -> None:
    """A failed synchronous load is ignored: the tokens that the step computed from it are stored, and the engine is not told.

    Each step waits until its stores have read their blocks: in the next step vLLM writes the right KV into the same blocks, and
    a copy that began that late would store the right KV."""
    from kvring.vllm.scheduler import SchedulerSide
    from kvring.vllm.worker import WorkerSide

    start = WorkerSide.start_stores

    def start_and_wait(self, meta):
        start(self, meta)
        self.adapter.handle_preemptions(None)

    WorkerSide.start_stores = start_and_wait
    SchedulerSide._may_store = lambda self: True
    SchedulerSide._spoilt = lambda self, load: None


def stores_late_without_fences() -> None:
    """Stores read their blocks a step late, and are not flushed before those blocks have another owner."""
    from kvring.vllm.worker import WorkerSide

    start = WorkerSide.start_stores
    late: list[Any] = []

    def later(self, meta):
        for earlier in late:
            start(self, earlier)
        late[:] = [meta]

    WorkerSide.start_stores = later
    WorkerSide.flush = lambda self, meta: None


# Failures.


def _loads_fail(rank: int | None, every: bool) -> None:
    from kvring.vllm.worker import WorkerSide

    start = WorkerSide._start_load
    failed: list[int] = []

    def fails(self, load):
        if (rank is None or self.rank == rank) and (every or not failed):
            failed.append(load.job)
            self._load_failed(load)
        else:
            start(self, load)

    WorkerSide._start_load = fails


def first_load_fails() -> None:
    """The first load fails, on every rank."""
    _loads_fail(None, every=False)


def first_load_of_rank_one_fails() -> None:
    """The first load fails on rank 1, and only there."""
    _loads_fail(1, every=False)


def stores_begin_late() -> None:
    """A store path slower than the model: each store begins fifty steps late, unless it is flushed before."""
    from kvring.vllm.metadata import KvringMetadata
    from kvring.vllm.worker import WorkerSide

    start, flush, collect = WorkerSide.start_stores, WorkerSide.flush, WorkerSide.collect
    late: list[list[Any]] = []

    def begin(self, chosen):
        if chosen:
            late[:] = [one for one in late if one not in chosen]
            start(self, KvringMetadata(stores=[store for _, store in chosen]))

    def start_late(self, meta):
        late.extend([50, store] for store in meta.stores)

    def flush_late(self, meta):
        begin(self, [one for one in late if meta.flush_all or one[1].job in meta.flush])
        flush(self, meta)

    def collect_late(self, meta):
        for one in late:
            one[0] -= 1
        begin(self, [one for one in late if one[0] <= 0])
        collect(self, meta)

    WorkerSide.start_stores, WorkerSide.flush, WorkerSide.collect = start_late, flush_late, collect_late


def every_load_fails() -> None:
    """No load ever brings anything."""
    _loads_fail(None, every=True)
