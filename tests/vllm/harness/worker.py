"""A worker without a model: real KV memory, a real connector, and vLLM's order of calls.

The order is that of `GPUModelRunner.execute_model` and `KVConnectorModelRunnerMixin` (V1) and of `ActiveKVConnector` (V2),
which agree in everything that a connector sees.
"""

import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
from vllm.config import VllmConfig
from vllm.distributed import parallel_state
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.forward_context import get_forward_context, set_forward_context
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig, SlidingWindowSpec
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput

from . import memory
from .ledger import Ledger, Snapshot
from .memory import KvMemory
from .model import POISON_WORD, TAINT, VOCAB, extend, kv, next_token


@contextmanager
def as_rank(rank: int, world: int) -> Iterator[None]:
    """vLLM tells a connector this tensor-parallel rank, as in a worker's process."""
    group = SimpleNamespace(rank_in_group=rank, rank=rank, local_rank=rank, world_size=world, ranks=list(range(world)))
    saved = parallel_state._TP
    parallel_state._TP = group  # type: ignore[assignment]
    try:
        yield
    finally:
        parallel_state._TP = saved


@dataclass
class Wrong:
    """Wrong KV that a request has read."""

    request: str
    group: int
    layer: str
    position: int
    block: int
    what: str


@dataclass
class State:
    """A request, as a model runner keeps it."""

    seed: int
    prompt_len: int
    tokens: list[int]
    blocks: list[list[int]]
    computed: int
    hashes: list[int] = field(default_factory=list)

    def cut(self, length: int) -> None:
        """Tokens that the scheduler has not accepted are forgotten."""
        del self.tokens[length:]
        del self.hashes[length:]


class FakeWorker:
    """One rank."""

    def __init__(
        self,
        rank: int,
        config: VllmConfig,
        kv_config: KVCacheConfig,
        ledger: Ledger,
        *,
        v2: bool,
        seeds: dict[str, int],
    ) -> None:
        self.rank = rank
        self.shard = rank // kv_config.kv_tp_replicas
        self.world = config.parallel_config.tensor_parallel_size
        self.config = config
        self.ledger = ledger
        self.v2 = v2
        self.seeds = seeds
        self.block_size = ledger.block_size
        self.memory = KvMemory(kv_config)
        self.windows = [
            spec.sliding_window if isinstance(spec := group.kv_cache_spec, SlidingWindowSpec) else None
            for group in kv_config.kv_cache_groups
        ]
        self.states: dict[str, State] = {}
        self.computed: dict[str, int] = {}
        self.wrong: list[Wrong] = []
        self.tainted: set[str] = set()
        self._kv_config = kv_config
        self.connector: Any = None

    def create_connector(self, prepare: Callable[[Any, int], None]) -> None:
        """`ensure_kv_transfer_initialized` and `register_kv_caches`; `prepare` runs in between, to put proxies in place."""
        with as_rank(self.rank, self.world):
            self.connector = KVConnectorFactory.create_connector(self.config, KVConnectorRole.WORKER, self._kv_config)
            prepare(self.connector, self.rank)
            self.connector.register_kv_caches(memory.given(self.memory.views))

    # -- a step --------------------------------------------------------------------------------------------------------

    def execute(self, output: SchedulerOutput, now: Snapshot, call: Callable[..., Any]) -> ModelRunnerOutput:
        """`execute_model`: every call of the connector is made by `call(name, function, *arguments)`."""
        connector = self.connector
        # Between processes the metadata is pickled.
        meta = pickle.loads(pickle.dumps(output.kv_connector_metadata))
        self.wrong.clear()
        self.tainted.clear()
        with as_rank(self.rank, self.world), set_forward_context(None, self.config):
            context = get_forward_context()
            call("handle_preemptions", connector.handle_preemptions, meta)
            self.ledger.before_forward(self.rank, now)
            for block in now.fresh:
                self.memory.poison(block)
            self._update_states(output)
            call("bind_connector_metadata", connector.bind_connector_metadata, meta)
            if output.has_sync_kv_loads:
                call("start_load_kv", connector.start_load_kv, context)
            sampled = self._forward(output, call) if output.total_num_scheduled_tokens else {}
            call("finish_forward", connector.finish_forward)
            if not output.has_sync_kv_loads:
                call("start_load_kv", connector.start_load_kv, context)
            call("wait_for_save", connector.wait_for_save)
            result = KVConnectorOutput()
            transfers = call("get_transfer_results", connector.get_transfer_results, output.finished_req_ids)
            result.finished_sending = transfers.finished_sending
            result.finished_recving = transfers.finished_recving
            result.failed_recving = transfers.failed_recving
            for what, names in (
                ("received", transfers.finished_recving),
                ("failed", transfers.failed_recving),
                ("sent", transfers.finished_sending),
            ):
                if names:
                    self.ledger.note(f"rank {self.rank} reports {what}: {sorted(names)}")
            result.invalid_block_ids = call("get_block_ids_with_load_errors", connector.get_block_ids_with_load_errors)
            result.kv_connector_stats = call("get_kv_connector_stats", connector.get_kv_connector_stats)
            result.kv_cache_events = call("get_kv_cache_events", connector.get_kv_connector_kv_cache_events)
            result.kv_connector_worker_meta = pickle.loads(
                pickle.dumps(call("build_connector_worker_meta", connector.build_connector_worker_meta))
            )
            call("clear_connector_metadata", connector.clear_connector_metadata)
        if not output.total_num_scheduled_tokens:
            return ModelRunnerOutput.with_kv_conn_output_only(result)
        ids = list(output.num_scheduled_tokens)
        return ModelRunnerOutput(
            req_ids=ids,
            req_id_to_index={request: index for index, request in enumerate(ids)},
            sampled_token_ids=[sampled[request] for request in ids],
            kv_connector_output=result,
        )

    def _update_states(self, output: SchedulerOutput) -> None:
        """Block tables, the way the model runner keeps them."""
        for request in output.finished_req_ids:
            self.states.pop(request, None)
        if self.v2:
            for request in output.preempted_req_ids or ():
                self.states.pop(request, None)
        for new in output.scheduled_new_reqs:
            assert new.prompt_token_ids is not None
            tokens = list(new.prefill_token_ids if self.v2 and new.prefill_token_ids else new.prompt_token_ids)
            assert self.v2 or new.req_id not in self.states
            self.states[new.req_id] = State(
                self.seeds[new.req_id],
                len(new.prompt_token_ids),
                tokens,
                [list(ids) for ids in new.block_ids],
                new.num_computed_tokens,
            )
        cached = output.scheduled_cached_reqs
        for index, request in enumerate(cached.req_ids):
            state = self.states[request]
            blocks = cached.new_block_ids[index]
            if request in cached.resumed_req_ids:
                assert not self.v2 and blocks is not None
                state.blocks = [list(ids) for ids in blocks]
                # The runner takes the scheduler's word for the tokens of a request that comes back.
                if request in cached.all_token_ids:
                    known = len(cached.all_token_ids[request])
                    state.tokens = list(cached.all_token_ids[request]) + state.tokens[known:]
                    state.hashes = []
            elif blocks is not None:
                for have, more in zip(state.blocks, blocks):
                    have.extend(more)
            state.computed = cached.num_computed_tokens[index]
            state.cut(state.prompt_len + cached.num_output_tokens[index])

    def _forward(self, output: SchedulerOutput, call: Callable[..., Any]) -> dict[str, list[int]]:
        """Layer by layer: all requests write, then all read. A request that has read wrong KV writes wrong KV from then on."""
        work: list[tuple[str, State, int, int]] = []
        for request, count in output.num_scheduled_tokens.items():
            state = self.states[request]
            begin, end = state.computed, state.computed + count
            assert end <= len(state.tokens), f"{request}: tokens up to {end} of {len(state.tokens)}"
            extend(state.hashes, state.seed, state.tokens)
            work.append((request, state, begin, end))
        for number, name in enumerate(self.memory.layers):
            call("wait_for_layer_load", self.connector.wait_for_layer_load, name)
            words, group = self.memory.words[name], self.memory.group_of[name]
            for request, state, begin, end in work:
                blocks, slots = self._slots(state, group, begin, end)
                assert blocks.all(), f"{request} writes to the null block"
                values = kv(state.hashes[begin:end], number, self.shard)
                words[blocks, slots] = values ^ TAINT if request in self.tainted else values
            for request, state, begin, end in work:
                window = self.windows[group]
                low = 0 if window is None else max(0, begin + 1 - window)
                blocks, slots = self._slots(state, group, low, end)
                have = words[blocks, slots]
                want = kv(state.hashes[low:end], number, self.shard)
                if request in self.tainted:
                    want[begin - low :] ^= TAINT
                bad = np.nonzero((have != want) | (blocks == 0))[0]
                if len(bad):
                    at = int(bad[0])
                    poisoned = have[at] == POISON_WORD
                    what = "null block" if blocks[at] == 0 else "poison" if poisoned else "other tokens"
                    self.wrong.append(Wrong(request, group, name, low + at, int(blocks[at]), what))
                    self.tainted.add(request)
            call("save_kv_layer", self.connector.save_kv_layer, name, self.memory.views[name], None)
        sampled: dict[str, list[int]] = {}
        for request, state, _, end in work:
            self.computed[request] = end
            state.computed = end
            if end < len(state.tokens):
                sampled[request] = []
                continue
            token = next_token(state.hashes[-1])
            if request in self.tainted:
                token = 3 + (token + 1) % (VOCAB - 3)
            sampled[request] = [token]
            state.tokens.append(token)
        return sampled

    def _slots(self, state: State, group: int, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        positions = np.arange(begin, end)
        table = np.asarray(state.blocks[group], dtype=np.int64)
        return table[positions // self.block_size], positions % self.block_size
