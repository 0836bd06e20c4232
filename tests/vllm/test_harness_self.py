"""The harness judges a right connector right, and catches each mistake that it is there for."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
from harness.driver import Plug
from harness.scenario import ONE_RANK_FAILS, ONE_WINDOW_FAILS, PLAIN, Target, is_caught, passes
from harness.toy import MISTAKES
from harness.toy_native import SKIP

_names = itertools.count()


def toy(mistake: str = "") -> Callable[[], Target]:
    """The toy connector; each run gets a cache of its own."""

    def extra(choices: dict[str, Any]) -> dict[str, Any]:
        own = {"toy.engine": f"engine{next(_names)}", "toy.mistake": mistake}
        return own | {"toy.chunk_blocks": choices["chunk_blocks"], "toy.load": choices["load"]}

    def adapter(connector: Any) -> tuple[Any, str]:
        return connector, "adapter"

    return lambda: Target("ToyConnector", "harness.toy", Plug(SKIP, adapter, adapter), extra)


@pytest.mark.parametrize("first", range(0, 100, 20))
def test_a_right_connector_passes(first: int) -> None:
    """The scenarios put it to the test: it hits, it is preempted, its blocks are reused while it still reads them."""
    totals = passes(toy(), range(first, first + 20))
    for name in ("hits", "loads", "stores", "preemptions", "flushes", "held_jobs", "resets", "aborts"):
        assert totals[name], f"no {name} in twenty scenarios: {totals}"


ONE_GROUP = PLAIN | {"window": None}
TWO_GROUPS = PLAIN | {"window": 6, "only_windows": False, "load": "async", "chunk_blocks": 1}

CASES: dict[str, tuple[dict[str, Any], str]] = {
    "prompt_only": (ONE_GROUP | {"prefix_caching": False}, "P5"),
    "consumed_lookup": (ONE_GROUP, "P5"),
    "stale_hit": (ONE_GROUP, "P5"),
    "appended_blocks": (ONE_GROUP, "P1"),
    "no_flush": (ONE_GROUP | {"hold": 0.7}, "P2"),
    "no_window_fence": (TWO_GROUPS | {"hold": 0.7}, "P2"),
    "null_blocks": (TWO_GROUPS | {"chunk_blocks": 3, "prefix_caching": True}, "P1"),
    "sync_poison": (ONE_RANK_FAILS, "P3"),
    "session_leak": (ONE_GROUP, "P0"),
    "load_into_local": (ONE_GROUP | {"prefix_caching": True}, "P1"),
    "load_twice": (ONE_GROUP | {"load": "async"}, "P1"),
    "uncomputed": (ONE_GROUP, "P1"),
    "lost_report": (ONE_GROUP | {"load": "async"}, "P0"),
    "whole_prompt_sync": (ONE_GROUP | {"load": "sync"}, "P5"),
    "whole_prompt_window": (TWO_GROUPS | {"window": 9}, "P3"),
    "blocks_of_a_window": (ONE_WINDOW_FAILS, "P3"),
    "raises": (ONE_GROUP | {"load": "async"}, "raised"),
}
"""Of each mistake: scenarios in which it shows, and the obligation that it breaks."""


def test_every_mistake_has_a_case() -> None:
    assert set(CASES) == set(MISTAKES)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_caught(mistake: str) -> None:
    """It is caught within a few seeds, and the same scenarios without the mistake are in order."""
    overrides, rule = CASES[mistake]
    is_caught(toy(mistake), overrides | {"step_limit": 300, "patience": 200}, {rule})
    passes(toy(), range(3), overrides)


@pytest.mark.parametrize("hold", [0.3, 1.0])
def test_poison_shows_what_a_missing_fence_does(hold: float) -> None:
    """It breaks more than a rule: the second pass reads bytes that the blocks' new owner wrote."""
    is_caught(toy("no_flush"), ONE_GROUP | {"hold": hold, "prefix_caching": False}, {"P2", "P3"})
