"""What tests of single edges share: one engine, a harness made by hand, faults put into one call."""

import itertools
import logging
import os
from typing import Any

from waiting import PATIENT, wait_for

import kvring
from harness import config as configs
from harness.driver import Harness, Plug, Wanted
from harness.jobs import Faults
from harness.scenario import Target
from kvring.vllm.adapters import salted

logging.getLogger("vllm").setLevel(logging.CRITICAL)
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


def extra(name: str, **more: Any) -> dict[str, Any]:
    return {"kvring.name": name, "kvring.copy_threads": 1} | PATIENT | {f"kvring.{key}": value for key, value in more.items()}


def harness(
    name: str,
    *,
    faults: Faults | None = None,
    chunk_blocks: int = 1,
    options: dict[str, Any] | None = None,
    connector: tuple[str, str] = ("kvring.vllm", "KvringConnector"),
    **setup: Any,
) -> Harness:
    made = configs.Setup(
        connector=connector[1],
        connector_module=connector[0],
        extra=extra(name, chunk_blocks=chunk_blocks, **(options or {})),
        nonce=f"edge-{os.getpid()}-{next(_numbers)}",
        **setup,
    )
    ready = Harness(made, PLUG, chunk_blocks=chunk_blocks, faults=faults, seed=1)
    wait_for(ready.scheduler.connector.scheduler.adapter.is_healthy, "the scheduler is attached")
    return ready


def target(name: str, watch: Any = lambda harness: None) -> Target:
    """As the suite's, but an error that the guard catches is no violation by itself."""

    def options(choices: dict[str, Any]) -> dict[str, Any]:
        return extra(name, chunk_blocks=choices["chunk_blocks"], load=choices["load"], lookup=choices["lookup"])

    return Target("KvringConnector", "kvring.vllm", PLUG, options, None, None, watch)


def want(name: str, prompt: list[int], tokens: int = 4, **more: Any) -> Wanted:
    return Wanted(name, prompt, tokens, **more)
