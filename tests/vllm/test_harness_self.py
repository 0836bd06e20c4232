"""The harness judges a right connector right, and catches each mistake that it is there for."""

import itertools
import logging
from typing import Any

import pytest
from harness.driver import Plug
from harness.scenario import Report, Target, run_scenario
from harness.toy import MISTAKES
from harness.toy_native import SKIP

_names = itertools.count()
_side = lambda connector: (connector.side, "adapter")  # noqa: E731


def toy(mistake: str = "") -> Target:
    """The toy connector; each run gets a cache of its own."""

    def extra(choices: dict[str, Any]) -> dict[str, Any]:
        return {
            "toy.engine": f"engine{next(_names)}",
            "toy.chunk_blocks": choices["chunk_blocks"],
            "toy.load": choices["load"],
            "toy.mistake": mistake,
        }

    return Target("ToyConnector", "harness.toy", Plug(SKIP, _side, _side), extra)


@pytest.fixture(autouse=True)
def quiet() -> None:
    """vLLM logs every failed load as an error: here they are wanted."""
    logging.getLogger("vllm").setLevel(logging.CRITICAL)


@pytest.mark.parametrize("first", range(0, 100, 20))
def test_a_right_connector_passes(first: int) -> None:
    """And is really put to the test: it hits, it is preempted, its blocks are reused while it still reads them."""
    totals: dict[str, int] = {}
    for seed in range(first, first + 20):
        report = run_scenario(toy(), seed)
        assert not report.violations, report
        for name, count in report.counters.items():
            totals[name] = totals.get(name, 0) + count
    for name in ("hits", "loads", "stores", "preemptions", "flushes", "held_jobs", "resets", "aborts"):
        assert totals.get(name), f"no {name} in twenty scenarios: {totals}"


PLAIN: dict[str, Any] = {"theme": "plain", "aborts": 0.0, "resets": False, "fail_load": 0.0}
ONE_GROUP: dict[str, Any] = PLAIN | {"window": None}
TWO_GROUPS: dict[str, Any] = PLAIN | {"window": 6, "only_windows": False, "load": "async", "chunk_blocks": 1}
ONE_WINDOW: dict[str, Any] = TWO_GROUPS | {
    "only_windows": True,
    "theme": "fail",
    "fail_load": 0.5,
    "fail_rank": None,
    "failure_policy": "recompute",
}
SYNC: dict[str, Any] = ONE_GROUP | {"load": "sync"}
ONE_RANK_FAILS: dict[str, Any] = SYNC | {
    "theme": "fail",
    "fail_load": 0.5,
    "fail_rank": 1,
    "parallel": (2, 1),
    "failure_policy": "recompute",
    "prefix_caching": False,
    "async_scheduling": False,
    "max_batched": 48,
    "policy": "fcfs",
    "hold": 0.0,
}

CASES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "prompt_only": (ONE_GROUP | {"prefix_caching": False}, {"P5"}),
    "consumed_lookup": (ONE_GROUP, {"P5"}),
    "stale_hit": (ONE_GROUP, {"P5"}),
    "appended_blocks": (ONE_GROUP, {"P1"}),
    "no_flush": (ONE_GROUP | {"hold": 0.7}, {"P2"}),
    "no_window_fence": (TWO_GROUPS | {"hold": 0.7}, {"P2"}),
    "null_blocks": (TWO_GROUPS | {"chunk_blocks": 3, "prefix_caching": True}, {"P1"}),
    "sync_poison": (ONE_RANK_FAILS, {"P3"}),
    "session_leak": (ONE_GROUP, {"P0"}),
    "load_into_local": (ONE_GROUP | {"prefix_caching": True}, {"P1"}),
    "load_twice": (ONE_GROUP | {"load": "async"}, {"P1"}),
    "uncomputed": (ONE_GROUP, {"P1"}),
    "lost_report": (ONE_GROUP | {"load": "async"}, {"P0"}),
    "whole_prompt_sync": (SYNC, {"P5"}),
    "whole_prompt_window": (TWO_GROUPS | {"window": 9}, {"P3"}),
    "blocks_of_a_window": (ONE_WINDOW, {"P3"}),
    "raises": (ONE_GROUP | {"load": "async"}, {"raised"}),
}


def test_every_mistake_has_a_case() -> None:
    """Nothing is forgotten."""
    assert set(CASES) == set(MISTAKES)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_caught(mistake: str) -> None:
    """Within a few seeds, under the obligation that it breaks."""
    overrides, rules = CASES[mistake]
    reports: list[Report] = []
    for seed in range(40):
        report = run_scenario(toy(mistake), seed, overrides | {"step_limit": 300, "patience": 200})
        reports.append(report)
        if rules <= report.rules:
            return
    caught = sorted({rule for report in reports for rule in report.rules})
    raise AssertionError(f"{mistake} was not caught as {sorted(rules)} in 40 seeds, only as {caught}")


@pytest.mark.parametrize("mistake", MISTAKES)
def test_it_is_the_mistake_that_is_caught(mistake: str) -> None:
    """The same scenarios without the mistake are in order."""
    overrides, _ = CASES[mistake]
    for seed in range(3):
        report = run_scenario(toy(), seed, overrides)
        assert not report.violations, report


@pytest.mark.parametrize("hold", [0.3, 1.0])
def test_poison_shows_what_a_missing_fence_does(hold: float) -> None:
    """Not only the rule is broken: the second pass reads what the blocks' new owner wrote."""
    for seed in range(40):
        report = run_scenario(toy("no_flush"), seed, ONE_GROUP | {"hold": hold, "prefix_caching": False})
        if {"P2", "P3"} <= report.rules:
            return
    raise AssertionError("no wrong KV in 40 seeds")
