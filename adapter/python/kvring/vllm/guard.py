"""Failing open: vLLM guards none of its connector's calls, so any exception in one ends vLLM. So none is raised but the one that
must end it: `DeviceError`, where a GPU may still write to blocks that vLLM uses next, and its driver no longer tells when it has
ended."""

from __future__ import annotations

import functools
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

from kvring import DeviceError
from kvring._logs import get_logger

logger = get_logger("vllm.kvring")

F = TypeVar("F", bound=Callable[..., Any])

_told: set[tuple[str, str, str]] = set()


def fail_open(instead: Callable[..., Any]) -> Callable[[F], F]:
    """Where the method raises, `instead(self, *arguments)` gives the answer with which vLLM goes on without the cache."""

    def wrap(method: F) -> F:
        @functools.wraps(method)
        def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                return method(self, *args, **kwargs)
            except DeviceError:
                raise
            except Exception as error:
                _tell(method.__name__, error)
                try:
                    self.count_error()
                    return instead(self, *args, **kwargs)
                except Exception as worse:
                    _tell(f"{method.__name__}, going on without it", worse)
                    return None

        return guarded  # type: ignore[return-value]

    return wrap


def _tell(where: str, error: Exception) -> None:
    """Logs an error, once for each kind: one that comes at every step must not fill the disk."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    at = f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno}"
    kind = (where, at, type(error).__name__)
    if kind in _told:
        return
    _told.add(kind)
    logger.error(
        "an error inside kvring, in %s at %s: %s: %s; vLLM goes on without the cache here (further ones of this kind are counted "
        "as vllm:kvring_errors only; please report it)",
        where, at, type(error).__name__, error,
    )  # fmt: skip
    logger.debug("%s", "".join(traceback.format_exception(error)))
