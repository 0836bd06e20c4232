"""Between a lookup's answer and the blocks that vLLM allocates for it: what may happen meanwhile."""

import itertools
import os
import signal
import time
from collections.abc import Iterator

import pytest
from harness.driver import Harness
from harness.support import harness, want

import kvring

PROMPT = list(range(10, 74))
_numbers = itertools.count()


@pytest.fixture
def engine() -> Iterator[kvring.Engine]:
    # A name of its own: a test kills it, and the next one is not to recover what it held.
    with kvring.Engine(f"admission-{os.getpid()}-{next(_numbers)}", "64MiB") as started:
        yield started


def ends(made: Harness) -> None:
    made.run(300)
    made.check_idle(last=True)
    made.check_outputs()
    blames = [str(one) for one in made.ledger.violations]
    made.shutdown()
    assert not blames, "\n".join(blames + made.ledger.log)


@pytest.mark.parametrize("lookup", ["poll", "async"])
@pytest.mark.parametrize("successor", ["cold", "warm", "none"])
def test_an_answer_is_not_kept_over_the_death_of_its_engine(engine: kvring.Engine, successor: str, lookup: str) -> None:
    """With vLLM's default policy a load that fails ends the request with an error."""
    made = harness(
        engine.name,
        options={"lookup": lookup},
        failure_policy="fail",
        num_blocks=27,
        max_batched=64,
        prefix_caching=False,
    )
    made.calls.strict = False
    made.add(want("warm", PROMPT[:48], 2))
    made.run(100)
    # Room for one of them: the second has its hit, and waits.
    made.add(want("runs", [token + 100 for token in PROMPT], 28))
    made.step()
    made.add(want("waits", PROMPT[:48], 2))
    side = made.scheduler.connector.scheduler
    while (tracker := side.trackers.get("waits")) is None or tracker.hit is None:
        made.step()
    assert tracker.hit.chunks and not tracker.settled
    assert engine.pid is not None
    os.kill(engine.pid, signal.SIGKILL)
    while engine.is_running:
        time.sleep(0.001)
    if successor != "none":
        engine.extra_args = ["--cold"] if successor == "cold" else []
        engine.start()
        until = time.monotonic() + 60
        adapters = [side.adapter, *(worker.connector.worker.adapter for worker in made.workers)]
        while not all(adapter.is_healthy() for adapter in adapters):
            assert time.monotonic() < until
            time.sleep(0.005)
    ends(made)
    assert not made.wanted["waits"].load_failed
    assert made.calls.hits.get("waits", 0) == (48 if successor == "warm" else 0)
