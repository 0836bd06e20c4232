"""Between a lookup's answer and the blocks that vLLM allocates for it: what may happen meanwhile, and who asks for the same."""

import itertools
import os
import signal
import subprocess
from collections.abc import Iterator

import pytest
from harness.driver import Harness
from harness.support import harness, want
from waiting import wait_for

import kvring
from kvring.engine import binary_path

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
    wait_for(lambda: not engine.is_running, "the engine is dead")
    if successor != "none":
        engine.extra_args = ["--cold"] if successor == "cold" else []
        engine.start()
        adapters = [side.adapter, *(worker.connector.worker.adapter for worker in made.workers)]
        wait_for(lambda: all(adapter.is_healthy() for adapter in adapters), "all are attached to the next engine")
    ends(made)
    assert not made.wanted["waits"].load_failed
    assert made.calls.hits.get("waits", 0) == (48 if successor == "warm" else 0)
    if successor == "none":
        # What it has left would be its successor's.
        subprocess.run([binary_path(), "remove", "--name", engine.name], check=True)


@pytest.mark.parametrize("caching", [True, False])
def test_requests_with_one_prefix_at_once_are_one_load(engine: kvring.Engine, caching: bool) -> None:
    made = harness(engine.name, num_blocks=200, max_batched=128, max_seqs=8, prefix_caching=caching)
    made.add(want("first", PROMPT[:48], 2))
    made.run(100)
    made.check_idle(last=False)
    made.reset(running=False, connector=False)
    for index in range(8):
        made.add(want(f"r{index}", PROMPT[:48] + [500 + index] * 6, 3))
    made.run(300)
    # Without a prefix cache of vLLM's own each needs its own copy.
    assert made.ledger.counters["loads"] == (1 if caching else 8), "\n".join(made.ledger.log)
    ends(made)


def test_who_waits_for_a_load_that_is_given_up_loads_for_itself(engine: kvring.Engine) -> None:
    made = harness(engine.name, num_blocks=200, max_batched=128, max_seqs=8)
    made.add(want("first", PROMPT[:48], 2))
    made.run(100)
    made.check_idle(last=False)
    made.reset(running=False, connector=False)
    made.faults.hold, made.faults.hold_steps = 1.0, (5, 5)
    for name in "ab":
        made.add(want(name, PROMPT[:50], 3))
    made.step()
    assert made.ledger.counters["loads"] == 1 and made.ledger.counters["pending_lookups"] == 1
    made.abort("a")
    ends(made)
    assert made.ledger.counters["loads"] == 2
