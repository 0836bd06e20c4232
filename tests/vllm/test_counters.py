"""Each counter says what happened."""

import os
import signal
from collections import Counter
from typing import Any

import pytest
from harness import support
from harness.driver import Harness, Wanted
from harness.jobs import Faults
from harness.support import PROMPT, ends, forget, harness
from waiting import FOREVER_MS

import kvring
from kvring.vllm.scheduler import SchedulerSide
from kvring.vllm.stats import COUNTERS
from kvring.vllm.worker import WorkerSide


class Counted(Counter[str]):
    """The connector's counters, of all its sides, over all steps."""

    def of(self, *names: str) -> list[float]:
        return [self[name] for name in names]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    total = Counted()

    def watch(side: Any, take: Any) -> None:
        def taken(one: Any) -> Any:
            stats = take(one)
            if stats is not None:
                assert set(stats.data) <= set(COUNTERS)
                total.update(stats.data)
            return stats

        monkeypatch.setattr(side, "take_stats", taken)

    for side in (SchedulerSide, WorkerSide):
        watch(side, side.take_stats)
    return total


def run(made: Harness, name: str, prompt: list[int], tokens: int = 2) -> None:
    support.run(made, name, prompt, tokens)
    # The next step would report the rest.
    for connector in [*(worker.connector for worker in made.workers), made.scheduler.connector]:
        connector.get_kv_connector_stats()


def test_lookups_loads_and_stores_are_counted(engine: kvring.Engine, counted: Counted) -> None:
    made = harness(engine, max_batched=64)
    run(made, "cold", PROMPT[:33])
    assert counted.of("lookups", "lookup_tokens", "hit_tokens", "load_tokens", "loads") == [1, 33, 0, 0, 0]
    assert counted.of("store_chunks", "store_chunks_skipped", "store_chunks_dropped") == [8, 0, 0]
    chunk_bytes = made.scheduler.connector.scheduler.geometry.chunk_bytes
    assert counted["store_bytes"] == 8 * chunk_bytes and counted["store_seconds"] > 0
    forget(made)
    run(made, "warm", PROMPT[:40])
    assert counted.of("lookups", "lookup_tokens", "hit_tokens", "load_tokens", "loads") == [2, 73, 32, 32, 1]
    assert counted["load_bytes"] == 8 * chunk_bytes and counted["load_seconds"] > 0
    assert counted.of("store_chunks", "lookups_degraded", "lookups_not_serving", "lookups_cut") == [10, 0, 0, 0]
    assert counted.of("loads_failed", "errors") == [0, 0]
    run(made, "shorter than a chunk", PROMPT[:3], 1)
    assert counted["lookups"] == 2, "nothing could be found"
    ends(made)


def test_a_request_that_is_preempted_is_counted_once(engine: kvring.Engine, counted: Counted) -> None:
    made = harness(engine, num_blocks=19, max_model_len=64, max_batched=32, prefix_caching=False)
    for name in "ab":
        made.add(Wanted(name, [token + ord(name) for token in PROMPT[:32]], 30))
    made.run(500)
    run(made, "last", PROMPT[:1], 1)
    assert any(made.ledger.admissions[name].number > 1 for name in "ab"), "nothing was preempted: this test tests nothing"
    assert counted.of("lookups", "lookup_tokens", "hit_tokens") == [2, 64, 0]
    assert counted["load_tokens"] == made.ledger.counters.get("hit_tokens", 0) > 0, "what resumed requests take is taken"
    ends(made)


def test_failed_loads_and_dropped_stores_are_counted(engine: kvring.Engine, counted: Counted) -> None:
    faults = Faults(fail_store=1.0, budget=1)
    made = harness(engine, faults=faults, max_batched=64)
    run(made, "a", PROMPT[:16])
    # It is stored once more, since it has failed.
    assert counted.of("stores", "store_chunks", "store_chunks_dropped") == [2, 4, 4]
    run(made, "b", PROMPT[16:32])
    forget(made)
    faults.fail_store, faults.fail_load, faults.budget = 0.0, 1.0, 1
    run(made, "c", PROMPT[16:36])
    assert counted.of("loads", "loads_failed") == [1, 1]
    ends(made)


@pytest.mark.parametrize("trouble", ["stopped", "dead"])
def test_an_engine_that_is_not_serving_costs_no_hit_and_no_load(engine: kvring.Engine, counted: Counted, trouble: str) -> None:
    made = harness(engine, max_batched=64)
    run(made, "before", PROMPT[:16])
    assert engine.pid is not None
    if trouble == "stopped":
        os.kill(engine.pid, signal.SIGSTOP)
    else:
        engine.kill()
    try:
        for index in range(3):
            forget(made)
            run(made, f"r{index}", PROMPT[:18])
    finally:
        if trouble == "stopped":
            os.kill(engine.pid, signal.SIGCONT)
    assert counted.of("lookups", "hit_tokens", "loads", "loads_failed") == [4, 48, 3, 0]
    # That one is stopped shows only once it is waited for, and lookups wait for nothing.
    assert counted["lookups_not_serving"] == (3 if trouble == "dead" else 0)
    assert counted.of("lookups_degraded", "lookups_cut") == [0, 0]
    ends(made)


def test_lookups_where_there_has_never_been_an_engine_are_counted(engine: kvring.Engine, counted: Counted) -> None:
    made = harness(engine, options={"name": "nobody", "register_timeout_ms": 1.0}, attached=False, max_batched=64)
    for index in range(3):
        run(made, f"r{index}", PROMPT[:16])
    assert counted.of("lookups", "lookups_degraded", "lookups_not_serving", "hit_tokens") == [3, 3, 0, 0]
    ends(made)


def test_lookups_that_are_cut_because_one_client_holds_enough_are_counted(counted: Counted) -> None:
    # A client may hold one slab at least; a chunk takes a page, so that is 256 of them.
    options = ["--slab", "1MiB", "--client-share", "0.001"]
    prompt = [3 + n % 900 for n in range(300 * 4 + 1)]
    with kvring.Engine(f"cut-{os.getpid()}", "8MiB", extra_args=options, start_timeout_s=FOREVER_MS / 1000) as engine:
        made = harness(engine, num_blocks=400, max_model_len=len(prompt) + 1, max_batched=2048)
        # Nor does a worker store more than that at once.
        for length in (150 * 4, len(prompt)):
            run(made, f"cold {length}", prompt[:length], 1)
        assert counted["store_chunks"] == 300
        forget(made)
        # Not all is found that was stored.
        made.calls.strict = False
        run(made, "warm", prompt, 1)
        assert counted.of("lookups_cut", "hit_tokens", "loads", "loads_failed") == [1, (150 + 256) * 4, 1, 0]
        ends(made)


def test_errors_are_counted(engine: kvring.Engine, counted: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    made = harness(engine, max_batched=64)

    def broken(*_: object) -> None:
        raise RuntimeError("injected")

    with monkeypatch.context() as patch:
        patch.setattr(SchedulerSide, "_track", broken)
        run(made, "a", PROMPT[:16])
    assert counted["errors"] == 1
    ends(made)
