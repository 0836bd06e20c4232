"""Forwards what the adapters say to `logging`, on a thread of its own: nobody who logs in Rust waits for the interpreter."""

import atexit
import logging
import os
import threading

from . import _native

_HOUR_MS = 3_600_000.0
_lock = threading.Lock()
_thread: threading.Thread | None = None
_pid = 0
_closing = threading.Event()


def ensure() -> None:
    """Called before a process makes its first adapter: its thread runs from then on. A forked child gets its own."""
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
                logging.getLogger(target).log(level, "%s", text.strip())
            except Exception:
                # A handler that fails must not end the thread; `logging` has its own way of saying so.
                pass


def _end() -> None:
    """At exit, while there is still an interpreter to forward to."""
    if _pid == os.getpid() and _thread is not None:
        _closing.set()
        _native.close_logs()
        _thread.join()
