"""An exception at any place inside the connector: vLLM lives, every request ends, nothing leaks, no wrong KV.

Each case raises once, at the n-th call of one internal method, in a handful of random scenarios.
"""

import os
from collections.abc import Iterator
from typing import Any

import pytest
from harness.jobs import RecordingWorkerAdapter
from harness.scenario import run_scenario
from harness.sessions import RecordingSchedulerAdapter
from harness.support import target
from waiting import FOREVER_MS

import kvring
import kvring.vllm.guard as guard
from kvring.vllm.geometry import Geometry
from kvring.vllm.scheduler import SchedulerSide
from kvring.vllm.stores import OpenStores
from kvring.vllm.worker import WorkerSide

SEEDS = [int(seed) for seed in os.environ.get("KVRING_FAULT_SEEDS", "0,1,2,3").split(",")]
NTHS = [int(nth) for nth in os.environ.get("KVRING_FAULT_NTHS", "2").split(",")]

PLACES: dict[type, list[str]] = {
    SchedulerSide: [
        "get_num_new_matched_tokens", "_track", "_lookup", "_ask", "update_state_after_alloc", "build_connector_meta", "_store",
        "_key", "has_given_blocks", "_spoilt", "request_finished", "_forget_if_over", "update_connector_output", "_load_ended",
        "_store_ended", "reset_cache", "vllm_was_reset", "_job",
    ],
    OpenStores: ["add", "fence", "_owns_blocks", "pin", "let_go", "let_go_in_time", "close"],
    Geometry: ["to_store", "to_load"],
    WorkerSide: [
        "flush", "start_loads", "_start_load", "_load_failed", "start_stores", "_start_store", "collect", "_store_finished",
        "_load_finished", "_load_ended", "_count", "_log", "take_transfer_results", "take_invalid_blocks", "take_worker_meta",
    ],
    RecordingWorkerAdapter: [
        "submit_store", "submit_load", "get_finished", "get_block_ids_with_load_errors", "flush", "wait_job", "wait_some",
    ],
    RecordingSchedulerAdapter: ["lookup", "is_current", "end_session", "free_lookup_locks", "is_healthy", "lookup_stats"],
}  # fmt: skip

AFTER_IS_IMPOSSIBLE = {
    "submit_store", "submit_load", "get_finished", "build_connector_meta", "_start_store", "_start_load", "take_transfer_results",
    "take_worker_meta", "take_invalid_blocks",
}  # fmt: skip
"""Calls that end with their effect: nothing is left in them that could raise afterwards."""

CASES = [
    pytest.param(owner, name, when, id=f"{owner.__name__}.{name}-{when}")
    for owner, names in PLACES.items()
    for name in names
    for when in ("before", "after")
    if when == "before" or name not in AFTER_IS_IMPOSSIBLE
]


def _spoil(patch: pytest.MonkeyPatch, owner: type, name: str, nth: int, after: bool) -> list[int]:
    calls = [0]
    inner = getattr(owner, name, None)

    def once(self: Any, *arguments: Any, **named: Any) -> Any:
        calls[0] += 1
        do = inner if inner is not None else lambda self, *a, **n: getattr(self._inner, name)(*a, **n)
        if calls[0] != nth:
            return do(self, *arguments, **named)
        if after:
            do(self, *arguments, **named)
        raise RuntimeError(f"injected into {name}")

    patch.setattr(owner, name, once, raising=False)
    return calls


@pytest.fixture(scope="module")
def shared() -> Iterator[kvring.Engine]:
    with kvring.Engine(f"faults-{os.getpid()}", "64MiB", start_timeout_s=FOREVER_MS / 1000) as started:
        yield started


@pytest.mark.parametrize("nth", NTHS)
@pytest.mark.parametrize(("owner", "name", "when"), CASES)
def test_an_error_inside_costs_nobody_anything(
    owner: type, name: str, when: str, nth: int, shared: kvring.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    hit = 0
    bad = []
    monkeypatch.setattr(guard, "_tell", lambda where, error: None)
    for seed in SEEDS:
        with monkeypatch.context() as patch:
            calls = _spoil(patch, owner, name, nth, when == "after")
            report = run_scenario(target(shared), seed, {"theme": "plain", "aborts": 0.05, "kill_at": None})
        hit += calls[0] >= nth
        # What an error costs may well be a hit (P5). And where it is not known whether a session was ended, or a chunk stored, it
        # is done once more.
        allowed = ("was ended 2 times", " were stored in admission ")
        wrong = [one for one in report.violations if one.rule != "P5" and not any(text in str(one) for text in allowed)]
        if wrong:
            where = f"seed {seed} ({report.choices['load']}, window {report.choices['window']})"
            bad.append(f"{where}: " + "; ".join(str(one) for one in wrong[:3]))
    if not hit:
        pytest.skip("never called in these scenarios")
    assert not bad, "\n".join(bad)
