"""Between a lookup's answer and the blocks that vLLM allocates for it: the engine may die, others may ask for the same."""

import pytest
from harness.driver import Harness, Wanted
from harness.support import PROMPT, ends, forget, harness, run
from waiting import wait_for

import kvring


@pytest.mark.parametrize("successor", ["cold", "warm", "none"])
def test_an_answer_outlives_its_engine_unless_the_next_one_starts_empty(engine: kvring.Engine, successor: str) -> None:
    """With vLLM's default policy a load that fails ends the request with an error."""
    more = {"failure_policy": "fail", "num_blocks": 27, "max_batched": 64, "prefix_caching": False}
    made = harness(engine, **more)
    made.calls.strict = False
    run(made, "warm", PROMPT[:48])
    # Room for one of them: the second has its hit, and waits.
    made.add(Wanted("runs", [token + 100 for token in PROMPT], 28))
    made.step()
    made.add(Wanted("waits", PROMPT[:48], 2))
    side = made.scheduler.connector.scheduler
    while (tracker := side.trackers.get("waits")) is None:
        made.step()
    assert tracker.hit is not None and tracker.hit.chunks, "nothing was found"
    assert not tracker.settled, "there was room for both"
    engine.kill()
    if successor != "none":
        engine.extra_args = ["--cold"] if successor == "cold" else []
        engine.start()
        adapters = [side.adapter, *(worker.connector.worker.adapter for worker in made.workers)]
        wait_for(lambda: all(adapter.is_healthy() for adapter in adapters), "all are attached to the next engine")
    ends(made)
    assert not made.wanted["waits"].load_failed
    assert made.calls.hits.get("waits", 0) == (0 if successor == "cold" else 48)


def warmed(engine: kvring.Engine, **setup: object) -> Harness:
    """A harness of which kvring has a prefix, and vLLM nothing."""
    made = harness(engine, num_blocks=200, max_batched=128, max_seqs=8, **setup)
    run(made, "first", PROMPT[:48])
    made.check_idle(last=False)
    forget(made)
    return made


@pytest.mark.parametrize("caching", [True, False])
def test_requests_with_one_prefix_at_once_are_one_load(engine: kvring.Engine, caching: bool) -> None:
    made = warmed(engine, prefix_caching=caching)
    for index in range(8):
        made.add(Wanted(f"r{index}", PROMPT[:48] + [500 + index] * 6, 3))
    made.run(300)
    # Without a prefix cache of vLLM's own each needs its own copy.
    assert made.ledger.counters["loads"] == (1 if caching else 8), "\n".join(made.ledger.log)
    ends(made)


def test_a_request_that_waits_for_a_load_that_is_given_up_loads_for_itself(engine: kvring.Engine) -> None:
    made = warmed(engine)
    made.faults.hold, made.faults.hold_steps = 1.0, (5, 5)
    for name in "ab":
        made.add(Wanted(name, PROMPT[:50], 3))
    made.step()
    assert made.ledger.counters["loads"] == 1 and made.ledger.counters["waits_for_another_load"] == 1
    made.abort("a")
    ends(made)
    assert made.ledger.counters["loads"] == 2
