"""All that kvring logs in Python's process goes through here: each line begins with `kvring:`, since vLLM's log shows neither the
logger's name nor the package.

A thread of its own forwards what the adapters log, so that no thread that logs in Rust waits for the interpreter.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any

from . import _native

if TYPE_CHECKING:
    _Adapter = logging.LoggerAdapter[logging.Logger]
else:
    _Adapter = logging.LoggerAdapter

PREFIX = "kvring: "
_HOUR_MS = 3_600_000.0
_lock = threading.Lock()
_thread: threading.Thread | None = None
_pid = 0
_closing = threading.Event()


class Logger(_Adapter):
    """A logger whose lines all name kvring."""

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        """Puts the prefix before a line; `LoggerAdapter` calls it for each."""
        return f"{PREFIX}{msg}", kwargs


def get_logger(name: str) -> Logger:
    """Returns a logger of that name. For use in place of `logging.getLogger`, which ruff refuses in this package."""
    return Logger(logging.getLogger(name))


def share_handlers(name: str) -> None:
    """Sends the adapters' log where that logger's lines go, at its level; but without the adapters' lines for each lookup and
    each copy, because the integration writes its own."""
    ours, theirs = logging.getLogger("kvring"), logging.getLogger(name)
    if not ours.handlers:
        ours.handlers = theirs.handlers
        ours.propagate = theirs.propagate
        ours.setLevel(theirs.level)
    _native.set_log_level(max(theirs.getEffectiveLevel(), logging.INFO))


def ensure() -> None:
    """Starts this process's forwarding thread, if there is none yet. Called before a process makes its first adapter. A forked
    child gets a thread of its own."""
    global _lock, _thread, _pid
    pid = os.getpid()
    if _pid == pid:
        return
    with _lock:
        if _pid == pid:
            return
        first = _pid == 0
        _thread = threading.Thread(target=_forward, name="kvring-logs", daemon=True)
        _thread.start()
        _pid = pid
        if first:
            atexit.register(_end)
            # The parent's lock may be held while it forks.
            os.register_at_fork(after_in_child=_forget)


def _forget() -> None:
    global _lock, _thread
    _lock = threading.Lock()
    _thread = None


def _forward() -> None:
    while (records := _native.next_logs(_HOUR_MS)) or not _closing.is_set():
        for level, target, text in records:
            try:
                get_logger(target).log(level, "%s", text.strip())
            except Exception:
                # A handler that fails must not end the thread; `logging` has its own way of saying so.
                pass


def _end() -> None:
    """Ends the thread at exit, while there is still an interpreter to forward to."""
    if _pid == os.getpid() and _thread is not None:
        _closing.set()
        _native.close_logs()
        _thread.join()
