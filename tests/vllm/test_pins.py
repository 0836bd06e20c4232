"""The blocks of requests that have ended, which stores still read, and requests that wait: vLLM has its blocks back when it wants
them."""

import itertools
from typing import Any

import pytest
from harness.driver import Harness, Wanted
from harness.jobs import Faults
from harness.support import PROMPT, ends, forget, harness, run
from vllm.v1.core.kv_cache_manager import KVCacheManager

import kvring
import kvring.vllm.stores as stores


def slow(steps: int) -> Faults:
    """A store path on which every store begins so many steps late, unless it is flushed."""
    return Faults(hold=1.0, hold_steps=(steps, steps))


def to_the_last_token(made: Harness) -> None:
    """As `LLM.generate`: nobody steps again when there are no unfinished requests."""
    while made.scheduler.has_unfinished_requests():
        made.step()


@pytest.mark.parametrize("window", [None, 9])
def test_a_reset_right_after_the_last_step_does_not_find_our_blocks_in_use(engine: kvring.Engine, window: int | None) -> None:
    made = harness(engine, faults=slow(50), window=window)
    made.add(Wanted("a", PROMPT, 6))
    to_the_last_token(made)
    assert made.ledger.open, "nothing is being stored: this test tests nothing"
    assert made.scheduler.reset_prefix_cache()
    # New owners of the same blocks, at once.
    for name in "bcd":
        made.add(Wanted(name, [int(token) + ord(name) for token in PROMPT], 6))
    ends(made)


def test_a_reset_of_running_requests_does_not_find_our_blocks_in_use(engine: kvring.Engine) -> None:
    made = harness(engine, faults=slow(50), max_batched=64)
    made.add(Wanted("short", PROMPT[:32], 2))
    made.add(Wanted("long", PROMPT[32:], 30))
    while made.wanted["short"].reason is None:
        made.step()
    assert made.scheduler.running and made.ledger.open, "\n".join(made.ledger.log)
    assert made.scheduler.reset_prefix_cache(reset_running_requests=True)
    ends(made)


def test_pins_end_with_flush_timeout_also_where_nothing_is_ever_reported(engine: kvring.Engine) -> None:
    made = harness(engine, faults=slow(1 << 30), options={"flush_timeout_ms": 1.0})
    made.add(Wanted("a", PROMPT, 6))
    ends(made)


def steps_of(engine: kvring.Engine, faults: Faults, first: int) -> int:
    """The steps of 16 requests, with room for two of them; steps without work count too."""
    made = harness(engine, faults=faults, num_blocks=2 * 17 + 1, max_model_len=68, max_batched=64, prefix_caching=False)
    for index in range(first, first + 16):
        made.add(Wanted(f"r{index}", [token + 10 * index for token in PROMPT], 4))
    to_the_last_token(made)
    steps = made.ledger.step
    ends(made)
    return steps


def test_a_store_path_slower_than_the_model_does_not_slow_it_down(engine: kvring.Engine) -> None:
    quick = steps_of(engine, Faults(), 0)
    late = steps_of(engine, slow(50), 16)
    print(f"{quick} and {late} steps")
    assert late <= 1.5 * quick, f"{late} steps instead of {quick}"


def test_no_more_is_announced_than_may_wait_and_the_rest_when_it_may(
    engine: kvring.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = harness(engine, faults=slow(10), max_batched=16)
    side = made.scheduler.connector.scheduler
    most, seen = 3 * side.geometry.chunk_bytes, [0]
    monkeypatch.setattr(stores, "QUEUED_BYTES_MAX", most)
    for name, prompt in (("a", PROMPT[:16]), ("b", PROMPT[16:32])):
        made.add(Wanted(name, prompt, 40))
    while made.scheduler.has_unfinished_requests():
        made.step()
        seen.append(sum(store.chunks for store in side.open_stores._open.values()) * side.geometry.chunk_bytes)
    full = [(before, after) for before, after in itertools.pairwise(seen) if before >= most]
    assert full and all(after <= before for before, after in full), seen
    ends(made)
    # Stores that had to wait came later, but for the last ones: how many steps a report takes is not said.
    assert made.ledger.counters["stored_chunks"] >= 3 * 3


def test_a_block_that_fills_costs_the_same_however_long_the_context_is(
    engine: kvring.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table of 60 000 blocks takes milliseconds to be made a list of ids; vLLM would do it for each block that fills."""
    made = harness(engine)
    made.add(Wanted("a", PROMPT[:30], 30))
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


def test_an_id_may_be_used_again_while_a_store_of_its_first_request_is_open(engine: kvring.Engine) -> None:
    """vLLM finds the blocks in its own prefix cache, so the second request has the same: they are pinned once, and freed once."""
    made = harness(engine, faults=slow(60))
    for _ in range(2):
        made.add(Wanted("a", PROMPT, 6))
        to_the_last_token(made)
    assert made.ledger.open, "nothing is being stored: this test tests nothing"
    made.run(200)
    free = made.pool.get_num_free_blocks()
    made.shutdown()
    assert free == made.blocks_at_start


def test_a_report_that_is_lost_does_not_stop_storing_for_good(engine: kvring.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    made = harness(engine, options={"flush_timeout_ms": 1.0})
    side, worker = made.scheduler.connector.scheduler, made.workers[0].connector.worker
    monkeypatch.setattr(stores, "QUEUED_BYTES_MAX", side.geometry.chunk_bytes)
    monkeypatch.setattr(stores, "REPORT_STEPS", 5)
    with monkeypatch.context() as patch:
        take = worker.take_worker_meta
        patch.setattr(worker, "take_worker_meta", lambda: (take(), None)[1])
        run(made, "a", PROMPT, 6)
    assert side.open_stores.is_full, "no report was lost: this test tests nothing"
    before = made.ledger.counters["stores"]
    run(made, "b", PROMPT[::-1], 30)
    assert made.ledger.counters["stores"] > before
    assert all(store.request == "b" for store in side.open_stores._open.values())
    ends(made)


def test_chunks_that_could_not_be_stored_are_stored_once_more(engine: kvring.Engine) -> None:
    """Otherwise the chunks behind them could never be found."""
    made = harness(engine, faults=Faults(fail_store=1.0, budget=1))
    run(made, "a", PROMPT, 20)
    assert made.ledger.counters["failed_stores"] == 1
    forget(made)
    made.add(Wanted("b", PROMPT, 20))
    ends(made)
    assert made.calls.hits["b"] == len(PROMPT), "what lies behind a hole is not found"


def test_chunks_that_cannot_be_stored_are_not_tried_for_ever(engine: kvring.Engine) -> None:
    made = harness(engine, faults=Faults(fail_store=1.0))
    made.add(Wanted("a", PROMPT[:16], 60))
    ends(made)
    assert 2 <= made.ledger.counters["stores"] <= 8, "each step tries again"


def test_blocks_that_a_running_request_lacks_do_not_go_to_a_waiting_one(engine: kvring.Engine) -> None:
    """It loses no step. (Without pinned blocks it would lose none either: vLLM would preempt the youngest request.)"""
    made = harness(engine, faults=slow(50), num_blocks=24, max_model_len=64, max_batched=64, prefix_caching=False)
    made.add(Wanted("oldest", PROMPT[:16], 44))
    for index in range(1, 20):
        made.add(Wanted(f"r{index}", [token + 10 * index for token in PROMPT[:32]], 2))
    oldest, lost = made.wanted["oldest"], 0
    while not oldest.reason:
        before = len(oldest.output)
        made.step()
        lost += len(oldest.output) == before
    ends(made)
    assert not lost, f"{lost} steps without it\n" + "\n".join(made.ledger.log)
