"""What the tests of kvring's connector in the harness share."""

import itertools
import os
from collections.abc import Callable, Mapping
from typing import Any

from waiting import PATIENT, wait_for

import kvring
import kvring.vllm.worker as worker_module
from harness import config as configs
from harness.driver import Harness, Plug, Wanted
from harness.jobs import Faults
from harness.scenario import Target
from kvring.vllm.adapters import salted
from kvring.vllm.config import Config
from kvring.vllm.geometry import Geometry, Group
from kvring.vllm.worker import WorkerSide

PROMPT = list(range(10, 74))
"""16 blocks."""

_numbers = itertools.count()


def _salt(connector: Any, request: str) -> bytes | None:
    tracker = connector.scheduler.trackers.get(request)
    return None if tracker is None else tracker.salt


PLUG = Plug(
    kvring.SKIP,
    lambda connector: (connector.worker, "adapter"),
    lambda connector: (connector.scheduler, "adapter"),
    slack=3,
    idle_s=0.001,
    salt=_salt,
    salted=salted,
    loaded=lambda connector, lora: connector.worker.adapters.loaded(lora, b"adapter's salt..", ""),
)


def extra(engine: kvring.Engine, **more: Any) -> dict[str, Any]:
    options = {f"kvring.{key}": value for key, value in more.items()}
    return {"kvring.name": engine.name, "kvring.copy_threads": 1} | PATIENT | options


def harness(
    engine: kvring.Engine,
    *,
    faults: Faults | None = None,
    chunk_blocks: int = 1,
    options: Mapping[str, Any] | None = None,
    connector: tuple[str, str] = ("kvring.vllm", "KvringConnector"),
    num_blocks: int = 60,
    attached: bool = True,
    **setup: Any,
) -> Harness:
    """A harness whose requests are added by hand. Not `attached`: there need not be an engine."""
    made = configs.Setup(
        connector=connector[1],
        connector_module=connector[0],
        extra=extra(engine, chunk_blocks=chunk_blocks, **(options or {})),
        nonce=f"edge-{os.getpid()}-{next(_numbers)}",
        num_blocks=num_blocks,
        **setup,
    )
    ready = Harness(made, PLUG, chunk_blocks=chunk_blocks, faults=faults, seed=1)
    if attached:
        wait_for(ready.scheduler.connector.scheduler.adapter.is_healthy, "the scheduler is attached")
    return ready


def run(made: Harness, name: str, prompt: list[int], tokens: int = 2) -> None:
    """A request from its arrival to its end, with whatever else there is."""
    made.add(Wanted(name, prompt, tokens))
    made.run(300)


def forget(made: Harness) -> None:
    """vLLM forgets its own prefix cache."""
    made.reset(running=False, connector=False)


def ends(made: Harness) -> None:
    """Everything that is under way ends; nothing is left over, every answer is right, and no obligation was broken."""
    made.run(300)
    made.check_idle(last=True)
    made.check_outputs()
    made.shutdown()
    is_right(made)


def is_right(made: Harness) -> None:
    """No obligation was broken so far."""
    assert not made.ledger.violations, "\n".join(made.ledger.log)


def target(
    engine: kvring.Engine, watch: Callable[[Harness], None] = lambda harness: None, options: Mapping[str, Any] | None = None
) -> Target:
    """The connector for one random scenario, with an engine that runs; where the scenario wants it, that is killed, and started
    again."""

    def of(choices: dict[str, Any]) -> dict[str, Any]:
        chosen = {name: choices[name] for name in ("chunk_blocks", "load")}
        return extra(engine, **chosen, **(options or {}))

    def restart() -> None:
        if not engine.is_running:
            engine.start()

    restart()
    return Target("KvringConnector", "kvring.vllm", PLUG, of, engine.kill, restart, watch)


class Recorder:
    """In the place of a worker's native adapter: writes down what it is asked, and answers at once.

    `raises`: an error, by the name of the call that is to raise it."""

    def __init__(self, *_: Any, **options: Any) -> None:
        self.options = options
        self.calls: list[tuple[str, Any]] = []
        self.raises: dict[str, Exception] = {}
        self.shard_bytes = 0

    def _called(self, name: str, what: Any) -> int:
        if name in self.raises:
            raise self.raises[name]
        self.calls.append((name, what))
        return len(self.calls)

    def health(self) -> str:
        return "healthy"

    def register_kv_caches(self, groups: Any, owner: Any, device: int | None) -> None:
        self._called("register", device)

    def submit_store(self, *_: Any, stream: int | None) -> int:
        return self._called("store", stream)

    def submit_load(self, *_: Any, stream: int | None) -> int:
        return self._called("load", stream)

    def wait_job(self, job: int, timeout_ms: float) -> bool:
        return self._called("wait", job) > 0

    def get_finished(self) -> list[Any]:
        self._called("finished", None)
        return []

    def handle_preemptions(self, requests: Any) -> None:
        self._called("flush", requests)


def worker_side(patch: Any, *, options: Mapping[str, Any] | None = None, **more: Any) -> tuple[WorkerSide, Recorder]:
    """A worker's side of the connector without an engine: with a `Recorder`, and one KV group of blocks of 16 tokens."""
    patch.setattr(worker_module, "WorkerAdapter", Recorder)
    geometry = Geometry((Group("full_attention", 16, 1, None),), 16, 16, 1, 1, 0)
    made = WorkerSide(Config.parse(dict(options or {})), geometry, bytes(32), 0, **more)
    recorder: Any = made.adapter
    return made, recorder
