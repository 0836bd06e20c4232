"""A connector in a few lines, right by default, and wrong in a named way on demand.

It proves both halves of the harness: the right one passes every scenario, and each mistake is caught.
"""

from dataclasses import dataclass, field
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.distributed.parallel_state import get_tp_group
from vllm.v1.kv_cache_interface import SlidingWindowSpec

from .toy_native import ENGINES, SKIP, ToyEngine, ToyLookups, ToyWorkerAdapter

MISTAKES = (
    "prompt_only",
    "consumed_lookup",
    "stale_hit",
    "appended_blocks",
    "no_flush",
    "no_window_fence",
    "null_blocks",
    "sync_poison",
    "session_leak",
    "load_into_local",
    "load_twice",
    "uncomputed",
    "lost_report",
    "whole_prompt_sync",
    "whole_prompt_window",
    "blocks_of_a_window",
    "raises",
)


@dataclass
class Load:
    request: str
    keys: bytes
    blocks: list[int]
    is_sync: bool

    @property
    def written(self) -> set[int]:
        return set(self.blocks) - {SKIP}


@dataclass
class Store:
    request: str
    round: tuple[int, int]
    keys: list[bytes]
    blocks: list[int]
    parent: bytes | None


@dataclass
class Meta(KVConnectorMetadata):
    """Scheduler to worker."""

    loads: list[Load] = field(default_factory=list)
    stores: list[Store] = field(default_factory=list)
    claimed: set[int] = field(default_factory=set)
    """Blocks that have got a new owner in this step."""
    gone: set[str] = field(default_factory=set)
    """Requests that were preempted or have finished."""


@dataclass
class WorkerMeta(KVConnectorWorkerMetadata):
    """Worker to scheduler: how often each round was stored, and which failed."""

    stored: dict[tuple[int, int], int] = field(default_factory=dict)
    failed: set[tuple[int, int]] = field(default_factory=set)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> "WorkerMeta":
        """Over ranks."""
        assert isinstance(other, WorkerMeta)
        for round_, times in other.stored.items():
            self.stored[round_] = self.stored.get(round_, 0) + times
        self.failed |= other.failed
        return self


@dataclass
class Tracker:
    """What the scheduler side knows of a request."""

    request: Any
    admission: int = 0
    allocated: bool = False
    local: int = 0
    stored: int = 0
    useless: bool = False
    """A load has failed: this request computes for itself."""
    table: list[list[int]] = field(default_factory=list)
    """Only for the mistake of keeping an own one."""
    asked: int = 0
    loading: set[int] = field(default_factory=set)
    """Blocks of the last load."""


class ToyConnector(KVConnectorBase_V1, SupportsHMA):
    """Both sides: its role says which one it is.

    Its options: `toy.load` is sync or async, `toy.chunk_blocks`, `toy.engine` names a cache, `toy.mistake` is one of `MISTAKES`;
    with `toy.loads_fail` no load brings anything."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        extra = vllm_config.kv_transfer_config.kv_connector_extra_config
        self.mistake = extra.get("toy.mistake", "")
        self.loads_fail = extra.get("toy.loads_fail", False)
        self.block, self.chunk = kv_cache_config.hash_block_size, extra.get("toy.chunk_blocks", 1)
        self.tokens = self.block * self.chunk
        self.groups = kv_cache_config.kv_cache_groups
        # With a window a request can lose blocks while it runs.
        self.has_windows = any(isinstance(group.kv_cache_spec, SlidingWindowSpec) for group in self.groups)
        of_one = len(self.groups) == 1
        self.is_sync = extra.get("toy.load") == "sync" and of_one and not self.has_windows
        # vLLM goes on from the first block that is named, and of a window nothing is left in front of it.
        self.names_blocks = of_one and (self.mistake == "blocks_of_a_window" or not self.has_windows)
        replicas = kv_cache_config.kv_tp_replicas
        world = vllm_config.parallel_config.tensor_parallel_size // replicas
        self.engine = ENGINES.setdefault(extra.get("toy.engine", ""), ToyEngine(world))
        self.adapter: Any
        if role == KVConnectorRole.SCHEDULER:
            self.adapter = ToyLookups(self.engine)
        else:
            rank = get_tp_group().rank_in_group
            self.adapter, self.is_writer = ToyWorkerAdapter(self.engine, rank // replicas), rank % replicas == 0
        self.trackers: dict[str, Tracker] = {}
        self.loads: list[Load] = []
        self.rounds: dict[tuple[int, int], int] = {}
        self.number = 0
        self.load_jobs: dict[int, Load] = {}
        self.store_jobs: dict[int, Store] = {}
        self.report = WorkerMeta()
        self.bad: set[int] = set()

    @property
    def requires_kv_delivery(self) -> bool:
        """A cache."""
        return False

    # -- the scheduler's side ------------------------------------------------------------------------------------------

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        tracker = self.trackers.setdefault(request.request_id, Tracker(request))
        if tracker.allocated:
            # Blocks were lost. This call may come before anything says so (a reset preempts outside of a step).
            tracker.allocated = False
            tracker.asked = 0
            tracker.loading = set()
            if self.mistake != "stale_hit":
                tracker.admission += 1
        tracker.local = num_computed_tokens
        if tracker.useless:
            return 0, False
        hashes = list(request.block_hashes)
        if self.mistake == "prompt_only":
            hashes = hashes[: request.num_prompt_tokens // self.block]
        hit = self.adapter.lookup(request.request_id, tracker.admission, hashes, self.chunk)
        tracker.asked += 1
        if self.mistake == "consumed_lookup" and tracker.asked > 1:
            return 0, False
        # vLLM would let an asynchronous load bring all tokens, and then compute the last one again. With a sliding window
        # that is wrong: the blocks were chosen for the token after it, so its own window can be one token short.
        careful = self.is_sync and self.mistake != "whole_prompt_sync"
        careful |= self.has_windows and self.mistake != "whole_prompt_window"
        most = request.num_tokens - careful
        tokens = max(0, min(hit.chunks * self.tokens, most) - num_computed_tokens)
        return tokens, tokens > 0 and not self.is_sync

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        tracker = self.trackers[request.request_id]
        first_time, tracker.allocated = not tracker.allocated, True
        if first_time:
            tracker.stored = (tracker.local + num_external_tokens) // self.tokens
        if num_external_tokens:
            self._load(tracker, blocks.get_block_ids(), tracker.local + num_external_tokens)
        elif self.mistake == "load_twice" and not first_time and tracker.stored:
            self._load(tracker, blocks.get_block_ids(), tracker.stored * self.tokens)

    def _blocks(self, table: Any, chunk: int) -> list[tuple[int, int]]:
        """A chunk's blocks, in the order of groups, each with its index in its group's table; 0 is vLLM's null block."""
        places = range(chunk * self.chunk, (chunk + 1) * self.chunk)
        return [(index, ids[index] if index < len(ids) else 0) for ids in table for index in places]

    def _load(self, tracker: Tracker, table: Any, end: int) -> None:
        name = tracker.request.request_id
        hit = self.adapter.lookup(name, tracker.admission, list(tracker.request.block_hashes), self.chunk)
        first, stop = tracker.local // self.tokens, -(-end // self.tokens)
        blocks = []
        for chunk in range(first, stop):
            for index, block in self._blocks(table, chunk):
                held = (index + 1) * self.block <= tracker.local and self.mistake != "load_into_local"
                blocks.append(block if block and not held and index * self.block < end else SKIP)
        load = Load(name, hit.handles(first, stop), blocks, self.is_sync)
        tracker.loading = load.written
        self.loads.append(load)

    def build_connector_meta(self, scheduler_output: Any) -> Meta:
        output = scheduler_output
        meta = Meta(loads=self.loads, gone=set(output.preempted_req_ids or ()) | set(output.finished_req_ids))
        self.loads = []
        for load in meta.loads:
            meta.claimed |= load.written
        cached = output.scheduled_cached_reqs
        starts = {}
        for name, blocks, computed, whole in [
            *((new.req_id, new.block_ids, new.num_computed_tokens, True) for new in output.scheduled_new_reqs),
            *(
                (name, blocks or (), computed, name in cached.resumed_req_ids)
                for name, blocks, computed in zip(cached.req_ids, cached.new_block_ids, cached.num_computed_tokens)
            ),
        ]:
            tracker = self.trackers[name]
            starts[name] = computed
            tracker.table = tracker.table or [[] for _ in self.groups]
            for have, more in zip(tracker.table, blocks):
                have.extend(more)
            skip = tracker.local // self.block if whole else 0
            meta.claimed.update(block for ids in blocks for block in ids[skip:])
        if output.has_sync_kv_loads and self.mistake != "sync_poison":
            return meta  # Nobody knows yet whether the loads of this step bring what they promise.
        for name, count in output.num_scheduled_tokens.items():
            self._store(meta, name, output, starts[name] + count)
        return meta

    def _store(self, meta: Meta, name: str, output: Any, computed: int) -> None:
        tracker = self.trackers[name]
        hashes = tracker.request.block_hashes
        if self.mistake == "uncomputed":
            computed += self.block
        stop = min(computed // self.tokens, len(hashes) // self.chunk)
        own = self.mistake == "appended_blocks"
        table = tracker.table if own else output.kv_connector_block_state.get_block_ids(name)
        for chunk in range(tracker.stored, stop):
            blocks = [block for _, block in self._blocks(table, chunk)]
            if not all(blocks) and self.mistake != "null_blocks":
                continue
            self.number += 1
            round_ = (0, self.number)
            self.rounds[round_] = 0
            parent = bytes(hashes[chunk * self.chunk - 1]) if chunk else None
            key = bytes(hashes[(chunk + 1) * self.chunk - 1])
            meta.stores.append(Store(name, round_, [key], blocks, parent))
        tracker.stored = max(tracker.stored, stop)

    def update_connector_output(self, connector_output: Any) -> None:
        output, meta = connector_output, connector_output.kv_connector_worker_meta
        if self.mistake == "raises" and output.finished_recving:
            raise KeyError("a tracker that is gone")
        if meta is not None:
            for round_ in meta.failed:
                self.rounds.pop(round_, None)
                self.engine.rounds.pop(round_, None)
            for round_, times in meta.stored.items():
                if round_ in self.rounds:
                    self.rounds[round_] += times
                    if self.rounds[round_] == self.engine.writers:
                        del self.rounds[round_]
                        self.engine.commit(round_)
        if output.invalid_block_ids or output.failed_recving:
            # A request whose load has failed computes for itself: asked again at once, it would fail again.
            for name, tracker in self.trackers.items():
                if name in output.failed_recving or tracker.loading & output.invalid_block_ids:
                    tracker.useless = True

    def request_finished_all_groups(self, request: Any, block_ids: Any) -> tuple[bool, None]:
        self.trackers.pop(request.request_id, None)
        if self.mistake != "session_leak" or not request.num_preemptions:
            self.adapter.end_session(request.request_id)
        return False, None

    request_finished = request_finished_all_groups

    def reset_cache(self) -> bool:
        self.engine.visible.clear()
        return True

    # -- the worker's side ---------------------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        layers = [[kv_caches[name] for name in group.layer_names] for group in self.groups]
        self.adapter.register([of_group for of_group in layers for _ in range(self.chunk)])

    def handle_preemptions(self, kv_connector_metadata: Any) -> None:
        meta = kv_connector_metadata
        for job, store in self.store_jobs.items():
            is_lost = store.request in meta.gone if self.mistake == "no_window_fence" else set(store.blocks) & meta.claimed
            if is_lost and self.mistake != "no_flush":
                self.adapter.flush([job])

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        for load in self._get_connector_metadata().loads:
            keys = bytes(len(load.keys)) if self.loads_fail else load.keys
            job = self.adapter.submit_load(load.request, keys, load.blocks)
            self.load_jobs[job] = load
            if load.is_sync:
                self.adapter.wait_job(job, 1000)

    def wait_for_layer_load(self, layer_name: str) -> None:
        pass

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        pass

    def wait_for_save(self) -> None:
        for store in self._get_connector_metadata().stores if self.is_writer else ():
            job = self.adapter.submit_store(store.request, store.round, store.keys, store.blocks, store.parent)
            self.store_jobs[job] = store

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        results = KVConnectorTransferResults()
        for job in self.adapter.get_finished():
            if job.is_store:
                round_ = self.store_jobs.pop(job.job).round
                if job.failed:
                    self.report.failed.add(round_)
                else:
                    self.report.stored[round_] = 1
                continue
            load = self.load_jobs.pop(job.job)
            if not load.is_sync and self.mistake != "lost_report":
                results.finished_recving.add(load.request)
                if job.failed and not self.names_blocks:
                    results.failed_recving.add(load.request)
        bad = set(self.adapter.get_block_ids_with_load_errors())
        self.bad = bad if self.names_blocks else set()
        return results

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self.bad

    def build_connector_worker_meta(self) -> WorkerMeta:
        report, self.report = self.report, WorkerMeta()
        return report
