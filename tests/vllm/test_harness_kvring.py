"""The kvring connector under the harness: random scenarios by seed, the real engine, the real adapters.

`KVRING_SOAK=N` runs N seeds instead of the quick suite's; `KVRING_SEED=S` runs one, with its step log.
"""

import os
from collections.abc import Callable
from typing import Any

import pytest
from harness.driver import Harness
from harness.scenario import ONE_RANK_FAILS, ONE_WINDOW_FAILS, PLAIN, Target, is_caught, passes, told
from harness.support import target

import kvring
import kvring.vllm.guard as guard
from kvring.vllm.geometry import Geometry
from kvring.vllm.scheduler import SchedulerSide
from kvring.vllm.stores import OpenStore, OpenStores
from kvring.vllm.tracker import Tracker

BATCH = 10
SEEDS = int(os.environ.get("KVRING_SOAK", 40))
ONE = os.environ.get("KVRING_SEED")


@pytest.fixture
def judged(engine: kvring.Engine, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Target]:
    """The connector. An error that it has caught is a violation too: it must not raise any by itself."""

    def watch(harness: Harness) -> None:
        def tell(where: str, error: Exception) -> None:
            harness.ledger.blame("raised", f"caught in {where}: {told(error)}")

        monkeypatch.setattr(guard, "_tell", tell)

    return lambda: target(engine, watch)


@pytest.mark.parametrize("first", range(0, SEEDS, BATCH) if ONE is None else [int(ONE)])
def test_the_obligations_hold_in_random_scenarios(first: int, judged: Callable[[], Target]) -> None:
    """P0-P5."""
    stop = min(first + BATCH, SEEDS) if ONE is None else first + 1
    totals = passes(judged, range(first, stop), show=ONE is not None)
    assert ONE is not None or (totals["hits"] and totals["stores"]), totals


def test_failed_loads_of_a_model_whose_only_kv_group_is_a_window_are_computed_again(judged: Callable[[], Target]) -> None:
    """From the first token on, or vLLM would look back at blocks that nobody has filled."""
    assert passes(judged, range(4), ONE_WINDOW_FAILS)["failed_loads"], "no load has failed: this test tests nothing"


ENGINE_DIES = PLAIN | {"theme": "engine", "kill_at": 12, "down_for": 12}


def test_an_engine_that_is_killed_and_started_again_costs_no_hit(judged: Callable[[], Target]) -> None:
    """In every admission all is found that was stored, and no load fails, while there is an engine and while there is none."""
    totals = passes(judged, range(100, 110), ENGINE_DIES)
    assert totals["hits"] and not totals["requests_whose_load_failed"], totals


def _no_fence(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(OpenStores, "fence", lambda self, preempted: [])


def _no_window_fence(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(OpenStores, "_owns_blocks", lambda self, store: True)


def _blocks_given_back_early(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(OpenStores, "pin", lambda self, request: None)


def _let_go_without_a_flush(patch: pytest.MonkeyPatch) -> None:
    unpin = OpenStores._unpin

    def forgotten(self: OpenStores, store: OpenStore) -> None:
        unpin(self, store)
        store.lost = False

    patch.setattr(OpenStores, "_unpin", forgotten)


def _stale_hit(patch: pytest.MonkeyPatch) -> None:
    ask = SchedulerSide._ask
    answers: dict[str, Any] = {}

    def stale(self: SchedulerSide, tracker: Tracker) -> Any:
        if answers.get(tracker.request) is None:
            answers[tracker.request] = ask(self, tracker)
        return answers[tracker.request]

    patch.setattr(SchedulerSide, "_ask", stale)


def _poison(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(SchedulerSide, "_may_store", lambda self: True)
    patch.setattr(SchedulerSide, "_spoilt", lambda self, load: None)


def _whole_prompt(patch: pytest.MonkeyPatch) -> None:
    ask = SchedulerSide.get_num_new_matched_tokens

    def all_of_it(self: SchedulerSide, request: Any, local: int) -> tuple[int | None, bool]:
        tokens, is_async = ask(self, request, local)
        whole = tokens and local + tokens == request.num_tokens - 1 and request.num_tokens % self.geometry.chunk_tokens == 0
        return (tokens + 1 if whole and tokens else tokens), is_async

    patch.setattr(SchedulerSide, "get_num_new_matched_tokens", all_of_it)


def _names_blocks_of_a_window(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Geometry, "knows_bad_blocks", property(lambda self: len(self.groups) == 1))


HELD = PLAIN | {"hold": 0.7}
ONE_GROUP = HELD | {"window": None}

MISTAKES: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no fence": (_no_fence, ONE_GROUP | {"slack_blocks": 0}, "P2"),
    "no fence for window blocks": (_no_window_fence, HELD | {"window": 6, "chunk_blocks": 1}, "P2"),
    "the blocks of a window named that a load has not brought": (_names_blocks_of_a_window, ONE_WINDOW_FAILS, "P3"),
    "blocks given back while they are read": (_blocks_given_back_early, ONE_GROUP, "P2"),
    "blocks let go while they are read": (_let_go_without_a_flush, ONE_GROUP | {"slack_blocks": 0}, "P2"),
    "an earlier admission's hit": (_stale_hit, ONE_GROUP | {"prefix_caching": False, "slack_blocks": 0}, "P5"),
    "one rank's failed synchronous load ignored": (_poison, ONE_RANK_FAILS, "P3"),
    "the whole prompt, with a window": (_whole_prompt, HELD | {"window": 9, "chunk_blocks": 1}, "P3"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_it_is_caught(mistake: str, judged: Callable[[], Target], monkeypatch: pytest.MonkeyPatch) -> None:
    """In the connector itself, not only in the toy."""
    spoil, overrides, rule = MISTAKES[mistake]
    spoil(monkeypatch)
    is_caught(judged, overrides | {"patience": 2_000}, {rule})
