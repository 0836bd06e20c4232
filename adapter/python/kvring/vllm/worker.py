"""A worker's side: one rank's paged KV cache, its copies in the background, and the reports on them.

Each rank reports each job exactly once, in the `KvringWorkerMetadata` of some step, and each request with a load that vLLM waits
for exactly once, in the transfer results. A job that fails is reported as failed, so that nobody waits for ever.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from kvring import SKIP, ConfigError, DeviceError, KvGroup, LayoutError, WorkerAdapter
from kvring._logs import get_logger

from .adapters import LoadedAdapters
from .config import Config
from .geometry import Geometry
from .metadata import KvringMetadata, KvringWorkerMetadata, Load, Outcome, Store
from .stats import KvringStats

if TYPE_CHECKING:
    import torch
    from vllm.v1.kv_cache_interface import KVCacheConfig

    from kvring import Finished

logger = get_logger("vllm.kvring.worker")

_IDLE_WAIT_MS = 1.0
"""How long a step without a forward pass waits for a load: vLLM has nothing else to do, and would only ask again."""


def cuda_device(layers: Mapping[str, torch.Tensor]) -> int | None:
    """The one CUDA device that all of a cache is on; `None` for the CPU. Raises `LayoutError` for a cache on several devices, and
    for devices of other kinds."""
    first, expected = "", None
    for layer, tensor in layers.items():
        device = tensor.device
        if device.type not in ("cpu", "cuda"):
            raise LayoutError(
                f"{layer}: expected a tensor on cpu or cuda, got one on {device}: kvring cannot copy from and to the memory of "
                f"{device.type} devices"
            )
        # Numbers are compared, not torch's devices: "cuda" without a number is the current one.
        place = None if device.type == "cpu" else _index(device)
        if not first:
            first, expected = layer, place
        elif place != expected:
            said = "cpu" if expected is None else f"cuda:{expected}"
            raise LayoutError(f"{layer}: expected a tensor on {said}, where {first} is, got one on {device}")
    return expected


def _index(device: torch.device) -> int:
    if device.index is not None:
        return device.index
    import torch

    return int(torch.cuda.current_device())


class WorkerSide:
    """Carries out what the scheduler's side decided. Every method is called from vLLM's worker thread. None waits for the
    engine, and only `flush` and synchronous loads wait for copies. Two cases on a GPU are exceptions: where vLLM may unmap the
    cache between steps, each step waits for all copies that it starts; where vLLM clears blocks before it calls `flush`, each
    step waits for its stores to have read."""

    def __init__(
        self,
        config: Config,
        geometry: Geometry,
        fingerprint: bytes,
        rank: int,
        model: str = "",
        dtype: str = "",
        *,
        may_sleep: bool = False,
    ) -> None:
        self.geometry = geometry
        self.rank = rank
        self.stats = KvringStats()
        self.adapter = WorkerAdapter(
            fingerprint,
            world=geometry.world,
            rank=geometry.shard_of(rank),
            chunk_tokens=geometry.chunk_tokens,
            model=model,
            dtype=dtype,
            checksum=config.checksum,
            copy_threads=config.copy_threads,
            copy=config.copy,
            **config.client,
            client=f"vllm-worker-{rank}:{os.getpid()}",
        )
        self.device: int | None = None
        """The CUDA device that the cache is on; `None`: host memory."""
        self._config = config
        self._may_sleep = may_sleep
        self._reads_at_once = self._writes_at_once = False
        """Must stores have read, and loads have written, when the call that starts them returns?"""
        self._loads: dict[int, Load] = {}
        """The load, by the adapter's job."""
        self._stores: dict[int, int] = {}
        """The scheduler's job, by the adapter's."""
        self._reading: dict[int, int] = {}
        """The adapter's job, by the scheduler's, of stores that may still read their blocks."""
        self._received: set[str] = set()
        self._failed: set[str] = set()
        self._invalid_blocks: set[int] = set()
        # Are failed loads reported by their blocks? Else they are reported by their request: with several groups, one number may
        # be a block of each; with a window, vLLM would go on from the first block that is named, and what it computes there
        # looks back at blocks that nobody has filled.
        self._invalidates = geometry.knows_bad_blocks
        self._outcomes: dict[int, Outcome] = {}
        self.adapters = LoadedAdapters()

    def register_kv_caches(self, kv_caches: Mapping[str, torch.Tensor], kv_cache_config: KVCacheConfig) -> None:
        """Hands the engine the shape of this rank's cache. Called while vLLM starts. Raises `LayoutError`, `ConfigError` or
        `RegisterError`."""
        num_blocks = kv_cache_config.num_blocks
        groups, layers = [], {}
        for index, (group, spec) in enumerate(zip(self.geometry.groups, kv_cache_config.kv_cache_groups, strict=True)):
            tensors: dict[tuple[int, tuple[int, ...], tuple[int, ...], int], None] = {}
            for name in spec.layer_names:
                tensor = kv_caches.get(name)
                if tensor is None:
                    # This layer shares another one's cache.
                    continue
                layers[f"KV group {index}, layer {name}"] = tensor
                described = (tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride()), tensor.element_size())
                # A tensor counts once, also where all layers that share it are listed.
                tensors[described] = None
            if not tensors:
                raise LayoutError(f"KV group {index}: expected a tensor for one of its layers, got none of {spec.layer_names}")
            groups.append(KvGroup(num_blocks, group.blocks, list(tensors)))
        self.device = cuda_device(layers)
        if self.device is None and self._config.copy != "auto":
            raise ConfigError(
                f'kvring.copy: expected "auto", got {self._config.copy!r}: the KV cache is in CPU memory, which no GPU copies'
            )
        if self.device is not None and self._config.copy_threads is not None:
            logger.warning("kvring.copy_threads has no effect: the KV cache is in a GPU's memory, and the GPU copies")
        # A vLLM that goes to sleep unmaps the cache between two steps, and tells no connector: a copy that began after that would
        # break the GPU's context for the whole process.
        self._writes_at_once = self.device is not None and self._may_sleep
        # vLLM's V2 runner calls `flush` only after it has cleared the blocks that got a new owner, where it clears blocks at all.
        self._reads_at_once = self._writes_at_once or (self.device is not None and kv_cache_config.needs_kv_cache_zeroing)
        if self._writes_at_once:
            logger.info("vLLM may sleep (--enable-sleep-mode): every step waits for the copies that it starts")
        self.adapter.register_kv_caches(groups, owner=dict(kv_caches), device=self.device)
        logger.info(
            "registered rank %d of %d: %d KV groups on %s, chunks of %d tokens and %d bytes, blocks of %d pieces; "
            "the kvring engine is %s",
            self.rank, self.geometry.ranks, len(groups), "cpu" if self.device is None else f"cuda:{self.device}",
            self.geometry.chunk_tokens, self.adapter.shard_bytes, sum(len(group.planes) for group in groups),
            self.adapter.health(),
        )  # fmt: skip

    def _stream(self) -> int | None:
        """The stream that vLLM computes on now: copies run after all work that is on it already."""
        if self.device is None:
            return None
        import torch

        return int(torch.cuda.current_stream(self.device).cuda_stream)

    # One step, in the order of the calls.

    def flush(self, meta: KvringMetadata) -> None:
        """Waits until fenced stores no longer read their blocks. Called before anything of this step writes blocks."""
        if meta.flush_all:
            self.adapter.handle_preemptions(None)
        elif meta.flush:
            self.adapter.flush([self._reading[job] for job in meta.flush if job in self._reading])

    def start_loads(self, meta: KvringMetadata) -> None:
        """Starts this step's loads; waits for those that its forward pass needs."""
        for load in meta.loads:
            try:
                self._start_load(load)
            except DeviceError:
                # The load has not ended. If it were reported as failed, vLLM would compute its blocks again while the GPU still
                # writes there.
                raise
            except Exception as error:
                # Any other error is reported: vLLM waits for the report, or would compute from blocks that were not loaded.
                logger.warning(
                    "request %s: its KV cannot be loaded: %s: %s; vLLM computes these tokens again or fails the request, as its "
                    "kv_load_failure_policy says",
                    load.request, type(error).__name__, error,
                )  # fmt: skip
                self._load_failed(load)

    def fail_loads(self, meta: KvringMetadata) -> None:
        """After an error: reports this step's loads that have not been started as failed, because they never will be."""
        running = {load.job for load in self._loads.values()}
        for load in meta.loads:
            if load.job not in running and load.job not in self._outcomes:
                self._load_failed(load)

    def _start_load(self, load: Load) -> None:
        if not load.handles:
            self._load_failed(load)
            return
        job = self.adapter.submit_load(load.request, load.handles, load.blocks, stream=self._stream())
        self._loads[job] = load
        if load.wait or self._writes_at_once:
            # The report comes for certain, and until then the load may write: so this never gives up.
            while not self._has_ended(job):
                logger.warning("this step waits for a load of request %s, now for more than a second", load.request)

    def _has_ended(self, job: int) -> bool:
        try:
            return self.adapter.wait_job(job, 1_000.0)
        except DeviceError:
            raise
        except Exception as error:
            logger.error("an error while this step waits for a load: %s: %s; it waits on", type(error).__name__, error)
            return False

    def _load_failed(self, load: Load) -> None:
        self.stats.add("loads")
        self.stats.add("loads_failed")
        self._load_ended(load, chunks_failed=1)
        if self._invalidates:
            self._invalid_blocks.update(block for block in load.blocks if block != SKIP)

    def start_stores(self, meta: KvringMetadata) -> None:
        """Starts this step's stores. Their KV has been computed, or will be by work that is on the stream already."""
        if not self.geometry.stores(self.rank):
            return
        for store in meta.stores:
            if not self.adapters.holds(store.adapter):
                # vLLM has loaded an adapter of other content since the scheduler's side announced this store.
                self._store_failed(store)
                continue
            try:
                self._start_store(store)
            except Exception as error:
                logger.warning("request %s: its KV is not stored: %s: %s", store.request, type(error).__name__, error)
                self._store_failed(store)
        if self._reads_at_once and meta.stores:
            self.adapter.handle_preemptions(None)

    def _store_failed(self, store: Store) -> None:
        self._outcomes[store.job] = Outcome(ranks=1, chunks_failed=len(store.keys), ranks_failed=1)
        self.stats.add("stores")
        self.stats.add("store_chunks_dropped", len(store.keys))

    def _start_store(self, store: Store) -> None:
        stream = self._stream()
        job = self.adapter.submit_store(store.request, store.round, store.keys, store.blocks, store.parent, stream=stream)
        self._stores[job] = store.job
        self._reading[store.job] = job

    def collect(self, meta: KvringMetadata) -> None:
        """Collects the jobs that have ended; the `take_…` calls then report them."""
        if not (self._loads or self._stores):
            return
        if meta.idle and self._loads:
            self.adapter.wait_some(_IDLE_WAIT_MS)
        for finished in self.adapter.get_finished():
            # An error in one must not lose the others: the adapter gives each only once, and vLLM waits for every one.
            try:
                self._count(finished)
            except Exception as error:
                logger.error(
                    "request %s: an error while its KV is counted: %s: %s", finished.request, type(error).__name__, error
                )
            try:
                if finished.is_store:
                    self._store_finished(finished)
                else:
                    self._load_finished(finished)
            except Exception as error:
                logger.error(
                    "request %s: an error while its KV is reported: %s: %s", finished.request, type(error).__name__, error
                )
                self._report_at_least(finished)
        # Asked after `get_finished`, so that the blocks of the loads which that has returned are among these. Taken also where
        # vLLM is told the request instead, because the adapter would keep them for ever.
        bad_blocks = self.adapter.get_block_ids_with_load_errors()
        if self._invalidates:
            self._invalid_blocks.update(bad_blocks)

    def _store_finished(self, finished: Finished) -> None:
        job = self._stores.get(finished.job)
        if job is not None:
            del self._stores[finished.job]
            self._reading.pop(job, None)
            self._outcomes[job] = Outcome(ranks=1, chunks_failed=finished.failed, ranks_failed=int(finished.failed > 0))

    def _load_finished(self, finished: Finished) -> None:
        load = self._loads.get(finished.job)
        if load is not None:
            self._load_ended(load, chunks_failed=finished.failed)
            del self._loads[finished.job]

    def _load_ended(self, load: Load, *, chunks_failed: int) -> None:
        self._outcomes[load.job] = Outcome(ranks=1, chunks_failed=chunks_failed, ranks_failed=int(chunks_failed > 0))
        if not load.wait:
            self._received.add(load.request)
            if chunks_failed and not self._invalidates:
                self._failed.add(load.request)

    def _report_at_least(self, finished: Finished) -> None:
        """After an error in the usual report: reports at least what the scheduler's side and vLLM wait for."""
        failed = Outcome(ranks=1, chunks_failed=max(1, finished.failed), ranks_failed=1)
        job, load = self._stores.pop(finished.job, None), self._loads.pop(finished.job, None)
        if job is not None:
            self._reading.pop(job, None)
            self._outcomes[job] = failed
        if load is not None:
            self._outcomes[load.job] = failed
            if not load.wait:
                self._received.add(load.request)
                self._failed.update({load.request} if finished.failed and not self._invalidates else ())

    def _count(self, finished: Finished) -> None:
        what, stats = "store" if finished.is_store else "load", self.stats
        stats.add(f"{what}s")
        stats.add(f"{what}_bytes", finished.bytes)
        stats.add(f"{what}_seconds", finished.seconds)
        if finished.is_store:
            stats.add("store_chunks", finished.done)
            stats.add("store_chunks_skipped", finished.skipped)
            stats.add("store_chunks_dropped", finished.failed)
        elif finished.failed:
            stats.add("loads_failed")
        self._log(what, finished, finished.done * self.geometry.chunk_tokens)

    def _log(self, what: str, finished: Finished, tokens: int) -> None:
        if logger.isEnabledFor(logging.DEBUG):
            seconds = finished.seconds
            logger.debug(
                "%s %s: tokens %d, chunks %d (skipped %d, failed %d %s), %d bytes in %.3f ms, %.2f GB/s",
                what, finished.request, tokens, finished.done, finished.skipped, finished.failed, finished.why or "",
                finished.bytes, seconds * 1e3, finished.bytes / seconds / 1e9 if seconds else 0.0,
            )  # fmt: skip

    def take_transfer_results(self) -> tuple[set[str], set[str]]:
        """The requests whose load has ended, and those of them whose load has failed. Returns each once."""
        results = self._received, self._failed
        self._received, self._failed = set(), set()
        return results

    def take_invalid_blocks(self) -> set[int]:
        """Blocks that could not be loaded. Returns each once."""
        blocks, self._invalid_blocks = self._invalid_blocks, set()
        return blocks

    def take_worker_meta(self) -> KvringWorkerMetadata | None:
        """The outcomes of jobs and the LoRA adapters that were loaded, since the last call; `None` where there are none."""
        adapters = self.adapters.take_news()
        if not (self._outcomes or adapters):
            return None
        outcomes, self._outcomes = self._outcomes, {}
        return KvringWorkerMetadata(outcomes, adapters)

    def take_stats(self) -> KvringStats | None:
        """Counts since the last call."""
        return self.stats.take()

    def shutdown(self) -> None:
        """Ends the client. When it returns, no copy touches the KV cache any more."""
        self.adapter.shutdown()
