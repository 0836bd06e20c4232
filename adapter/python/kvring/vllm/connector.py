"""The glue: vLLM's connector interface on one side, `SchedulerSide` and `WorkerSide` on the other. No decisions here.

Errors in the configuration are raised while vLLM starts. From then on nothing is raised: see `guard`.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    SupportsHMA,
)
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from kvring._logs import get_logger, share_handlers

from . import autostart, decisions
from .config import Config
from .events import Events
from .geometry import Geometry
from .guard import fail_open
from .metadata import KvringMetadata, KvringWorkerMetadata
from .namespace import check_gpu, describe, fingerprint
from .scheduler import NOTHING, SchedulerSide
from .stats import KvringPromMetrics, KvringStats
from .worker import WorkerSide

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.distributed.kv_events import KVCacheEvent
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorStats
    from vllm.forward_context import ForwardContext
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request


logger = get_logger("vllm.kvring")

_MULTI_CONNECTOR = "vllm.distributed.kv_transfer.kv_connector.v1.multi_connector"


class KvringConnector(KVConnectorBase_V1, SupportsHMA):
    """Keeps vLLM's KV cache in a kvring engine on the same node. Configured by `kv_connector_extra_config`: see `Config`."""

    _cache_hit_source = CacheHitSource.HOST

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig):
        super().__init__(vllm_config, role, kv_cache_config)
        share_handlers("vllm")
        config = Config.parse(self._kv_transfer_config.kv_connector_extra_config)
        geometry = Geometry.of(vllm_config, kv_cache_config, config.chunk_blocks)
        decisions.check(config, vllm_config, geometry, loads=self._kv_transfer_config.is_kv_consumer)
        tell = role == KVConnectorRole.SCHEDULER
        name = fingerprint(describe(vllm_config, kv_cache_config, geometry, config.weights_version, tell=tell))
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | None = None
        self._autostart = autostart.Keeper(config.name, config.arena) if config.autostart and config.arena else None
        if self._autostart is not None:
            self._autostart.ensure()
            self._autostart.watch()
        if role == KVConnectorRole.SCHEDULER:
            if (line := config.without_effect()) is not None:
                logger.warning("%s", line)
            wants_events = vllm_config.kv_events_config is not None and vllm_config.kv_events_config.enable_kv_cache_events
            events = Events(geometry) if wants_events else None
            self._scheduler = SchedulerSide(
                config,
                geometry,
                name,
                events,
                loads=self._kv_transfer_config.is_kv_consumer,
                stores=self._kv_transfer_config.is_kv_producer,
                batches=vllm_config.max_concurrent_batches,
            )
        else:
            model = vllm_config.model_config
            self._worker = WorkerSide(
                config,
                geometry,
                name,
                vllm_config.parallel_config.rank % geometry.ranks,
                model=str(model.model).rstrip("/").rsplit("/", 1)[-1],
                dtype=str(model.dtype if vllm_config.cache_config.cache_dtype == "auto" else vllm_config.cache_config.cache_dtype)
                .removeprefix("torch."),
                may_sleep=bool(getattr(model, "enable_sleep_mode", False)),
            )  # fmt: skip
            if vllm_config.lora_config is not None:
                self._worker.adapters.watch()

    @property
    def scheduler(self) -> SchedulerSide:
        """The scheduler's side; only in the connector of vLLM's scheduler."""
        assert self._scheduler is not None, "this connector is a worker's"
        return self._scheduler

    @property
    def worker(self) -> WorkerSide:
        """The worker's side; only in the connector of a worker."""
        assert self._worker is not None, "this connector is the scheduler's"
        return self._worker

    @property
    def requires_kv_delivery(self) -> bool:
        """`False`: kvring is a cache, and KV that was not stored is a miss later on, but no reason to compute anything twice."""
        return False

    def count_error(self) -> None:
        """Counts an error; called by `guard`."""
        side = self._scheduler or self._worker
        if side is not None:
            side.stats.add("errors")

    @property
    def _meta(self) -> KvringMetadata:
        meta = self._get_connector_metadata()
        assert isinstance(meta, KvringMetadata)
        return meta

    # The scheduler's side.

    def bind_kv_cache_manager(self, kv_cache_manager: KVCacheManager) -> None:
        """Takes vLLM's manager, which says who owns which block, and wraps two of its methods. `reset_prefix_cache`: vLLM resets
        its prefix cache only while no block is in use, and tells no connector before it looks; the wrapper gives pinned blocks
        back first. `allocate_slots`: where blocks are lacking vLLM does ask (`has_pending_block_frees`), but then offers what it
        gets to waiting requests; the wrapper gives blocks back to the request that lacks them, and tries again."""
        super().bind_kv_cache_manager(kv_cache_manager)
        self.scheduler.kv_cache_manager = kv_cache_manager
        reset, allocate = kv_cache_manager.reset_prefix_cache, kv_cache_manager.allocate_slots

        @functools.wraps(reset)
        def reset_prefix_cache() -> bool:
            self._let_go()
            done = reset()
            self._was_reset(done)
            return done

        @functools.wraps(allocate)
        def allocate_slots(request: Request, *args: Any, **named: Any) -> KVCacheBlocks | None:
            blocks = allocate(request, *args, **named)
            if blocks is None and self._has_given_blocks(request):
                blocks = allocate(request, *args, **named)
            return blocks

        kv_cache_manager.reset_prefix_cache = reset_prefix_cache
        kv_cache_manager.allocate_slots = allocate_slots

    @fail_open(lambda self: None)
    def _let_go(self) -> None:
        self.scheduler.let_go()

    @fail_open(lambda self, *_: None)
    def _was_reset(self, done: bool) -> None:
        self.scheduler.vllm_was_reset(done)

    @fail_open(lambda self, _: False)
    def _has_given_blocks(self, request: Request) -> bool:
        return self.scheduler.has_given_blocks(request.request_id)

    @fail_open(lambda self: False)
    def has_pending_push_work(self) -> bool:
        """See `SchedulerSide`."""
        return self.scheduler.has_pending_push_work()

    @fail_open(lambda self, *_: NOTHING)
    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        """See `SchedulerSide`."""
        return self.scheduler.get_num_new_matched_tokens(request, num_computed_tokens)

    def _no_load(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        if num_external_tokens > 0:
            self.scheduler.load_cannot_be(request.request_id, blocks)

    @fail_open(_no_load)
    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        """See `SchedulerSide`."""
        self.scheduler.update_state_after_alloc(request, blocks, num_external_tokens)

    def _flush_all(self, _output: SchedulerOutput) -> KvringMetadata:
        return self.scheduler.emergency_meta()

    @fail_open(_flush_all)
    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        """See `SchedulerSide`."""
        return self.scheduler.build_connector_meta(scheduler_output)

    @fail_open(lambda self, output: self.scheduler.give_up(output.kv_connector_worker_meta))
    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """See `SchedulerSide`."""
        meta = connector_output.kv_connector_worker_meta
        assert meta is None or isinstance(meta, KvringWorkerMetadata)
        self.scheduler.update_connector_output(meta, connector_output.invalid_block_ids)

    def _gives_back(self, request: Request, *_: Any) -> tuple[bool, None]:
        self.scheduler.finished_after_error(request.request_id)
        return False, None

    @fail_open(_gives_back)
    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """See `SchedulerSide`. vLLM never has to keep a request's blocks for us."""
        self.scheduler.request_finished(request.request_id)
        return False, None

    @fail_open(_gives_back)
    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """As `request_finished`."""
        self.scheduler.request_finished(request.request_id)
        return False, None

    @fail_open(lambda self: ())
    def take_events(self) -> Iterable[KVCacheEvent]:
        """See `Events`."""
        events = self.scheduler.events
        return events.take() if events is not None else ()

    @fail_open(lambda self: True)
    def reset_cache(self) -> bool | None:
        """See `SchedulerSide`."""
        self.scheduler.reset_cache()
        return True

    def get_finished_count(self) -> int | None:
        """How many ranks report a job: all of them."""
        return self._vllm_config.parallel_config.world_size

    # A worker's side.

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """See `WorkerSide`. The last call that may raise."""
        self.worker.register_kv_caches(kv_caches, self._kv_cache_config)
        if self.worker.device is not None:
            check_gpu(self._vllm_config, self.worker.rank, self.worker.device)

    @fail_open(lambda self, *_: self.worker.adapter.handle_preemptions(None))
    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        """See `WorkerSide`."""
        assert isinstance(kv_connector_metadata, KvringMetadata)
        self.worker.flush(kv_connector_metadata)

    @fail_open(lambda self, *_, **__: self.worker.fail_loads(self._meta))
    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        """See `WorkerSide`."""
        self.worker.start_loads(self._meta)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Loads bring all layers of a block at once."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Stores take all layers of a block at once, when it is full."""

    @fail_open(lambda self: None)
    def wait_for_save(self) -> None:
        """See `WorkerSide`. Starts stores, and does not wait for them."""
        self.worker.start_stores(self._meta)

    @fail_open(lambda self, *_: KVConnectorTransferResults())
    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """See `WorkerSide`."""
        self.worker.collect(self._meta)
        received, failed = self.worker.take_transfer_results()
        return KVConnectorTransferResults(finished_recving=received, failed_recving=failed)

    @fail_open(lambda self: set())
    def get_block_ids_with_load_errors(self) -> set[int]:
        """See `WorkerSide`."""
        return self.worker.take_invalid_blocks()

    @fail_open(lambda self: None)
    def build_connector_worker_meta(self) -> KvringWorkerMetadata | None:
        """See `WorkerSide`."""
        return self.worker.take_worker_meta()

    # Both.

    @fail_open(lambda self: None)
    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        """Counts since the last call."""
        side = self._scheduler or self._worker
        return side.take_stats() if side is not None else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVConnectorStats | None:
        """Makes counts anew from their data, in the process that logs."""
        return KvringStats(data=data) if data is not None else KvringStats()

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: VllmConfig, metric_types: Any, labelnames: list[str], per_engine_labelvalues: dict[int, list[object]]
    ) -> KvringPromMetrics:
        """The counters for `/metrics`."""
        return KvringPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: VllmConfig) -> str | None:
        """Asks for the layout with one piece per block: fewer, larger copies. This is a wish: where a backend cannot have it,
        vLLM says so and takes its own. But vLLM does not start where two connectors have different wishes, nor where blocks of
        this layout would have to be split for a backend's kernels. Blocks of a size that vLLM has chosen itself never have to be
        split, except in hybrids with Mamba layers. On CPU there is one layout only."""
        from vllm.platforms import current_platform

        assert vllm_config.kv_transfer_config is not None
        wish = Config.parse(vllm_config.kv_transfer_config.kv_connector_extra_config).layout
        if wish == "auto":
            cache = vllm_config.cache_config
            # Each backend of this vLLM takes blocks of these sizes unsplit, or takes none of their divisors either.
            never_split = not cache.user_specified_block_size or cache.block_size in (16, 32, 64)
            fits = never_split and not cache.kv_cache_dtype_skip_layers and not vllm_config.model_config.is_hybrid
            # A connector is not told of others beside it, but vLLM imports this module only where several are used.
            is_alone = _MULTI_CONNECTOR not in sys.modules
            wish = "block-outermost" if current_platform.is_cuda() and fits and is_alone else "none"
        return "BLHNC" if wish == "block-outermost" else None

    @fail_open(lambda self: None)
    def shutdown(self) -> None:
        """Ends the clients. An engine that was started for this vLLM lives on."""
        if self._autostart is not None:
            self._autostart.close()
        for side in (self._scheduler, self._worker):
            if side is not None:
                side.shutdown()
