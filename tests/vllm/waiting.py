"""Waiting by state. Nothing here has a limit by the clock, which a slow machine would meet. `tests/watch` ends a test that hangs,
and by then the test has said what it waits for."""

import sys
import time
from collections.abc import Callable

FOREVER_MS = 86_400_000.0
"""As good as for ever: the deadline of a call that is not to end by its deadline."""

PATIENT = {
    f"kvring.{option}": FOREVER_MS
    for option in (
        "attach_timeout_ms",
        "flush_timeout_ms",
        "operation_timeout_ms",
        "register_timeout_ms",
        "stall_after_ms",
    )
}
"""kvring's options for tests that expect hits. Where the engine has to wait for a core, an answer may take longer than users
would wait, and with their deadlines it would come too late: a chunk would not be stored, or an engine would count as stalled."""


def wait_for(condition: Callable[[], object], what: str) -> None:
    """Waits until `condition()` is true. It looks the seldomer the longer it takes, so `tests/watch` sees it stand still."""
    looks = 0
    while not condition():
        looks += 1
        if looks % 1000 == 0:
            print(f"still waiting, after {looks} looks: {what}", file=sys.__stderr__, flush=True)
        time.sleep(min(0.001 * (1 + looks // 50), 0.1))
