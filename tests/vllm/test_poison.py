"""Wrong bytes: what is stored must have been computed from what is right."""

import os
from collections.abc import Iterator

import pytest
from harness.jobs import Faults
from harness.support import harness, want

import kvring
from kvring.vllm.scheduler import SchedulerSide

PROMPT = list(range(10, 50))


@pytest.fixture(scope="module")
def engine() -> Iterator[str]:
    name = f"poison-poison-{os.getpid()}"
    with kvring.Engine(name, "64MiB"):
        yield name


def _blames(made: object) -> list[str]:
    return [str(one) for one in made.ledger.violations]  # type: ignore[attr-defined]


def test_a_request_that_shares_the_blocks_of_a_failed_synchronous_load_stores_nothing(engine: str) -> None:
    faults = Faults()
    made = harness(engine, faults=faults, options={"load": "sync"}, num_blocks=60, max_batched=64)
    made.add(want("warm", PROMPT[:16], 2))
    made.run(100)
    made.reset(running=False, connector=False)
    # Both in one step: b finds the blocks that a is about to load in vLLM's own prefix cache.
    faults.fail_load, faults.budget = 1.0, 1
    made.add(want("a", PROMPT[:16] + [900, 901], 6))
    made.add(want("b", PROMPT[:32] + [902], 6))
    made.run(100)
    assert made.ledger.counters.get("failed_loads") == 1, "\n".join(made.ledger.log)
    assert not _blames(made), _blames(made)
    made.reset(running=False, connector=False)
    made.add(want("again", PROMPT[:32] + [902], 6))
    made.run(100)
    made.check_outputs()
    log = "\n".join(made.ledger.log)
    made.shutdown()
    print(log)
    assert not _blames(made), f"{_blames(made)}\n{log}"


def test_nothing_is_stored_that_was_computed_from_a_synchronous_load_that_could_not_be(
    engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = harness(engine, options={"load": "sync"}, num_blocks=60, max_batched=64)
    made.add(want("warm", PROMPT[:16], 2))
    made.run(100)
    made.reset(running=False, connector=False)

    def broken(self: SchedulerSide, *_: object) -> None:
        monkeypatch.undo()
        raise RuntimeError("injected")

    monkeypatch.setattr(SchedulerSide, "update_state_after_alloc", broken)
    made.add(want("a", PROMPT[:32] + [900], 6))
    made.run(100)
    assert made.ledger.counters.get("hits"), "\n".join(made.ledger.log)
    assert not _blames(made), _blames(made)
    made.reset(running=False, connector=False)
    made.add(want("again", PROMPT[:32] + [900], 6))
    made.run(100)
    made.check_outputs()
    made.shutdown()
    log = "\n".join(made.ledger.log)
    print(log)
    assert not _blames(made), f"{_blames(made)}\n{log}"
