"""What stores read of requests that have ended, and what waits for us: vLLM has its blocks back when it wants them."""

import itertools
import os
from collections.abc import Iterator
from typing import Any

import pytest
from harness.driver import Harness
from harness.jobs import Faults
from harness.support import harness, want
from vllm.v1.core.kv_cache_manager import KVCacheManager

import kvring
import kvring.vllm.stores as stores

PROMPT = list(range(10, 74))


@pytest.fixture
def engine() -> Iterator[str]:
    """One for each test: what an earlier one has stored is not to be found."""
    name = f"pins-{os.getpid()}"
    with kvring.Engine(name, "64MiB"):
        yield name


def slow(steps: int) -> Faults:
    """A store path on which every store begins so many steps late, unless it is flushed."""
    return Faults(hold=1.0, hold_steps=(steps, steps))


def to_the_last_token(made: Harness) -> None:
    """As `LLM.generate`: nobody steps again when there are no unfinished requests."""
    while made.scheduler.has_unfinished_requests():
        made.step()


def ends(made: Harness) -> None:
    made.run(200)
    made.check_idle(last=True)
    made.check_outputs()
    blames = [str(one) for one in made.ledger.violations]
    made.shutdown()
    assert not blames, "\n".join(blames + made.ledger.log)


@pytest.mark.parametrize("window", [None, 9])
def test_a_reset_right_after_the_last_step_does_not_find_our_blocks_in_use(engine: str, window: int | None) -> None:
    made = harness(engine, faults=slow(50), num_blocks=60, window=window)
    made.add(want("a", PROMPT, 6))
    to_the_last_token(made)
    assert made.ledger.open, "nothing is being stored: this test tests nothing"
    assert made.scheduler.reset_prefix_cache()
    # New owners of the same blocks, at once.
    for name in "bcd":
        made.add(want(name, [int(token) + ord(name) for token in PROMPT], 6))
    ends(made)


def test_a_reset_of_running_requests_does_not_find_our_blocks_in_use(engine: str) -> None:
    made = harness(engine, faults=slow(50), num_blocks=60, max_batched=64)
    made.add(want("short", PROMPT[:32], 2))
    made.add(want("long", PROMPT[32:], 30))
    while made.wanted["short"].reason is None:
        made.step()
    assert made.scheduler.running and made.ledger.open, "\n".join(made.ledger.log)
    assert made.scheduler.reset_prefix_cache(reset_running_requests=True)
    ends(made)


def test_pins_end_with_flush_timeout_also_where_nothing_is_ever_reported(engine: str) -> None:
    made = harness(engine, faults=slow(1 << 30), num_blocks=60, options={"flush_timeout_ms": 1.0})
    made.add(want("a", PROMPT, 6))
    ends(made)


def steps_of(engine: str, faults: Faults, first: int) -> int:
    """Of 16 requests, with room for two of them, empty ones included."""
    made = harness(engine, faults=faults, num_blocks=2 * 17 + 1, max_model_len=68, max_batched=64, prefix_caching=False)
    for index in range(first, first + 16):
        made.add(want(f"r{index}", [token + 10 * index for token in PROMPT], 4))
    to_the_last_token(made)
    steps = made.ledger.step
    ends(made)
    return steps


def test_a_store_path_slower_than_the_model_does_not_slow_it_down(engine: str) -> None:
    quick = steps_of(engine, Faults(), 0)
    late = steps_of(engine, slow(50), 16)
    print(f"{quick} and {late} steps")
    assert late <= 1.5 * quick, f"{late} steps instead of {quick}"


def test_no_more_is_announced_than_may_wait_and_the_rest_when_it_may(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = harness(engine, faults=slow(10), num_blocks=60, max_batched=16)
    side = made.scheduler.connector.scheduler
    most, seen = 3 * side.geometry.chunk_bytes, [0]
    monkeypatch.setattr(stores, "QUEUED_BYTES_MAX", most)
    made.add(want("a", PROMPT[:16], 40))
    made.add(want("b", PROMPT[16:32], 40))
    while made.scheduler.has_unfinished_requests():
        made.step()
        seen.append(sum(store.chunks for store in side.open_stores._open.values()) * side.geometry.chunk_bytes)
    full = [(before, after) for before, after in itertools.pairwise(seen) if before >= most]
    assert full and all(after <= before for before, after in full), seen
    ends(made)
    # What had to wait was stored later, but for what had no time left: how many steps a report takes is not said.
    stored = made.ledger.counters["stored_chunks"]
    assert stored >= 3 * 3, stored


def test_a_block_that_fills_costs_the_same_however_long_the_context_is(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table of 60 000 blocks takes milliseconds to be made a list of ids; vLLM would do it for each block that fills."""
    made = harness(engine, num_blocks=60)
    made.add(want("a", PROMPT[:30], 30))
    while not made.wanted["a"].output:
        made.step()
    connector, whole, inside = made.scheduler.connector, KVCacheManager.get_block_ids, [False]
    build, made_lists = connector.build_connector_meta, []

    def counted(self: KVCacheManager, request: str) -> Any:
        if inside[0]:
            made_lists.append(request)
        return whole(self, request)

    def watched(output: Any) -> Any:
        inside[0] = True
        try:
            return build(output)
        finally:
            inside[0] = False

    monkeypatch.setattr(KVCacheManager, "get_block_ids", counted)
    connector.build_connector_meta = watched
    before = made.ledger.counters["stores"]
    ends(made)
    assert made.ledger.counters["stores"] > before + 5
    assert not made_lists


def test_an_id_is_used_again_while_a_store_of_its_first_request_is_open(engine: str) -> None:
    """vLLM finds the blocks in its own prefix cache, so the second request has the same: they are pinned once, and freed once."""
    made = harness(engine, faults=slow(60), num_blocks=60)
    for _ in range(2):
        made.add(want("a", PROMPT, 6))
        to_the_last_token(made)
    assert made.ledger.open, "nothing is being stored: this test tests nothing"
    made.run(200)
    free = made.pool.get_num_free_blocks()
    made.shutdown()
    assert free == made.blocks_at_start


def test_a_report_that_is_lost_does_not_stop_storing_for_good(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = harness(engine, num_blocks=60, options={"flush_timeout_ms": 1.0})
    side, worker = made.scheduler.connector.scheduler, made.workers[0].connector.worker
    monkeypatch.setattr(stores, "QUEUED_BYTES_MAX", side.geometry.chunk_bytes)
    monkeypatch.setattr(stores, "REPORT_STEPS", 5)
    with monkeypatch.context() as patch:
        take = worker.take_worker_meta
        patch.setattr(worker, "take_worker_meta", lambda: (take(), None)[1])
        made.add(want("a", PROMPT, 6))
        made.run(200)
    assert side.open_stores.is_full, "no report was lost: this test tests nothing"
    before = made.ledger.counters["stores"]
    made.add(want("b", PROMPT[::-1], 30))
    made.run(200)
    assert made.ledger.counters["stores"] > before
    assert all(store.request == "b" for store in side.open_stores._open.values())
    ends(made)


def test_chunks_that_could_not_be_stored_are_stored_once_more(engine: str) -> None:
    """Or those behind them could never be found."""
    made = harness(engine, faults=Faults(fail_store=1.0, budget=1), num_blocks=60)
    made.add(want("a", PROMPT, 20))
    made.run(200)
    assert made.ledger.counters["failed_stores"] == 1
    made.reset(running=False, connector=False)
    made.add(want("b", PROMPT, 20))
    ends(made)
    assert made.calls.hits["b"] == len(PROMPT), "what lies behind a hole is not found"


def test_chunks_that_cannot_be_stored_are_not_tried_for_ever(engine: str) -> None:
    made = harness(engine, faults=Faults(fail_store=1.0), num_blocks=60)
    made.add(want("a", PROMPT[:16], 60))
    ends(made)
    assert 2 <= made.ledger.counters["stores"] <= 8, "each step tries again"


def test_blocks_that_a_running_request_lacks_do_not_go_to_a_waiting_one(engine: str) -> None:
    """Its own step is not lost, as it would not be if nothing were pinned: vLLM would preempt the youngest for it."""
    made = harness(engine, faults=slow(50), num_blocks=24, max_model_len=64, max_batched=64, prefix_caching=False)
    made.add(want("oldest", PROMPT[:16], 44))
    for index in range(1, 20):
        made.add(want(f"r{index}", [token + 10 * index for token in PROMPT[:32]], 2))
    oldest, lost = made.wanted["oldest"], 0
    while not oldest.reason:
        before = len(oldest.output)
        made.step()
        lost += len(oldest.output) == before
    ends(made)
    assert not lost, f"{lost} steps without it\n" + "\n".join(made.ledger.log)
