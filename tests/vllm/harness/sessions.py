"""Watches the native lookup adapter: one lookup per admission, one end per session, nothing left over (P0, P5)."""

from typing import Any

from .ledger import Ledger


class RecordingSchedulerAdapter:
    """Looks like `kvring.PollingSchedulerAdapter`."""

    def __init__(self, inner: Any, ledger: Ledger) -> None:
        self._inner = inner
        self._ledger = ledger
        self.sessions: set[str] = set()
        """Sessions that are open."""
        self.ended: dict[str, int] = {}
        self._asked: dict[str, tuple[int, int]] = {}
        """Request -> (our admission, the connector's)."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def lookup(self, request: str, admission: int, keys: Any, *more: Any, **options: Any) -> Any:
        """See `PollingSchedulerAdapter.lookup`."""
        self._begin(request, admission)
        return self._inner.lookup(request, admission, keys, *more, **options)

    def end_session(self, request: str) -> None:
        """See `end_session`."""
        self.ended[request] = self.ended.get(request, 0) + 1
        self.sessions.discard(request)
        self._inner.end_session(request)

    def _begin(self, request: str, admission: int) -> None:
        if self.ended.get(request):
            self._ledger.blame("P0", f"a lookup for {request} after the end of its session")
        self.sessions.add(request)
        record = self._ledger.admissions.get(request)
        ours = record.number if record is not None else 0
        before = self._asked.get(request)
        if before is not None and (before[0] == ours) != (before[1] == admission):
            self._ledger.blame(
                "P5",
                f"lookup of {request}: admission {admission} after {before[1]}, but it is "
                + ("the same one" if before[0] == ours else "another one"),
            )
        self._asked[request] = (ours, admission)

    def check(self) -> None:
        """At the end of everything."""
        for request in sorted(self.sessions):
            self._ledger.blame("P0", f"the session of {request} was never ended")
        for request, times in sorted(self.ended.items()):
            if times > 1:
                self._ledger.blame("P0", f"the session of {request} was ended {times} times")
        left = self._inner.open_sessions()
        if left:
            self._ledger.blame("P0", f"{left} sessions are open at the end")
