"""The kvring connector under the harness: random scenarios by seed, the real engine, the real adapters.

`KVRING_SOAK=N` runs N seeds instead of the quick suite's; `KVRING_SEED=S` runs one, with its step log.
"""

import logging
import os
import time
import traceback
from collections.abc import Iterator
from typing import Any

import pytest

kvring = pytest.importorskip("kvring")
pytest.importorskip("kvring.vllm", exc_type=ImportError)

import kvring.vllm.guard as guard  # noqa: E402
from harness.driver import Harness, Plug  # noqa: E402
from harness.scenario import Target, run_scenario  # noqa: E402
from kvring.vllm.namespace import salted  # noqa: E402

QUICK = 40
BATCH = 10
SEEDS = int(os.environ.get("KVRING_SOAK", QUICK))
ONE = os.environ.get("KVRING_SEED")
NAME = f"harness-{os.getpid()}"


def _salt(connector: Any, request: str) -> bytes | None:
    tracker = connector.scheduler.trackers.get(request)
    return None if tracker is None else tracker.salt


class Engines:
    """The engine under all scenarios of this process; killed and started anew where a scenario wants it."""

    def __init__(self) -> None:
        self.engine: Any = None

    def start(self) -> None:
        """Starts one, unless one runs."""
        if self.engine is None or not self.engine.is_running:
            self.engine = kvring.Engine(NAME, "64MiB").start()

    def kill(self) -> None:
        """As `kill -9`."""
        if self.engine is not None and self.engine.is_running:
            os.kill(self.engine.pid, 9)
            deadline = time.monotonic() + 10
            while self.engine.is_running and time.monotonic() < deadline:
                time.sleep(0.005)

    def stop(self) -> None:
        """At the end."""
        if self.engine is not None:
            self.engine.stop()


@pytest.fixture(scope="module")
def engines() -> Iterator[Engines]:
    """One engine for all scenarios: each has a namespace of its own."""
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
            "kvring.name": NAME,
            "kvring.chunk_blocks": choices["chunk_blocks"],
            "kvring.load": choices["load"],
            "kvring.lookup": choices["lookup"],
            "kvring.lookup_timeout_ms": 1000.0,
            "kvring.copy_threads": 1,
        }

    def watch(harness: Harness) -> None:
        def tell(where: str, error: Exception) -> None:
            frames = " < ".join(f"{f.filename.rsplit('/', 1)[-1]}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)[::-1])
            harness.ledger.blame("raised", f"caught in {where}: {type(error).__name__}: {error} ({frames})")

        monkeypatch.setattr(guard, "_tell", tell)

    plug = Plug(
        kvring.SKIP,
        lambda connector: (connector.worker, "adapter"),
        lambda connector: (connector.scheduler, "adapter"),
        slack=3,
        idle_s=0.001,
        salt=_salt,
        salted=salted,
    )
    return Target("KvringConnector", "kvring.vllm", plug, extra, engines.kill, engines.start, watch)


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
