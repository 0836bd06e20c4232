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
class Store:
    """What one rank is asked to store."""

    request: str
    round: tuple[int, int]
    keys: list[bytes]
    blocks: list[int]
    parent: bytes | None


@dataclass
class Meta(KVConnectorMetadata):
    """Scheduler to worker."""

    loads: list[tuple[str, bytes, list[int], list[int], bool]] = field(default_factory=list)
    """(request, keys, blocks, all block ids of the load, synchronous)."""
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


def has_windows(kv_config: Any) -> bool:
    """Can a request lose blocks while it runs?"""
    return any(isinstance(group.kv_cache_spec, SlidingWindowSpec) for group in kv_config.kv_cache_groups)


class ToyScheduler:
    """Decides."""

    def __init__(self, engine: ToyEngine, extra: dict[str, Any], kv_config: Any, mistake: str) -> None:
        self.engine = engine
        self.adapter: Any = ToyLookups(engine)
        self.groups = len(kv_config.kv_cache_groups)
        self.block = kv_config.hash_block_size
        self.chunk = extra["toy.chunk_blocks"]
        self.tokens = self.block * self.chunk
        self.has_windows = has_windows(kv_config)
        self.synchronous = extra.get("toy.load") == "sync" and self.groups == 1 and not self.has_windows
        self.mistake = mistake
        self.trackers: dict[str, Tracker] = {}
        self.loads: list[Any] = []
        self.rounds: dict[tuple[int, int], int] = {}
        self.number = 0

    def matched(self, request: Any, local: int) -> tuple[int, bool]:
        """`get_num_new_matched_tokens`."""
        tracker = self.trackers.setdefault(request.request_id, Tracker(request))
        if tracker.allocated:
            # Blocks were lost. This call may come before anything says so (a reset preempts outside of a step).
            tracker.allocated = False
            tracker.asked = 0
            tracker.loading = set()
            if self.mistake != "stale_hit":
                tracker.admission += 1
        tracker.local = local
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
        careful = self.synchronous and self.mistake != "whole_prompt_sync"
        careful |= self.has_windows and self.mistake != "whole_prompt_window"
        most = request.num_tokens - careful
        tokens = max(0, min(hit.chunks * self.tokens, most) - local)
        return tokens, tokens > 0 and not self.synchronous

    def allocated(self, request: Any, blocks: Any, tokens: int) -> None:
        """`update_state_after_alloc`."""
        tracker = self.trackers[request.request_id]
        first_time, tracker.allocated = not tracker.allocated, True
        if first_time:
            tracker.stored = (tracker.local + tokens) // self.tokens
        table = blocks.get_block_ids()
        if tokens:
            self._load(tracker, table, tracker.local + tokens)
        elif self.mistake == "load_twice" and not first_time and tracker.stored:
            self._load(tracker, table, tracker.stored * self.tokens)

    def _load(self, tracker: Tracker, table: Any, end: int) -> None:
        name = tracker.request.request_id
        hit = self.adapter.lookup(name, tracker.admission, list(tracker.request.block_hashes), self.chunk)
        first, stop = tracker.local // self.tokens, -(-end // self.tokens)
        blocks, all_ids = [], []
        for chunk in range(first, stop):
            for group in range(self.groups):
                for index in range(chunk * self.chunk, (chunk + 1) * self.chunk):
                    block = table[group][index] if index < len(table[group]) else 0
                    held = (index + 1) * self.block <= tracker.local and self.mistake != "load_into_local"
                    wanted = block and not held and index * self.block < end
                    blocks.append(block if wanted else SKIP)
                    if wanted:
                        all_ids.append(block)
        tracker.loading = set(all_ids)
        self.loads.append((name, hit.shards(0, first, stop), blocks, all_ids, self.synchronous))

    def build(self, output: Any) -> Meta:
        """`build_connector_meta`."""
        meta = Meta(loads=self.loads, gone=set(output.preempted_req_ids or ()) | set(output.finished_req_ids))
        self.loads = []
        for load in meta.loads:
            meta.claimed.update(load[3])
        starts = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        for new in output.scheduled_new_reqs:
            self._grow(new.req_id, new.block_ids, False)
            skip = self.trackers[new.req_id].local // self.block
            meta.claimed.update(block for ids in new.block_ids for block in ids[skip:])
        cached = output.scheduled_cached_reqs
        for name, blocks, computed in zip(cached.req_ids, cached.new_block_ids, cached.num_computed_tokens):
            starts[name] = computed
            if blocks is not None:
                self._grow(name, blocks, name in cached.resumed_req_ids)
                skip = self.trackers[name].local // self.block if name in cached.resumed_req_ids else 0
                meta.claimed.update(block for ids in blocks for block in ids[skip:])
        if output.has_sync_kv_loads and self.mistake != "sync_poison":
            return meta  # Nobody knows yet whether the loads of this step bring what they promise.
        for name, count in output.num_scheduled_tokens.items():
            self._store(meta, name, output, starts[name] + count)
        return meta

    def _grow(self, name: str, blocks: Any, resumed: bool) -> None:
        table = self.trackers[name].table or [[] for _ in range(self.groups)]
        for have, more in zip(table, blocks):
            have.extend(more)
        self.trackers[name].table = table

    def _store(self, meta: Meta, name: str, output: Any, computed: int) -> None:
        tracker = self.trackers[name]
        hashes = tracker.request.block_hashes
        if self.mistake == "uncomputed":
            computed += self.block
        stop = min(computed // self.tokens, len(hashes) // self.chunk)
        if self.mistake == "appended_blocks":
            table = tracker.table
        else:
            table = output.kv_connector_block_state.get_block_ids(name)
        for chunk in range(tracker.stored, stop):
            places = range(chunk * self.chunk, (chunk + 1) * self.chunk)
            blocks = [table[group][index] if index < len(table[group]) else 0 for group in range(self.groups) for index in places]
            if not all(blocks) and self.mistake != "null_blocks":
                continue
            self.number += 1
            round_ = (0, self.number)
            self.rounds[round_] = 0
            parent = bytes(hashes[chunk * self.chunk - 1]) if chunk else None
            key = bytes(hashes[(chunk + 1) * self.chunk - 1])
            meta.stores.append(Store(name, round_, [key], blocks, parent))
        tracker.stored = max(tracker.stored, stop)

    def update(self, output: Any) -> None:
        """`update_connector_output`."""
        if self.mistake == "raises" and output.finished_recving:
            raise KeyError("a tracker that is gone")
        meta = output.kv_connector_worker_meta
        if meta is not None:
            for round_ in meta.failed:
                self.rounds.pop(round_, None)
                self.engine.drop(round_)
            for round_, times in meta.stored.items():
                if round_ in self.rounds:
                    self.rounds[round_] += times
                    if self.rounds[round_] == self.engine.writers:
                        del self.rounds[round_]
                        self.engine.commit(round_)
        if output.invalid_block_ids or output.failed_recving:
            # Whose load has failed computes for itself: asked again at once, it would fail again.
            for name, tracker in self.trackers.items():
                if name in output.failed_recving or tracker.loading & output.invalid_block_ids:
                    tracker.useless = True

    def finished(self, request: Any) -> None:
        """`request_finished`."""
        self.trackers.pop(request.request_id, None)
        if self.mistake != "session_leak" or not request.num_preemptions:
            self.adapter.end_session(request.request_id)


class ToyWorker:
    """Does."""

    def __init__(self, engine: ToyEngine, extra: dict[str, Any], kv_config: Any, mistake: str) -> None:
        rank = get_tp_group().rank_in_group
        replicas = kv_config.kv_tp_replicas
        self.native = ToyWorkerAdapter(engine, rank // replicas, rank % replicas == 0)
        self.native.chunk_blocks = extra["toy.chunk_blocks"]
        self.adapter: Any = self.native
        self.writer = rank % replicas == 0
        self.kv_config = kv_config
        self.mistake = mistake
        # vLLM goes on from the first block that is named, and of a window nothing is left in front of it.
        of_one = len(kv_config.kv_cache_groups) == 1
        self.names_blocks = of_one and (mistake == "blocks_of_a_window" or not has_windows(kv_config))
        self.loads: dict[int, tuple[str, bool]] = {}
        self.stores: dict[int, tuple[str, tuple[int, int], set[int]]] = {}
        self.meta = Meta()
        self.report = WorkerMeta()
        self.results = KVConnectorTransferResults()
        self.bad: set[int] = set()

    def register(self, kv_caches: dict[str, Any]) -> None:
        """`register_kv_caches`."""
        self.native.views = [[kv_caches[name] for name in g.layer_names] for g in self.kv_config.kv_cache_groups]

    def flush(self, meta: Meta) -> None:
        """`handle_preemptions`."""
        if self.mistake == "no_flush":
            return
        for job, (request, _, blocks) in self.stores.items():
            if request in meta.gone if self.mistake == "no_window_fence" else blocks & meta.claimed:
                self.adapter.flush([job])

    def load(self) -> None:
        """`start_load_kv`."""
        for request, keys, blocks, _, synchronous in self.meta.loads:
            job = self.adapter.submit_load(request, keys, blocks)
            self.loads[job] = (request, synchronous)
            if synchronous:
                self.adapter.wait_job(job, 1000)

    def save(self) -> None:
        """`wait_for_save`."""
        for store in self.meta.stores:
            if self.writer:
                job = self.adapter.submit_store(store.request, store.round, store.keys, store.blocks, store.parent)
                self.stores[job] = (store.request, store.round, set(store.blocks))

    def poll(self) -> KVConnectorTransferResults:
        """`get_transfer_results`."""
        results = KVConnectorTransferResults()
        for job in self.adapter.get_finished():
            if job.is_store:
                _, round_, _ = self.stores.pop(job.job)
                if job.failed:
                    self.report.failed.add(round_)
                else:
                    self.report.stored[round_] = 1
                continue
            request, synchronous = self.loads.pop(job.job)
            if not synchronous and self.mistake != "lost_report":
                results.finished_recving.add(request)
                if job.failed and not self.names_blocks:
                    results.failed_recving.add(request)
        bad = set(self.adapter.get_block_ids_with_load_errors())
        self.bad = bad if self.names_blocks else set()
        return results


class ToyConnector(KVConnectorBase_V1, SupportsHMA):
    """The glue."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        extra = vllm_config.kv_transfer_config.kv_connector_extra_config
        world = vllm_config.parallel_config.tensor_parallel_size // kv_cache_config.kv_tp_replicas
        engine = ENGINES.setdefault(extra["toy.engine"], ToyEngine(world))
        mistake = extra.get("toy.mistake", "")
        side = ToyScheduler if role == KVConnectorRole.SCHEDULER else ToyWorker
        self.side: Any = side(engine, extra, kv_cache_config, mistake)

    @property
    def requires_kv_delivery(self) -> bool:
        """A cache."""
        return False

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        self.side.register(kv_caches)

    def handle_preemptions(self, kv_connector_metadata: Any) -> None:
        self.side.flush(kv_connector_metadata)

    def bind_connector_metadata(self, connector_metadata: Any) -> None:
        super().bind_connector_metadata(connector_metadata)
        self.side.meta = connector_metadata

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        self.side.load()

    def wait_for_layer_load(self, layer_name: str) -> None:
        pass

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        pass

    def wait_for_save(self) -> None:
        self.side.save()

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        return self.side.poll()

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self.side.bad

    def build_connector_worker_meta(self) -> WorkerMeta:
        report, self.side.report = self.side.report, WorkerMeta()
        return report

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        return self.side.matched(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        self.side.allocated(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> Meta:
        return self.side.build(scheduler_output)

    def update_connector_output(self, connector_output: Any) -> None:
        self.side.update(connector_output)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, None]:
        self.side.finished(request)
        return False, None

    def request_finished_all_groups(self, request: Any, block_ids: Any) -> tuple[bool, None]:
        self.side.finished(request)
        return False, None

    def reset_cache(self) -> bool:
        self.side.adapter.reset_cache()
        return True
