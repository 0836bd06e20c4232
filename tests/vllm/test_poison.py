"""Only KV that was computed from right KV is stored."""

import pytest
from harness.driver import Harness, Wanted
from harness.support import PROMPT, forget, harness, is_right, run

import kvring
from kvring.vllm.scheduler import SchedulerSide


def warmed(engine: kvring.Engine) -> Harness:
    """kvring has a prefix, which is loaded synchronously, and vLLM nothing."""
    made = harness(engine, options={"load": "sync"}, max_batched=64)
    run(made, "warm", PROMPT[:16])
    forget(made)
    return made


def is_right_again(made: Harness, prompt: list[int]) -> None:
    """All was right so far, and a later request finds nothing wrong."""
    is_right(made)
    forget(made)
    run(made, "again", prompt, 6)
    made.check_outputs()
    made.shutdown()
    is_right(made)


def test_a_request_that_shares_the_blocks_of_a_failed_synchronous_load_stores_nothing(engine: kvring.Engine) -> None:
    made = warmed(engine)
    # Both in one step: b finds the blocks that a is about to load in vLLM's own prefix cache.
    made.faults.fail_load, made.faults.budget = 1.0, 1
    made.add(Wanted("a", PROMPT[:16] + [900, 901], 6))
    run(made, "b", PROMPT[:32] + [902], 6)
    assert made.ledger.counters.get("failed_loads") == 1, "\n".join(made.ledger.log)
    is_right_again(made, PROMPT[:32] + [902])


def test_nothing_is_stored_that_was_computed_from_a_synchronous_load_that_could_not_be(
    engine: kvring.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = warmed(engine)

    def broken(self: SchedulerSide, *_: object) -> None:
        monkeypatch.undo()
        raise RuntimeError("injected")

    monkeypatch.setattr(SchedulerSide, "update_state_after_alloc", broken)
    run(made, "a", PROMPT[:32] + [900], 6)
    assert made.ledger.counters.get("hits"), "\n".join(made.ledger.log)
    is_right_again(made, PROMPT[:32] + [900])
