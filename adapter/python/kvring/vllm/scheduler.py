"""The scheduler's side decides what is looked up, loaded and stored, and when blocks may be reused.

Invariants (the harness under `tests/vllm` checks them):

* Each admission has one lookup, over *all* its tokens, which is answered at once. When vLLM asks again it gets the same answer,
  unless what was found is not there any more (an engine that started empty has replaced the one before it): then the lookup is
  repeated. The chunks that it found stay leased until vLLM has decided whether to load them, and then until every rank has
  reported the load.
* Lookups and loads need no engine that lives, only what it has left in shared memory. Stores do.
* Positions and block ids come from vLLM's `SchedulerOutput` and block tables of the very step, never from sums of our own.
* A store is announced for whole chunks that are computed once the step's forward pass has ended, in order, and once per
  admission, except for chunks that could not be stored.
* A store's blocks are *fenced*: a request that is preempted, or loses blocks to a sliding window, has its stores flushed before
  the next forward pass. The blocks of a request that finishes are *pinned*, until every rank has reported the store, vLLM wants
  them back, or `flush_timeout_ms` has passed (`stores.py`).
* The queue is bounded: while the open stores have too many bytes, no further ones are announced.
* While a synchronous load is not known to be good nothing is stored of any request, because vLLM shares loaded blocks at once.
  Under `MultiConnector` that includes other connectors' loads.
"""

from __future__ import annotations

import itertools
import logging
import os
import random
from collections.abc import Collection
from typing import TYPE_CHECKING

from kvring import EngineError, Hit, PollingSchedulerAdapter
from kvring._logs import get_logger

from .adapters import NOT_KNOWN, SALT_BYTES, Adapters, joined, salted
from .config import Config
from .geometry import NULL_BLOCK, Geometry
from .metadata import KvringMetadata, KvringWorkerMetadata, Load, Outcome, Store
from .stats import KvringStats
from .stores import OpenStore, OpenStores
from .tracker import OpenLoad, Tracker

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

    from .events import Events

logger = get_logger("vllm.kvring.scheduler")

NOTHING = (0, False)
"""No tokens, and nothing to wait for."""

NOTHING_TO_DO, NOTHING_TO_DO_IDLE = KvringMetadata(), KvringMetadata(idle=True)
"""A step without work for the workers. Shared: nobody changes metadata once it has been built."""

COUNTED = {
    "not_serving": "lookups_not_serving",
    "cut": "lookups_cut",
    "degraded": "lookups_degraded",
    "refused": "lookups_degraded",
}
"""The adapter's counts of lookups by their outcome, and the counters that users see."""


class SchedulerSide:
    """Makes all decisions. Every method is called from vLLM's scheduler thread. None waits for anything but `reset_cache`, which
    waits for the engine."""

    def __init__(
        self,
        config: Config,
        geometry: Geometry,
        fingerprint: bytes,
        events: Events | None = None,
        *,
        loads: bool = True,
        stores: bool = True,
        batches: int = 1,
    ):
        self.config = config
        self.geometry = geometry
        self.events = events
        # From vLLM's `kv_role`: a producer only stores, a consumer only loads.
        self.loads, self.stores = loads, stores
        self.stats = KvringStats()
        self.trackers: dict[str, Tracker] = {}
        self.open_stores = OpenStores(geometry, config.flush_timeout_ms)
        self.load_waits = config.load == "sync"
        # How many steps vLLM may have scheduled before it has seen the output of the first of them.
        self._batches = batches
        self._unproven = 0
        """How many steps it takes, from this one on, until all synchronous loads are known to be good."""
        client = config.client | {"client": f"vllm-scheduler:{os.getpid()}"}
        self.adapter = PollingSchedulerAdapter(fingerprint, **client)
        self._source = random.SystemRandom().getrandbits(32)
        self._next_job = 0
        self._salt: bytes | None = None
        self._vllm_was_reset = True
        """Did vLLM's last attempt to reset its prefix cache succeed? It fails while a block is in use."""
        self._has_older = False
        """Does vLLM's prefix cache hold blocks from before our last reset? They could be stored as if they had been computed
        since."""
        self._asked = False
        """Has anything been looked up since the adapter's counts were read last?"""
        self._announced: list[Store] = []
        """This step's stores."""
        self._loads: list[Load] = []
        self._open_loads: dict[int, OpenLoad] = {}
        self._loading: dict[bytes, int] = {}
        """By the key of its first chunk: the last open load that begins with that chunk."""
        self._flush_all = False
        """After an error it is no longer known which stores read which blocks: all are to be flushed."""
        self._adapters = Adapters()
        self._lookups: dict[str, int] = {}
        """The adapter's own counts, when they were read last."""

    @property
    def kv_cache_manager(self) -> KVCacheManager | None:
        """vLLM's block tables: who owns which block."""
        return self.open_stores.manager

    @kv_cache_manager.setter
    def kv_cache_manager(self, manager: KVCacheManager) -> None:
        self.open_stores.manager = manager

    # Lookups and loads.

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        """How many tokens beyond `num_computed_tokens` the cache can bring, and whether it loads them between steps. `None`:
        another request loads what this one lacks, and vLLM asks again."""
        tracker = self._track(request)
        tracker.local_tokens = num_computed_tokens
        if tracker.settled or request.skip_reading_prefix_cache or not self.loads:
            return NOTHING
        hit_tokens = self._lookup(tracker, request)
        external = hit_tokens - num_computed_tokens
        if (self.load_waits or self.geometry.has_windows) and hit_tokens >= request.num_tokens:
            # The last token must be computed, or there is nothing to sample from. After an asynchronous load vLLM does that
            # itself, but by then it has dropped the block of a sliding window that this token still looks at.
            external = request.num_tokens - 1 - num_computed_tokens
        if external <= 0:
            return NOTHING
        if not self.load_waits and self._is_being_loaded(tracker):
            return None, False
        return external, not self.load_waits

    def _is_being_loaded(self, tracker: Tracker) -> bool:
        """Does another request's load bring the first chunk that this request lacks? When that load has ended vLLM has the chunk
        in its own prefix cache, or this request loads it."""
        caches = self.kv_cache_manager is not None and self.kv_cache_manager.enable_caching
        return caches and self._key(tracker, tracker.local_tokens // self.geometry.chunk_tokens) in self._loading

    def _track(self, request: Request) -> Tracker:
        tracker = self.trackers.get(request.request_id)
        if tracker is not None and tracker.admission == request.num_preemptions:
            return tracker
        adapter = self._adapters.of(request.lora_request)
        salt = adapter.salt if adapter is not None else None
        if tracker is None:
            tracker = Tracker(request.request_id, request.block_hashes)
            if self.events is not None:
                tracker.tokens = request.all_token_ids
                tracker.lora_name = request.lora_request.lora_name if request.lora_request else None
            self.trackers[request.request_id] = tracker
        tracker.begin(request.num_preemptions, joined(self._salt, salt), adapter)
        if salt == NOT_KNOWN:
            tracker.settled = tracker.has_hole = True
        return tracker

    def _lookup(self, tracker: Tracker, request: Request) -> int:
        """How many tokens the longest prefix has that is in the cache."""
        geometry = self.geometry
        if tracker.hit is not None and not self.adapter.is_current(tracker.request):
            tracker.hit = None
        if tracker.hit is None:
            if len(tracker.hashes) < geometry.hashes_per_chunk:
                return 0
            # Looked up also where vLLM has all of it: so chunks in use are not evicted, and those that are missing are stored.
            tracker.hit = self._ask(tracker)
            tracker.stored_chunks = tracker.hit.chunks
            if logger.isEnabledFor(logging.DEBUG):
                found = tracker.hit.chunks * geometry.chunk_tokens
                logger.debug(
                    "lookup %s: tokens %d, hit %d, local %d, to load %d",
                    request.request_id, request.num_tokens, found, tracker.local_tokens, max(0, found - tracker.local_tokens),
                )  # fmt: skip
        return tracker.hit.chunks * geometry.chunk_tokens

    def _ask(self, tracker: Tracker) -> Hit:
        self._asked = True
        # The adapter reads vLLM's own list of hashes as it needs them: no copy of them is made here.
        return self.adapter.lookup(
            tracker.request, tracker.admission, tracker.hashes, self.geometry.hashes_per_chunk, tracker.salt
        )

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        """vLLM has allocated a request's blocks, also for the `num_external_tokens` that the cache is to bring: prepares that
        load, and releases the rest of the lease."""
        tracker = self.trackers.get(request.request_id)
        if tracker is None or tracker.settled:
            return
        tracker.settled = True
        hit, tracker.hit = tracker.hit, None
        if hit is None:
            return
        if tracker.admission == 0:
            # Counted as vLLM counts its own hits: each request that it has begun with once, however often it preempts it.
            self.stats.add("lookups")
            self.stats.add("lookup_tokens", request.num_tokens)
            self.stats.add("hit_tokens", hit.chunks * self.geometry.chunk_tokens)
        if hit.chunks == 0:
            return
        if num_external_tokens == 0:
            self.adapter.free_lookup_locks(tracker.request, tracker.admission, 0)
            return
        chunk_tokens = self.geometry.chunk_tokens
        start, end = tracker.local_tokens, tracker.local_tokens + num_external_tokens
        first, last = start // chunk_tokens, min(-(-end // chunk_tokens), hit.chunks)
        self.adapter.free_lookup_locks(tracker.request, tracker.admission, last)
        table = blocks.get_block_ids()
        load = Load(
            job=self._job(),
            request=tracker.request,
            tokens=num_external_tokens,
            wait=self.load_waits,
            handles=hit.handles(first, last),
            blocks=self.geometry.to_load(table, first, last, start, end),
        )
        key = self._key(tracker, first)
        tracker.load = OpenLoad(load.job, load.request, tracker.admission, load.wait, first, start, key)
        self._open_loads[load.job] = tracker.load
        self._loading[key] = load.job
        self._loads.append(load)
        self.stats.add("load_tokens", num_external_tokens)

    def load_cannot_be(self, request_id: str, blocks: KVCacheBlocks) -> None:
        """vLLM waits for a load that an error of ours has prevented: has the workers report it as failed."""
        if any(load.request == request_id for load in self._loads):
            # The error came after the load was prepared: the load is on its way.
            return
        job, tracker = self._job(), self.trackers.get(request_id)
        start = 0
        if tracker is not None:
            tracker.settled, start = True, tracker.local_tokens
            tracker.load = OpenLoad(
                job, request_id, tracker.admission, self.load_waits, start // self.geometry.chunk_tokens, start
            )
            self._open_loads[job] = tracker.load
        # Without the blocks before `start`: vLLM had those itself, they are good, and other requests may use them.
        table = zip(self.geometry.groups, blocks.get_block_ids(), strict=True)
        ids = [block for group, ids in table for block in ids[start // group.tokens :] if block != NULL_BLOCK]
        self._loads.append(Load(job, request_id, 0, self.load_waits, b"", ids))

    # Stores.

    def build_connector_meta(self, output: SchedulerOutput) -> KvringMetadata:
        """This step's work for the workers. Most steps have none, and cost next to nothing."""
        self._announced = []
        self._unproven = self._batches if output.has_sync_kv_loads else max(0, self._unproven - 1)
        idle = output.total_num_scheduled_tokens == 0
        try:
            if idle and self.open_stores.has_pins and any(not tracker.settled for tracker in self.trackers.values()):
                # Nothing runs, and a request waits, perhaps for just these blocks.
                self.open_stores.let_go()
            self.open_stores.let_go_in_time()
            flush = self.open_stores.fence(output.preempted_req_ids) if self.open_stores else ()
            for job in self.open_stores.overdue():
                self._store_ended(job)
            if self._may_store():
                self._store_all(output)
        except Exception:
            for store in self._announced:
                # The workers never get this store, so none will report it.
                self._store_ended(store.job)
            raise
        if not (self._loads or self._announced or flush or self._flush_all):
            return NOTHING_TO_DO_IDLE if idle else NOTHING_TO_DO
        meta = KvringMetadata(self._loads, self._announced, list(flush), self._flush_all, idle)
        self._loads, self._flush_all = [], False
        return meta

    def _may_store(self) -> bool:
        """May this step announce stores? Not while a synchronous load may have failed, on any rank and of any connector, since
        vLLM's block tables do not tell who has loaded a block; nor while too many bytes are queued. A later step stores those
        chunks."""
        return self.stores and not self._unproven and not self.open_stores.is_full

    def emergency_meta(self) -> KvringMetadata:
        """The metadata of a step after an error of ours: all stores are flushed, and loads that vLLM waits for still start."""
        meta = KvringMetadata(loads=self._loads, flush_all=True)
        self._loads = []
        return meta

    def _store_all(self, output: SchedulerOutput) -> None:
        """Announces the chunks that are complete once this step's tokens are computed."""
        chunk_tokens, trackers, scheduled = self.geometry.chunk_tokens, self.trackers, output.num_scheduled_tokens
        cached = output.scheduled_cached_reqs
        for request_id, computed in itertools.chain(
            ((new.req_id, new.num_computed_tokens) for new in output.scheduled_new_reqs),
            zip(cached.req_ids, cached.num_computed_tokens, strict=True),
        ):
            tracker = trackers.get(request_id)
            if tracker is None or tracker.has_hole:
                continue
            chunks = (computed + scheduled[request_id]) // chunk_tokens
            if chunks > tracker.stored_chunks and self.adapter.is_healthy():
                self._store(tracker, chunks)
                if self.open_stores.is_full:
                    return

    def _store(self, tracker: Tracker, chunks: int) -> None:
        """Announces stores of a request's first `chunks` chunks, as far as their tokens are known: those that speculation has
        only guessed are left out."""
        geometry, manager = self.geometry, self.kv_cache_manager
        complete = min(chunks, len(tracker.hashes) // geometry.hashes_per_chunk)
        if complete <= tracker.stored_chunks or manager is None:
            return
        # The blocks, not a list of their ids: to make that takes time in proportion to the whole context.
        table = manager.get_blocks(tracker.request).blocks
        first, keys, blocks = tracker.stored_chunks, [], []
        for chunk in range(first, complete):
            ids = geometry.to_store(table, chunk)
            if ids is None:
                tracker.has_hole = True
                break
            keys.append(self._key(tracker, chunk))
            blocks += ids
        tracker.stored_chunks = first + len(keys)
        if not keys:
            return
        job = self._job()
        parent = self._key(tracker, first - 1) if first else None
        self._announced.append(Store(job, tracker.request, (self._source, job), parent, keys, blocks, tracker.adapter))
        self.open_stores.add(OpenStore(job, tracker.request, tracker.admission, first, len(keys), blocks))
        if self.events is not None:
            self.events.announce(job, tracker, first, len(keys))

    def _key(self, tracker: Tracker, chunk: int) -> bytes:
        return salted(tracker.hashes[(chunk + 1) * self.geometry.hashes_per_chunk - 1], tracker.salt)

    # When vLLM wants blocks.

    def let_go(self) -> None:
        """vLLM is about to reset its prefix cache: gives back all pinned blocks."""
        self.open_stores.let_go()

    def has_given_blocks(self, request_id: str) -> bool:
        """vLLM lacks blocks for a request: gives pinned ones back. True where more are free now. Only for a request that has
        blocks already, because vLLM would preempt it or another one; a new request waits its turn."""
        manager = self.kv_cache_manager
        if manager is None or not self.open_stores.has_pins or not any(manager.get_blocks(request_id).blocks):
            return False
        free = manager.block_pool.get_num_free_blocks()
        self.open_stores.let_go()
        return manager.block_pool.get_num_free_blocks() > free

    def has_pending_push_work(self) -> bool:
        """Must vLLM go on with empty steps, because blocks are still pinned? For `flush_timeout_ms` at most."""
        self.open_stores.let_go_in_time()
        return self.open_stores.has_pins

    # Ends.

    def request_finished(self, request_id: str) -> None:
        """A request has ended: pins the blocks that its stores read. vLLM takes the request's blocks back when this returns."""
        tracker = self.trackers.get(request_id)
        if tracker is None:
            return
        self.open_stores.pin(request_id)
        tracker.finished = True
        self._forget_if_over(tracker)

    def finished_after_error(self, request_id: str) -> None:
        """A request has ended, and pinning its blocks has failed. vLLM takes them back, and it is not known which stores read
        them: so all stores are flushed before the next forward pass."""
        self._flush_all = True
        tracker = self.trackers.pop(request_id, None)
        if tracker is not None and tracker.load is not None:
            self._drop_load(tracker.load)
        self.adapter.end_session(request_id)

    def _forget_if_over(self, tracker: Tracker) -> None:
        """Forgets a request and ends its session once it has finished, but not before its load, which needs the lease."""
        if not tracker.finished or tracker.load is not None:
            return
        if self.trackers.get(tracker.request) is tracker:
            del self.trackers[tracker.request]
        self.adapter.end_session(tracker.request)

    def update_connector_output(self, worker_meta: KvringWorkerMetadata | None, bad_blocks: Collection[int] = ()) -> None:
        """Takes the workers' reports, and the blocks that some connector could not load."""
        if bad_blocks and self._unproven:
            self._spoilt(bad_blocks)
        if worker_meta is None:
            return
        for adapter in worker_meta.adapters:
            self._adapters.learn(adapter)
        errors = []
        for job, outcome in worker_meta.outcomes.items():
            # An error in one report must not lose the others: none is sent a second time.
            try:
                self._reported(job, outcome)
            except Exception as error:
                errors.append(error)
                self._give_up(job)
        if errors:
            raise errors[0]

    def _reported(self, job: int, outcome: Outcome) -> None:
        if (load := self._open_loads.get(job)) is not None:
            load.outcome.add(outcome)
            if load.outcome.ranks >= self.geometry.ranks:
                self._load_ended(load)
        elif (store := self.open_stores.get(job)) is not None:
            store.outcome.add(outcome)
            if store.outcome.ranks >= self.geometry.world:
                self._store_ended(job)

    def give_up(self, worker_meta: KvringWorkerMetadata | None) -> None:
        """After an error: gives up the jobs whose reports are lost."""
        for job in worker_meta.outcomes if worker_meta is not None else ():
            self._give_up(job)

    def _give_up(self, job: int) -> None:
        """After an error: forgets this job, of which nothing more is known, and stores nothing more of its request."""
        self._flush_all = True
        load, store = self._open_loads.get(job), self.open_stores.get(job)
        if load is not None:
            self._drop_load(load)
        if store is not None:
            self.open_stores.close(store)
        request = load.request if load else store.request if store else ""
        tracker = self.trackers.get(request)
        if tracker is None:
            return
        tracker.has_hole, tracker.load = True, None
        if tracker.finished:
            del self.trackers[request]
            self.adapter.end_session(request)

    def _load_ended(self, load: OpenLoad) -> None:
        self._drop_load(load)
        tracker = self.trackers.get(load.request)
        if tracker is not None and tracker.load is load:
            tracker.load = None
            # vLLM computes the chunks that were not loaded, and they are stored again: the engine skips those that it still has.
            if load.outcome.ranks_failed:
                tracker.store_again(load.first_chunk)
        if load.outcome.ranks_failed and load.wait and self.kv_cache_manager is not None:
            (ids,) = self.kv_cache_manager.get_block_ids(load.request)
            self._spoilt(ids[load.start // self.geometry.groups[0].tokens :])
        self.adapter.free_lookup_locks(load.request, load.admission, 0)
        if tracker is not None:
            self._forget_if_over(tracker)

    def _drop_load(self, load: OpenLoad) -> None:
        self._open_loads.pop(load.job, None)
        if self._loading.get(load.key) == load.job:
            del self._loading[load.key]

    def _spoilt(self, bad_blocks: Collection[int]) -> None:
        """A synchronous load has failed: its step computed from garbage, and vLLM had already put the blocks into its own prefix
        cache. vLLM computes them again, but until then it would serve the garbage to other requests, and we would store it for
        good. So vLLM's prefix cache drops the blocks, and nothing more is stored of the present requests."""
        for tracker in self.trackers.values():
            tracker.has_hole = True
        manager = self.kv_cache_manager
        if manager is None:
            return
        bad = set(bad_blocks) - {NULL_BLOCK}
        evict = set(bad)
        for request in self.trackers:
            # A request that shares bad blocks has computed its later blocks from them. There is one group: with several, vLLM
            # knows no bad blocks.
            (ids,) = manager.get_block_ids(request)
            evict.update(itertools.dropwhile(lambda block: block not in bad, ids))
        manager.evict_blocks(evict)

    def _store_ended(self, job: int) -> None:
        """Closes a store that every rank has reported, or that is no longer waited for."""
        store = self.open_stores.get(job)
        if store is None:
            return
        self.open_stores.close(store)
        failed = store.outcome.ranks < self.geometry.world or store.outcome.ranks_failed > 0
        if self.events is not None:
            self.events.stored(job, failed=failed)
        tracker = self.trackers.get(store.request)
        if failed and tracker is not None and tracker.admission == store.admission:
            tracker.store_again(store.first_chunk)

    # The rest.

    def vllm_was_reset(self, done: bool) -> None:
        """vLLM has tried to reset its own prefix cache; `done`: it succeeded."""
        self._vllm_was_reset = done
        if done and self._has_older:
            self.reset_cache()

    def reset_cache(self) -> None:
        """Makes everything that was stored before unfindable, whether or not the engine answers now: weights may have changed,
        and a dead engine may come back with what it held. So from here on this vLLM uses other keys (another salt)."""
        self._salt = os.urandom(SALT_BYTES)
        self._has_older = not self._vllm_was_reset
        for tracker in self.trackers.values():
            # These requests' blocks hold KV from before the reset, and those that wait were promised such KV.
            tracker.has_hole = True
            if not tracker.settled:
                tracker.settled = True
                self.adapter.free_lookup_locks(tracker.request, tracker.admission, 0)
        try:
            dropped = self.adapter.reset_cache()
        except EngineError as error:
            logger.warning(
                "the cache is reset: the kvring engine could not be asked to free it (%s), but it is not used any more", error
            )
        else:
            logger.info("the cache is reset: %d chunks dropped", dropped)
        if self.events is not None:
            self.events.cleared()

    def take_stats(self) -> KvringStats | None:
        """Counts since the last call."""
        if self._asked:
            self._asked = False
            self._count_outcomes()
        return self.stats.take()

    def _count_outcomes(self) -> None:
        """Counts the lookups since the last call of this by their outcomes."""
        before, self._lookups = self._lookups, self.adapter.lookup_stats()
        for outcome, counter in COUNTED.items():
            if new := self._lookups[outcome] - before.get(outcome, 0):
                self.stats.add(counter, new)

    def open_jobs(self) -> int:
        """Loads and stores that not every rank has reported."""
        return len(self._open_loads) + len(self.open_stores)

    def shutdown(self) -> None:
        """Ends the client."""
        self.adapter.shutdown()

    def _job(self) -> int:
        self._next_job += 1
        return self._next_job
