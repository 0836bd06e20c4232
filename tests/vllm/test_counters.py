"""Each counter says what happened."""

import os
import signal
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from harness.driver import Harness
from harness.jobs import Faults
from harness.support import harness, want
from waiting import wait_for

import kvring
from kvring.vllm.scheduler import SchedulerSide
from kvring.vllm.stats import COUNTERS
from kvring.vllm.worker import WorkerSide

BLOCK = 4
PROMPT = list(range(10, 74))


class Counted:
    """The connector's counters, of all its sides, over all steps."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.total: Counter[str] = Counter()
        for side in (SchedulerSide, WorkerSide):
            self._watch(side, patch)

    def _watch(self, side: Any, patch: pytest.MonkeyPatch) -> None:
        take = side.take_stats

        def counted(one: Any) -> Any:
            taken = take(one)
            if taken is not None:
                assert set(taken.data) <= set(COUNTERS)
                self.total.update(taken.data)
            return taken

        patch.setattr(side, "take_stats", counted)

    def of(self, *names: str) -> list[float]:
        return [self.total[name] for name in names]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    return Counted(monkeypatch)


@pytest.fixture
def engine() -> Iterator[kvring.Engine]:
    with kvring.Engine(f"counters-{os.getpid()}", "64MiB") as started:
        yield started


def ask(made: Harness, name: str, prompt: list[int], tokens: int = 2) -> None:
    made.add(want(name, prompt, tokens))
    made.run(200)
    # What a step without requests would have reported.
    for worker in made.workers:
        worker.connector.get_kv_connector_stats()
    made.scheduler.connector.get_kv_connector_stats()


def ends(made: Harness) -> None:
    made.check_idle(last=True)
    made.check_outputs()
    blames = [str(one) for one in made.ledger.violations]
    made.shutdown()
    assert not blames, "\n".join(blames + made.ledger.log)


def test_lookups_loads_and_stores(engine: kvring.Engine, counted: Counted) -> None:
    made = harness(engine.name, num_blocks=60, max_batched=64)
    ask(made, "cold", PROMPT[:33])
    assert counted.of("lookups", "lookup_tokens", "hit_tokens", "load_tokens", "loads") == [1, 33, 0, 0, 0]
    assert counted.of("store_chunks", "store_chunks_skipped", "store_chunks_dropped") == [8, 0, 0]
    chunk_bytes = made.scheduler.connector.scheduler.geometry.chunk_bytes
    assert counted.total["store_bytes"] == 8 * chunk_bytes and counted.total["store_seconds"] > 0
    made.reset(running=False, connector=False)
    ask(made, "warm", PROMPT[:40])
    assert counted.of("lookups", "lookup_tokens", "hit_tokens", "load_tokens", "loads") == [2, 73, 32, 32, 1]
    assert counted.total["load_bytes"] == 8 * chunk_bytes and counted.total["load_seconds"] > 0
    assert counted.of("store_chunks", "lookups_degraded", "lookups_timed_out", "loads_failed", "errors") == [10, 0, 0, 0, 0]
    ask(made, "shorter than a chunk", PROMPT[:3], 1)
    assert counted.total["lookups"] == 2, "nothing could be found"
    ends(made)


def test_a_request_that_is_preempted_is_counted_once(engine: kvring.Engine, counted: Counted) -> None:
    made = harness(engine.name, num_blocks=19, max_model_len=64, max_batched=32, prefix_caching=False)
    for name in "ab":
        made.add(want(name, [token + ord(name) for token in PROMPT[:32]], 30))
    made.run(500)
    ask(made, "last", PROMPT[:1], 1)
    preemptions = sum(made.ledger.admissions[name].number - 1 for name in "ab")
    assert preemptions, "nothing was preempted: this test tests nothing"
    assert counted.of("lookups", "lookup_tokens", "hit_tokens") == [2, 64, 0]
    assert counted.total["load_tokens"] == made.ledger.counters.get("hit_tokens", 0) > 0, "what resumed requests take is taken"
    ends(made)


def test_failed_loads_and_dropped_stores(engine: kvring.Engine, counted: Counted) -> None:
    faults = Faults(fail_store=1.0, budget=1)
    made = harness(engine.name, faults=faults, num_blocks=60, max_batched=64)
    ask(made, "a", PROMPT[:16])
    # Once more, since it has failed.
    assert counted.of("stores", "store_chunks", "store_chunks_dropped") == [2, 4, 4]
    ask(made, "b", PROMPT[16:32])
    made.reset(running=False, connector=False)
    faults.fail_store, faults.fail_load, faults.budget = 0.0, 1.0, 1
    ask(made, "c", PROMPT[16:36])
    assert counted.of("loads", "loads_failed") == [1, 1]
    ends(made)


def test_lookups_without_an_engine(engine: kvring.Engine, counted: Counted) -> None:
    made = harness(engine.name, num_blocks=60, max_batched=64)
    ask(made, "with it", PROMPT[:16])
    assert counted.total["lookups_degraded"] == 0
    assert engine.pid is not None
    os.kill(engine.pid, signal.SIGKILL)
    wait_for(lambda: not engine.is_running, "the engine is dead")
    made.ledger.forget_stored()
    for index in range(3):
        ask(made, f"r{index}", PROMPT[:16])
    assert counted.of("lookups", "lookups_degraded", "lookups_timed_out") == [4, 3, 0]
    ends(made)


@pytest.mark.parametrize("lookup", ["poll", "async"])
def test_lookups_that_are_not_answered_in_time(
    lookup: str, engine: kvring.Engine, counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And somebody says so, once."""
    said: list[str] = []
    monkeypatch.setattr("kvring.vllm.scheduler.logger.warning", lambda text, *values: said.append(text % values))
    options = {"lookup": lookup, "lookup_timeout_ms": 1.0, "pending_timeout_ms": 1.0, "stall_after_ms": 600_000.0}
    made = harness(engine.name, options=options, num_blocks=60, max_batched=64)
    assert engine.pid is not None
    os.kill(engine.pid, signal.SIGSTOP)
    try:
        for index in range(2):
            ask(made, f"r{index}", PROMPT[:16])
    finally:
        os.kill(engine.pid, signal.SIGCONT)
    # The first one that gets no answer while the beat stands still tells that the engine hangs: from then on it is not asked.
    late, absent = counted.of("lookups_timed_out", "lookups_degraded")
    assert late >= 1 and late + absent == 2 == counted.total["lookups"]
    assert len(said) == 1 and f"kvring.{'lookup' if lookup == 'poll' else 'pending'}_timeout_ms (1 ms)" in said[0]
    ends(made)


def test_errors(engine: kvring.Engine, counted: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    made = harness(engine.name, num_blocks=60, max_batched=64)

    def broken(*_: object) -> None:
        raise RuntimeError("injected")

    with monkeypatch.context() as patch:
        patch.setattr(SchedulerSide, "_track", broken)
        ask(made, "a", PROMPT[:16])
    assert counted.total["errors"] == 1
    ends(made)
