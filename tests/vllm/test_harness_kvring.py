"""The kvring connector under the harness: random scenarios by seed, the real engine, the real adapters.

`KVRING_SOAK=N` runs N seeds instead of the quick suite's; `KVRING_SEED=S` runs one, with its step log.
"""

import itertools
import logging
import os
import traceback
from collections.abc import Iterator
from typing import Any

import pytest

kvring = pytest.importorskip("kvring")
pytest.importorskip("kvring.vllm", exc_type=ImportError)

from harness.driver import Harness  # noqa: E402
from harness.scenario import Target, run_scenario  # noqa: E402
from harness.support import PLUG  # noqa: E402
from waiting import PATIENT, wait_for  # noqa: E402

import kvring.vllm.guard as guard  # noqa: E402
from kvring.vllm.geometry import Geometry  # noqa: E402
from kvring.vllm.scheduler import SchedulerSide  # noqa: E402
from kvring.vllm.stores import OpenStore, OpenStores  # noqa: E402
from kvring.vllm.tracker import Tracker  # noqa: E402

QUICK = 40
BATCH = 10
SEEDS = int(os.environ.get("KVRING_SOAK", QUICK))
ONE = os.environ.get("KVRING_SEED")


_numbers = itertools.count()


class Engines:
    """The engine under a batch of scenarios; killed and started anew where one wants it. Each scenario has a namespace of
    its own, and an engine has room for so many."""

    def __init__(self) -> None:
        self.name = f"harness-{os.getpid()}-{next(_numbers)}"
        self.engine: Any = None

    def start(self) -> None:
        """Starts one, unless one runs."""
        if self.engine is None or not self.engine.is_running:
            self.engine = kvring.Engine(self.name, "64MiB").start()

    def kill(self) -> None:
        """As `kill -9`."""
        if self.engine is not None and self.engine.is_running:
            os.kill(self.engine.pid, 9)
            wait_for(lambda: not self.engine.is_running, "the engine is dead")

    def stop(self) -> None:
        """At the end."""
        if self.engine is not None:
            self.engine.stop()


@pytest.fixture
def engines() -> Iterator[Engines]:
    """For a batch."""
    engines = Engines()
    engines.start()
    yield engines
    engines.stop()


@pytest.fixture(autouse=True)
def quiet() -> None:
    """vLLM logs every failed load as an error: here they are wanted."""
    logging.getLogger("vllm").setLevel(logging.CRITICAL)


def target(engines: Engines, monkeypatch: pytest.MonkeyPatch) -> Target:
    """The connector. It raises nothing by itself, so what it has caught is a violation too."""

    def extra(choices: dict[str, Any]) -> dict[str, Any]:
        return {
            "kvring.name": engines.name,
            "kvring.chunk_blocks": choices["chunk_blocks"],
            "kvring.load": choices["load"],
            "kvring.lookup": choices["lookup"],
            "kvring.copy_threads": 1,
            **PATIENT,
        }

    def watch(harness: Harness) -> None:
        def tell(where: str, error: Exception) -> None:
            frames = " < ".join(
                f"{f.filename.rsplit('/', 1)[-1]}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)[::-1]
            )
            harness.ledger.blame("raised", f"caught in {where}: {type(error).__name__}: {error} ({frames})")

        monkeypatch.setattr(guard, "_tell", tell)

    return Target("KvringConnector", "kvring.vllm", PLUG, extra, engines.kill, engines.start, watch)


@pytest.mark.parametrize("first", range(0, SEEDS, BATCH) if ONE is None else [int(ONE)])
def test_scenarios(first: int, engines: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    """P0-P5 hold."""
    failed = []
    totals: dict[str, int] = {}
    for seed in range(first, min(first + BATCH, SEEDS)) if ONE is None else [first]:
        engines.start()
        report = run_scenario(target(engines, monkeypatch), seed)
        for name, count in report.counters.items():
            totals[name] = totals.get(name, 0) + count
        if ONE is not None:
            print("\n".join(report.log))
        if report.violations:
            failed.append(report)
    print(f"seeds from {first}: {totals}")
    assert not failed, "\n\n".join(str(report) for report in failed[:3]) + f"\n\nseeds {[one.seed for one in failed]}"
    assert ONE is not None or (totals.get("hits") and totals.get("stores")), totals


PLAIN: dict[str, Any] = {"theme": "plain", "aborts": 0.0, "resets": False, "fail_load": 0.0, "hold": 0.7}


ONE_WINDOW_FAILS: dict[str, Any] = PLAIN | {
    "theme": "fail",
    "window": 9,
    "only_windows": True,
    "chunk_blocks": 1,
    "fail_load": 0.5,
    "fail_rank": None,
    "failure_policy": "recompute",
}


def test_failed_loads_of_a_model_whose_only_kv_group_is_a_window(engines: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM computes such a request again from its first token, or it would look back at blocks that nobody has filled."""
    failed = 0
    for seed in range(4):
        report = run_scenario(target(engines, monkeypatch), seed, ONE_WINDOW_FAILS)
        assert not report.violations, report
        failed += report.counters.get("failed_loads", 0)
    assert failed, "no load has failed: this test tests nothing"


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


MISTAKES: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no fence": (_no_fence, PLAIN | {"window": None, "slack_blocks": 0}, "P2"),
    "no fence for window blocks": (_no_window_fence, PLAIN | {"window": 6, "chunk_blocks": 1}, "P2"),
    "the blocks of a window named that a load has not brought": (_names_blocks_of_a_window, ONE_WINDOW_FAILS, "P3"),
    "blocks given back while they are read": (_blocks_given_back_early, PLAIN | {"window": None}, "P2"),
    "blocks let go while they are read": (_let_go_without_a_flush, PLAIN | {"window": None, "slack_blocks": 0}, "P2"),
    "an earlier admission's hit": (_stale_hit, PLAIN | {"window": None, "prefix_caching": False, "slack_blocks": 0}, "P5"),
    "one rank's failed synchronous load ignored": (
        _poison,
        PLAIN
        | {
            "theme": "fail",
            "window": None,
            "load": "sync",
            "fail_load": 0.5,
            "fail_rank": 1,
            "parallel": (2, 1),
            "failure_policy": "recompute",
            "prefix_caching": False,
            "async_scheduling": False,
            "max_batched": 48,
            "policy": "fcfs",
            "hold": 0.0,
        },
        "P3",
    ),
    "the whole prompt, with a window": (_whole_prompt, PLAIN | {"window": 9, "chunk_blocks": 1}, "P3"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_it_is_caught(mistake: str, engines: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the connector itself, not only in the toy."""
    spoil, overrides, rule = MISTAKES[mistake]
    spoil(monkeypatch)
    seen: set[str] = set()
    for seed in range(40):
        engines.start()
        report = run_scenario(target(engines, monkeypatch), seed, overrides | {"patience": 2_000})
        seen |= report.rules
        if rule in report.rules:
            return
    raise AssertionError(f"not caught as {rule} in 40 seeds, only as {sorted(seen)}")
