"""Waiting by state. Nothing here has a limit by the clock, which a slow machine would meet: what hangs is ended by
`tests/watch`, and has said by then what it waits for."""

import sys
import time
from collections.abc import Callable

FOREVER_MS = 86_400_000.0
"""As good as for ever: the deadline of whatever is not to end by its deadline."""

PATIENT = {
    f"kvring.{option}": FOREVER_MS
    for option in (
        "attach_timeout_ms",
        "flush_timeout_ms",
        "lookup_timeout_ms",
        "operation_timeout_ms",
        "pending_timeout_ms",
        "register_timeout_ms",
        "stall_after_ms",
    )
}
"""kvring's options for whoever asks for hits: where the engine has to wait for a core an answer may take longer than users
would wait, and what comes too late is not found, or not stored."""


def wait_for(condition: Callable[[], object], what: str) -> None:
    """Until `condition()`. Looks come seldomer the longer it takes: a wait in vain stands still, as `tests/watch` sees it."""
    looks = 0
    while not condition():
        looks += 1
        if looks % 1000 == 0:
            print(f"still waiting, after {looks} looks: {what}", file=sys.__stderr__, flush=True)
        time.sleep(min(0.001 * (1 + looks // 50), 0.1))
