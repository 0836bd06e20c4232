"""The engine core: vLLM's real scheduler, fake workers, and the checks of every step."""

import pickle
import random
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.utils import KVOutputAggregator
from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager
from waiting import FOREVER_MS

from . import config as configs
from .calls import CallMonitor
from .jobs import Faults, RecordingWorkerAdapter
from .ledger import Ledger, Reported, Snapshot
from .model import expected_output, seed_of
from .sessions import RecordingSchedulerAdapter
from .worker import FakeWorker


@dataclass
class Wanted:
    """A request, and what has come of it so far."""

    request_id: str
    prompt: list[int]
    max_tokens: int
    salt: str | None = None
    lora: str | None = None
    priority: int = 0
    skip_reading: bool = False
    output: list[int] = field(default_factory=list)
    reason: str | None = None
    aborted: bool = False
    load_failed: bool = False

    @property
    def seed(self) -> int:
        """Of the fake model's hash."""
        return seed_of(self.salt, self.lora)


@dataclass
class Plug:
    """How to reach into a connector: the only thing that differs between connectors."""

    skip: int
    worker_adapter: Callable[[Any], tuple[Any, str]]
    """Of a worker-side connector: the object that has the native adapter, and the attribute's name."""
    scheduler_adapter: Callable[[Any], tuple[Any, str]]
    slack: int = 0
    """Steps from the report of a store until lookups must find it."""
    idle_s: float = 0.0
    """How long a step without work sleeps, so that the threads of jobs get a core."""
    salt: Callable[[Any, str], bytes | None] = lambda connector, request: None
    """The salt with which a scheduler-side connector changes the keys of a request."""
    salted: Callable[[bytes, bytes | None], bytes] = lambda key, salt: key
    loaded: Callable[[Any, LoRARequest], None] = lambda connector, lora: None
    """Tells a worker-side connector that vLLM has loaded an adapter."""


@dataclass
class Done:
    """A step that the workers have run."""

    result: ModelRunnerOutput
    reported: list[Reported]
    """Stores that were reported in it, see `Ledger.learn_stored`."""


class Harness:
    """An engine with one connector under test."""

    def __init__(
        self,
        setup: configs.Setup,
        plug: Plug,
        *,
        chunk_blocks: int,
        faults: Faults | None = None,
        seed: int = 0,
        late_workers: bool = False,
    ) -> None:
        self.setup = setup
        self.dice = random.Random(seed)
        self.faults = faults or Faults()
        self.late_workers = late_workers
        engine = configs.engine(setup)
        self.ledger = Ledger(
            groups=len(engine.scheduler_kv.kv_cache_groups),
            block_size=setup.block_size,
            chunk_blocks=chunk_blocks,
            num_blocks=engine.scheduler_kv.num_blocks,
            skip=plug.skip,
        )
        self.ledger.writers = {rank for rank in range(setup.tp) if rank % setup.replicas == 0}
        self.wanted: dict[str, Wanted] = {}
        self.seeds: dict[str, int] = {}
        self.adapters: list[RecordingWorkerAdapter] = []
        self.workers = [
            FakeWorker(rank, engine.ranks[rank], engine.ranks_kv[rank], self.ledger, v2=setup.v2_runner, seeds=self.seeds)
            for rank in range(setup.tp)
        ]

        def prepare(connector: Any, rank: int) -> None:
            owner, name = plug.worker_adapter(connector)
            worker = self.workers[rank]
            adapter = RecordingWorkerAdapter(
                getattr(owner, name),
                rank,
                self.ledger,
                self.faults,
                random.Random(seed * 31 + rank),
                lambda request: worker.computed.get(request, 0),
            )
            setattr(owner, name, adapter)
            self.adapters.append(adapter)

        for worker in self.workers:
            worker.create_connector(prepare)
        scheduler_type = AsyncScheduler if setup.async_scheduling else Scheduler
        self.scheduler = scheduler_type(
            vllm_config=engine.scheduler,
            kv_cache_config=engine.scheduler_kv,
            structured_output_manager=StructuredOutputManager(engine.scheduler),
            block_size=engine.block_size,
            hash_block_size=engine.hash_block_size,
            log_stats=True,
        )
        self.scheduler.use_v2_model_runner = setup.v2_runner
        connector = self.scheduler.connector
        owner, name = plug.scheduler_adapter(connector)
        self.sessions = RecordingSchedulerAdapter(getattr(owner, name), self.ledger)
        setattr(owner, name, self.sessions)
        self.ledger.watch(self.scheduler)
        self.ledger.salted = plug.salted
        self.calls = CallMonitor(connector, self.ledger, slack=plug.slack)
        self.calls.salt = lambda request: plug.salt(connector, request)
        self.aggregator = KVOutputAggregator.from_connector(connector, setup.tp)
        self.pool = self.scheduler.kv_cache_manager.block_pool
        self.blocks_at_start = self.pool.get_num_free_blocks()
        self.hash_fn = get_hash_fn_by_name("sha256")
        init_none_hash(self.hash_fn)
        self.hasher = get_request_block_hasher(engine.hash_block_size, self.hash_fn)
        self.in_flight: deque[tuple[SchedulerOutput, Snapshot, Done | None]] = deque()
        self.garbage: dict[int, int] = {}
        """The generation of each block whose content comes from a synchronous load that failed (see `_judge_reads`)."""
        self.spoilt: set[str] = set()
        """Requests that have read wrong KV: each is blamed once."""
        self.excused = False
        self.arrivals = 0
        self.stuck = False
        self.plug = plug
        self.last_was_empty = False
        self.standstill = 0
        self.half_reset = False
        """The connector was reset and vLLM was not. When vLLM is reset, the connector forgets what it stored meanwhile."""

    # -- requests ------------------------------------------------------------------------------------------------------

    def add(self, wanted: Wanted) -> None:
        """A request arrives."""
        self.wanted[wanted.request_id] = wanted
        self.seeds[wanted.request_id] = wanted.seed
        lora = None
        if wanted.lora is not None:
            lora = LoRARequest(lora_name=wanted.lora, lora_int_id=1 + len(wanted.lora), lora_path="/nowhere")
            for worker in self.workers:
                self.plug.loaded(worker.connector, lora)
        self.arrivals += 1
        request = Request(
            request_id=wanted.request_id,
            prompt_token_ids=list(wanted.prompt),
            sampling_params=SamplingParams(
                max_tokens=wanted.max_tokens,
                ignore_eos=True,
                detokenize=False,
                temperature=0,
                skip_reading_prefix_cache=wanted.skip_reading or None,
            ),
            pooling_params=None,
            arrival_time=float(self.arrivals),
            lora_request=lora,
            cache_salt=wanted.salt,
            priority=wanted.priority,
            block_hasher=self.hasher,
        )
        self.ledger.requests[wanted.request_id] = request
        self.ledger.note(f"arrives {wanted.request_id}: {len(wanted.prompt)} + {wanted.max_tokens} tokens")
        self.scheduler.add_request(request)

    def abort(self, request_id: str) -> None:
        """The client has gone."""
        request = self.scheduler.requests.get(request_id)
        if request is None or request.is_finished():
            return
        self.wanted[request_id].aborted = True
        self.ledger.count("aborts")
        if request.status == RequestStatus.WAITING_FOR_REMOTE_KVS:
            self.ledger.count("aborts_while_loading")
        self.ledger.note(f"abort {request_id} ({request.status.name})")
        self.scheduler.finish_requests(request_id, RequestStatus.FINISHED_ABORTED)

    def reset(self, *, running: bool, connector: bool) -> None:
        """`reset_prefix_cache`; vLLM itself raises when it must preempt requests that load, so not then."""
        waiting_with_blocks = self.scheduler.kv_holding_waiting or any(
            request.is_finished() for request in self.scheduler.requests.values()
        )
        if waiting_with_blocks or self.scheduler.deferred_frees or self.in_flight:
            running = False
        self.ledger.note(f"reset running={running} connector={connector}")
        self.ledger.count("resets")
        done = self.scheduler.reset_prefix_cache(reset_running_requests=running, reset_connector=connector)
        if connector or (done and self.half_reset):
            self.ledger.forget_stored()
            self.calls.cache_was_reset()
        self.half_reset = not done and (connector or self.half_reset)

    # -- steps ---------------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """One turn of the engine core's loop: `step`, or `step_with_batch_queue` with two batches."""
        self.ledger.step += 1
        depth = 2 if self.setup.async_scheduling else 1
        if self.scheduler.has_requests() and len(self.in_flight) < depth:
            output = self.scheduler.schedule()
            now = self.ledger.snapshot(self.scheduler)
            self._describe(output)
            self.last_was_empty = not output.num_scheduled_tokens
            result = None if self.late_workers else self._execute(output, now)
            self.in_flight.append((output, now, result))
            if len(self.in_flight) < depth and self.scheduler.has_requests():
                return
        if not self.in_flight:
            return
        output, now, result = self.in_flight.popleft()
        if result is None:
            result = self._execute(output, now)
        self._judge_reports(result.result)
        updates = self.scheduler.update_from_output(output, result.result)
        self.ledger.learn_stored(result.reported)
        for outputs in updates.values():
            for one in outputs.outputs:
                wanted = self.wanted[one.request_id]
                wanted.output += one.new_token_ids
                if one.finish_reason is not None:
                    wanted.reason = str(one.finish_reason)
        for adapter in self.adapters:
            adapter.tick()
        self._break_deadlock(output)

    def _break_deadlock(self, output: SchedulerOutput) -> None:
        """vLLM can lock up by itself, in models with a sliding window: two requests whose loads are done hold all blocks and
        each needs one more; nothing runs, so nothing is preempted. (What it reserves for a load that is under way leaves out
        a block of the window's group.) No connector can help it; a client that gives up does."""
        scheduler = self.scheduler
        loading = any(
            one.status == RequestStatus.WAITING_FOR_REMOTE_KVS and name not in scheduler.finished_recving_kv_req_ids
            for name, one in scheduler.requests.items()
        )
        if output.num_scheduled_tokens or scheduler.running or loading or not scheduler.kv_holding_waiting:
            self.standstill = 0
            return
        self.standstill += 1
        if self.standstill > 10:
            self.ledger.count("deadlocks_of_vllm")
            self.ledger.note("vLLM is locked up: nothing runs, nothing loads, and somebody holds blocks")
            self.abort(list(scheduler.kv_holding_waiting)[-1].request_id)

    def _execute(self, output: SchedulerOutput, now: Snapshot) -> "Done":
        self.ledger.running = now
        try:
            results: list[ModelRunnerOutput | None] = []
            for worker in self.workers:
                # Between processes outputs are pickled. (vLLM shares one object for all empty ones, and joining ranks
                # writes into it.)
                done = worker.execute(output, now, self.calls.call)
                results.append(pickle.loads(pickle.dumps(done)))
        finally:
            self.ledger.running = None
        result = self.aggregator.aggregate(results)
        assert result is not None
        self._judge_reads(now, result)
        return Done(result, self.ledger.take_reported())

    def _judge_reads(self, now: Snapshot, result: ModelRunnerOutput) -> None:
        """P3 and P4: wrong KV is a violation unless it is a failed load that was reported in this very step."""
        connector_output = result.kv_connector_output
        invalid = set(connector_output.invalid_block_ids) if connector_output else set()
        failed = set(connector_output.failed_recving) if connector_output else set()
        for name in failed:
            self._load_failed(name)
        if invalid:
            for name, table in now.tables.items():
                if invalid & {block for ids in table for block in ids}:
                    self._load_failed(name)
        for worker in self.workers:
            for wrong in worker.wrong:
                table = now.tables[wrong.request]
                if invalid & {block for ids in table for block in ids}:
                    self.ledger.count("forgiven_reads")
                    for block in {block for ids in table for block in ids}:
                        self.garbage[block] = now.gens[block]
                    continue
                text = (
                    f"{wrong.request} on rank {worker.rank} read {wrong.what} at token {wrong.position}"
                    f" (group {wrong.group}, {wrong.layer}, block {wrong.block})"
                )
                if self.garbage.get(wrong.block) == now.gens[wrong.block]:
                    # vLLM leaves the blocks of a failed synchronous load in its own prefix cache until they are recomputed.
                    self.ledger.note(f"excused: {text}")
                    self.ledger.count("poisoned_by_vllm")
                    self.excused = True
                    continue
                if wrong.request in self.spoilt:
                    continue
                self.spoilt.add(wrong.request)
                self.ledger.blame("P3", text)

    def _judge_reports(self, result: ModelRunnerOutput) -> None:
        """P0: only requests that vLLM waits for may be reported as received or sent: it asserts that."""
        output = result.kv_connector_output
        if output is None:
            return
        requests = self.scheduler.requests
        for name in output.finished_recving or ():
            request = requests.get(name)
            if request is None or not (request.status == RequestStatus.WAITING_FOR_REMOTE_KVS or request.is_finished()):
                status = "unknown" if request is None else request.status.name
                self.ledger.blame("P0", f"{name} was reported as received, but it is {status}")
        for name in output.finished_sending or ():
            if name not in requests or not requests[name].is_finished():
                self.ledger.blame("P0", f"{name} was reported as sent, but vLLM does not keep its blocks")
            if name in (output.finished_recving or ()):
                self.ledger.blame("P0", f"{name} was reported as received and as sent: its blocks would be freed twice")

    def _load_failed(self, name: str) -> None:
        if name in self.wanted:
            self.wanted[name].load_failed = True
            self.ledger.count("requests_whose_load_failed")
            self.calls.no_expectation.add(name)
            self.ledger.note(f"load failed: {name}")

    def _describe(self, output: SchedulerOutput) -> None:
        cached = output.scheduled_cached_reqs
        parts = [f"{name}+{count}" for name, count in output.num_scheduled_tokens.items()]
        line = f"step {self.ledger.step}: " + " ".join(parts)
        resumed = sorted(cached.resumed_req_ids)
        if resumed:
            line += f" resumed {resumed}"
        if output.preempted_req_ids:
            line += f" preempted {sorted(output.preempted_req_ids)}"
            self.ledger.count("preemptions", len(output.preempted_req_ids))
        if output.finished_req_ids:
            line += f" finished {sorted(output.finished_req_ids)}"
        self.ledger.log.append(line)

    # -- the end -------------------------------------------------------------------------------------------------------

    def idle(self) -> bool:
        """Nothing is left to do."""
        return not self.in_flight and not self.scheduler.has_requests()

    def run(self, limit: int, each: Callable[[], None] | None = None, patience: int = 10_000) -> None:
        """Steps until everything is done. Too many steps with work are a violation of P0, and so are too many without work in a
        row, each of which gives way for a moment to the threads of jobs."""
        busy, empty = 0, 0
        while not self.idle():
            if each is not None:
                each()
            done = sum(len(wanted.output) for wanted in self.wanted.values())
            before = self.ledger.step
            self.step()
            if self.last_was_empty:
                time.sleep(self.plug.idle_s)
                self.ledger.count("empty_steps")
            else:
                busy += self.ledger.step - before
            empty += 1
            if done != sum(len(wanted.output) for wanted in self.wanted.values()) or not self.last_was_empty:
                empty = 0
            if busy > limit or empty > patience:
                break
        else:
            return
        self.stuck = True
        stuck = {name: request.status.name for name, request in self.scheduler.requests.items()}
        self.ledger.blame("P0", f"not finished after {busy} busy steps, and {empty} empty ones in a row: {stuck}")

    def check_outputs(self) -> None:
        """P4: the closed form."""
        for wanted in self.wanted.values():
            right = expected_output(wanted.prompt, wanted.max_tokens, wanted.seed)
            if wanted.aborted or (wanted.load_failed and self.setup.failure_policy == "fail"):
                right = right[: len(wanted.output)]
            if wanted.output != right:
                at = next((i for i, (a, b) in enumerate(zip(wanted.output, right)) if a != b), len(wanted.output))
                self.ledger.blame(
                    "P4",
                    f"{wanted.request_id}: {len(wanted.output)} of {len(right)} tokens, the first wrong one is {at}"
                    f" ({wanted.reason})",
                )

    def check_idle(self, *, last: bool) -> None:
        """P0: nothing is left over. Reports that wait for the next step are not taken from the connector, unless it is the
        `last` time."""
        for adapter in self.adapters:
            if kept := adapter.get_block_ids_with_load_errors():
                self.ledger.blame("P0", f"nobody has asked for the blocks that were not loaded: {kept}")
            adapter.wait_idle(FOREVER_MS)
            if last:
                adapter.get_finished()
        if last and self.ledger.open:
            left = [f"{job.request}/{job.job}" for job in self.ledger.open.values()]
            self.ledger.blame("P0", f"jobs are open at the end: {left}")
        free = self.pool.get_num_free_blocks()
        if free != self.blocks_at_start:
            self.ledger.blame("P0", f"{self.blocks_at_start - free} blocks were never freed")
        if self.scheduler.requests:
            self.ledger.blame("P0", f"requests are left: {sorted(self.scheduler.requests)}")
        self.sessions.check()

    def shutdown(self) -> None:
        """As vLLM: the workers last."""
        self.scheduler.shutdown()
        for worker in self.workers:
            worker.connector.shutdown()
