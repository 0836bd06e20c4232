"""One lookup, three ways: kvring's connector, vLLM's OffloadingConnector, and a Python dict of the same keys are asked for the
same request, in one process, in turns.

No engine core runs here, because vLLM on a CPU would compute for minutes over 131 072 tokens, and wants blocks of 32 at least. So
the connectors are made from vLLM's own configuration classes, as vLLM makes them. A worker's side of kvring's connector stores
chunks under the keys of a real `Request` of vLLM's, and the scheduler's side is asked as vLLM's scheduler asks it.
"""

import itertools
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from harness import config as configs  # before vLLM: it sets vLLM's environment
from harness.memory import KvMemory
from real.engine import Engine
from real.prompts import prompt
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_offload.base import ReqContext, make_offload_key
from vllm.v1.request import Request
from waiting import FOREVER_MS, wait_for

from kvring.vllm import KvringConnector
from kvring.vllm.adapters import salted
from kvring.vllm.metadata import KvringMetadata, Store

BLOCK = 16
LENGTHS = (4096, 131_072)
PAUSE_S = 0.0002
"""Before each call, so that the engine sleeps by then. This thread stays awake, as vLLM's does while a step runs."""
COLD_BYTES = 64 << 20
"""So many are read before a call that is to find cold caches: a forward pass reads weights meanwhile."""

Ask = Callable[[Request], int | None]


def made_for(connector: str, module: str, extra: dict[str, Any]) -> configs.Engine:
    """vLLM's configurations, with room for every prompt."""
    blocks = 2 + sum(LENGTHS) // BLOCK
    longest = max(LENGTHS) + BLOCK
    return configs.engine(
        configs.Setup(connector, module, extra, block_size=BLOCK, num_blocks=blocks, max_model_len=longest, max_batched=longest)
    )


class Three:
    """The three, with the same chunks in each of them."""

    def __init__(self, engine: Engine) -> None:
        made = made_for("KvringConnector", "kvring.vllm", {"kvring.name": engine.name})
        self.engine = engine
        self.worker = KvringConnector(made.ranks[0], KVConnectorRole.WORKER, made.ranks_kv[0])
        self.worker.register_kv_caches(KvMemory(made.ranks_kv[0]).views)
        self.kvring = KvringConnector(made.scheduler, KVConnectorRole.SCHEDULER, made.scheduler_kv)
        extra = {"spec_name": "MemcpySpec", "spec_module_path": "offload", "cpu_bytes_to_use": 1 << 30}
        other = made_for("OffloadingConnector", OffloadingConnector.__module__, extra)
        self.offloading = OffloadingConnector(other.scheduler, KVConnectorRole.SCHEDULER, other.scheduler_kv)
        self.dict: dict[bytes, int] = {}
        hash_function = get_hash_fn_by_name("sha256")
        init_none_hash(hash_function)
        self.hasher = get_request_block_hasher(BLOCK, hash_function)
        self.numbers = itertools.count(1)
        self.weights = np.ones(COLD_BYTES, dtype=np.uint8)
        self.attach()

    def attach(self) -> None:
        sides = (self.kvring.scheduler, self.worker.worker)
        wait_for(lambda: all(side.adapter.is_healthy() for side in sides), "both sides are attached")

    def close(self) -> None:
        self.kvring.shutdown()
        self.worker.shutdown()

    def request(self, tokens: list[int]) -> Request:
        """A request as vLLM makes it when it arrives, with its keys."""
        return Request(f"lookup-{next(self.numbers)}", tokens, SamplingParams(max_tokens=1), None, block_hasher=self.hasher)

    def store(self, tokens: list[int]) -> None:
        """Has all three know these tokens."""
        request, job = self.request(tokens), next(self.numbers)
        first = 1 + len(self.dict)
        keys = [salted(key, None) for key in request.block_hashes]
        blocks = list(range(first, first + len(keys)))
        store = Store(job, request.request_id, (1, job), None, keys, blocks)
        self.worker.worker.start_stores(KvringMetadata(stores=[store]))
        self.worker.worker.adapter.wait_idle(FOREVER_MS)
        self.engine.settle()
        table, context = self.offloading.scheduler.manager, ReqContext(request.request_id)
        theirs = [make_offload_key(key, 0) for key in request.block_hashes]
        table.prepare_store(theirs, context)
        table.complete_store(theirs, context)
        self.dict.update(zip(keys, blocks, strict=True))

    def keep_awake(self, tokens: list[int]) -> None:
        """Has the engine answer a store of a chunk that it has. It spins for 50 µs before it sleeps."""
        key, job = salted(self.request(tokens[:BLOCK]).block_hashes[0], None), next(self.numbers)
        adapter = self.worker.worker.adapter
        adapter.wait_job(adapter.submit_store("awake", (1, job), [key], [1]), FOREVER_MS)

    def ask_kvring(self, request: Request) -> int | None:
        return self.kvring.get_num_new_matched_tokens(request, 0)[0]

    def ask_offloading(self, request: Request) -> int | None:
        return self.offloading.get_num_new_matched_tokens(request, 0)[0]

    def ask_dict(self, request: Request) -> int:
        found = 0
        for key in request.block_hashes:
            if key[:16] not in self.dict:
                break
            found += 1
        return found * BLOCK

    def prepare(self, state: str, tokens: list[int]) -> None:
        """Before a call: puts the engine, and this processor's caches, into the state that is to be measured."""
        if state == "awake":
            self.keep_awake(tokens)
            return
        if state.startswith("cold"):
            self.weights.sum()
        until = time.perf_counter() + PAUSE_S
        while time.perf_counter() < until:
            pass

    def turn(self, state: str, order: list[str], tokens: list[int], expected: int) -> dict[str, float]:
        """Asks each once for a request that has just arrived; microseconds."""
        request = self.request(tokens)
        self.offloading.on_new_request(request)
        took = {}
        for name in order:
            ask: Ask = getattr(self, f"ask_{name}")
            self.prepare(state, tokens)
            begin = time.perf_counter()
            found = ask(request)
            took[name] = (time.perf_counter() - begin) * 1e6
            assert found == expected, f"{name} has found {found} tokens, expected {expected}"
        self.kvring.request_finished(request, [])
        # vLLM's own forgets a request in a later step, and there are none.
        del self.offloading.scheduler._req_status[request.request_id]
        return took


def side_by_side(engine: Engine, count: int) -> dict[str, dict[str, list[float]]]:
    """By length and the engine's state (and for a miss): the times of each of the three."""
    three = Three(engine)
    fresh = itertools.count(2_000_000)
    known = {length: prompt(next(fresh), length) for length in LENGTHS}
    for tokens in known.values():
        three.store(tokens)
    found: dict[str, dict[str, list[float]]] = {}

    def measure(state: str, length: int) -> None:
        miss = state.endswith("miss")
        order = ["kvring", "offloading", "dict"]
        into = found.setdefault(f"{length} {state}", {name: [] for name in order})
        for turn in range(count + 1):
            tokens = prompt(next(fresh), length) if miss else known[length]
            took = three.turn(state, order, tokens, 0 if miss else length)
            order = [*order[1:], order[0]]
            if turn:  # the first one warms up
                for name, us in took.items():
                    into[name].append(us)

    for state in ("awake", "asleep", "miss", "cold", "cold miss"):
        for length in LENGTHS:
            measure(state, length)
    engine.pause()
    for length in LENGTHS:
        measure("stopped", length)
    engine.resume()
    engine.kill()
    for length in LENGTHS:
        measure("dead", length)
    engine.start()
    three.close()
    return found
