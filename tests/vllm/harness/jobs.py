"""Stands between the connector and its native adapters: records, delays, fails.

A *held* store is submitted to the real adapter only when it is flushed or released, so that a connector that forgets a
fence really stores garbage. A *failed* load is never submitted: its blocks keep their poison, as after a real failure.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .ledger import Ledger


@dataclass
class Finished:
    """As `kvring.Finished`, with the job's number as the connector knows it."""

    job: int
    request: str
    is_store: bool
    done: int = 0
    skipped: int = 0
    failed: int = 0
    why: dict[str, int] = field(default_factory=dict)
    bytes: int = 0
    seconds: float = 0.0


@dataclass
class Faults:
    """The mishaps of a scenario, and how likely each is."""

    hold: float = 0.0
    """Chance that a job is held for some steps."""
    hold_steps: tuple[int, int] = (1, 6)
    """At least, at most."""
    fail_load: float = 0.0
    fail_store: float = 0.0
    fail_rank: int | None = None
    """Only on this rank."""
    budget: int = 1 << 30
    """The number of failures in a scenario, at most."""


@dataclass
class _Held:
    job: int
    steps: int
    submit: Callable[[], int]
    is_store: bool
    request: str


class RecordingWorkerAdapter:
    """Looks like `kvring.WorkerAdapter`; everything that is not about jobs goes straight through."""

    def __init__(
        self,
        inner: Any,
        rank: int,
        ledger: Ledger,
        faults: Faults,
        dice: random.Random,
        computed: Callable[[str], int],
    ) -> None:
        self._inner = inner
        self._rank = rank
        self._ledger = ledger
        self._faults = faults
        self._dice = dice
        self._computed = computed
        self._next = 1
        self._held: dict[int, _Held] = {}
        self._ours: dict[int, int] = {}
        """Our number of a job, by the adapter's."""
        self._theirs: dict[int, int] = {}
        self._ended: list[Finished] = []
        self._bad_blocks: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    # -- submitting ----------------------------------------------------------------------------------------------------

    def submit_store(
        self,
        request: str,
        round: tuple[int, int],
        keys: Sequence[bytes],
        blocks: Sequence[int],
        parent: bytes | None = None,
        **stream: int | None,
    ) -> int:
        """See `WorkerAdapter.submit_store`."""
        keys, blocks = list(keys), list(blocks)
        job = self._number()
        self._ledger.store(self._rank, job, request, tuple(round), keys, blocks, parent, self._computed(request))
        if self._fails(self._faults.fail_store):
            self._ledger.count("failed_stores")
            self._ended.append(Finished(job, request, True, failed=len(keys), why={"injected": len(keys)}))
            # This rank stores nothing, so the round is never complete.
            return job
        self._submit(job, True, request, lambda: self._inner.submit_store(request, round, keys, blocks, parent, **stream))
        return job

    def submit_load(self, request: str, handles: bytes, blocks: Sequence[int], **stream: int | None) -> int:
        """See `WorkerAdapter.submit_load`."""
        blocks = list(blocks)
        job = self._number()
        self._ledger.load(self._rank, job, request, blocks)
        if self._fails(self._faults.fail_load):
            self._ledger.count("failed_loads")
            self._ledger.note(f"rank {self._rank} load {job} of {request} will fail")
            chunks = max(1, len(blocks) // (self._ledger.groups * self._ledger.chunk_blocks))
            self._ended.append(Finished(job, request, False, failed=chunks, why={"injected": chunks}))
            self._bad_blocks += [block for block in blocks if block not in (0, self._ledger.skip)]
            return job
        self._submit(job, False, request, lambda: self._inner.submit_load(request, handles, blocks, **stream))
        return job

    def _submit(self, job: int, is_store: bool, request: str, submit: Callable[[], int]) -> None:
        if self._dice.random() < self._faults.hold:
            self._held[job] = _Held(job, self._dice.randint(*self._faults.hold_steps), submit, is_store, request)
            self._ledger.count("held_jobs")
        else:
            self._link(job, submit())

    def _link(self, job: int, theirs: int) -> None:
        self._ours[theirs] = job
        self._theirs[job] = theirs

    def _number(self) -> int:
        self._next += 1
        return self._next - 1

    def _fails(self, chance: float) -> bool:
        if self._faults.fail_rank not in (None, self._rank) or self._faults.budget <= 0:
            return False
        if self._dice.random() >= chance:
            return False
        self._faults.budget -= 1
        return True

    # -- ending --------------------------------------------------------------------------------------------------------

    def tick(self) -> None:
        """A step has passed: held jobs come closer to their start."""
        for held in list(self._held.values()):
            held.steps -= 1
            if held.steps <= 0:
                self._release(held.job)

    def _release(self, job: int) -> None:
        held = self._held.pop(job, None)
        if held is not None:
            self._link(job, held.submit())

    def release_all(self) -> None:
        """Nothing is held any more."""
        for job in list(self._held):
            self._release(job)

    def get_finished(self) -> list[Finished]:
        """See `WorkerAdapter.get_finished`."""
        ended, self._ended = self._ended, []
        for theirs in self._inner.get_finished():
            job = self._ours.pop(theirs.job, None)
            if job is None:
                self._ledger.blame("harness", f"the adapter reported an unknown job {theirs.job}")
                continue
            self._theirs.pop(job, None)
            same = ("request", "is_store", "done", "skipped", "failed", "why", "bytes", "seconds")
            ended.append(Finished(job, **{name: getattr(theirs, name) for name in same}))
        for one in ended:
            self._ledger.finished(self._rank, one.job, not one.failed and not one.skipped, one.failed > 0)
            if one.failed and "injected" not in one.why:
                self._ledger.count("jobs_failed_by_engine")
        return ended

    def get_block_ids_with_load_errors(self) -> list[int]:
        """See `WorkerAdapter.get_block_ids_with_load_errors`."""
        bad, self._bad_blocks = self._bad_blocks, []
        return bad + list(self._inner.get_block_ids_with_load_errors())

    def flush(self, jobs: Sequence[int]) -> None:
        """See `WorkerAdapter.flush`."""
        jobs = list(jobs)
        for job in jobs:
            self._release(job)
        self._inner.flush([self._theirs[job] for job in jobs if job in self._theirs])
        self._ledger.flushed(self._rank, jobs)
        self._ledger.count("flushes", len(jobs))

    def handle_preemptions(self, requests: Sequence[str] | None = None) -> None:
        """See `WorkerAdapter.handle_preemptions`."""
        names = None if requests is None else list(requests)
        for held in list(self._held.values()):
            if held.is_store and (names is None or held.request in names):
                self._release(held.job)
        self._inner.handle_preemptions(names)
        jobs = [
            record.job
            for record in self._ledger.open.values()
            if record.rank == self._rank and record.is_store and (names is None or record.request in names)
        ]
        self._ledger.flushed(self._rank, jobs)

    def wait_job(self, job: int, timeout_ms: float) -> bool:
        """See `WorkerAdapter.wait_job`."""
        self._release(job)
        theirs = self._theirs.get(job)
        return True if theirs is None else self._inner.wait_job(theirs, timeout_ms)

    def wait_some(self, timeout_ms: float) -> bool:
        """See `WorkerAdapter.wait_some`."""
        self.release_all()
        return bool(self._ended) or self._inner.wait_some(timeout_ms)

    def wait_idle(self, timeout_ms: float) -> bool:
        """See `WorkerAdapter.wait_idle`."""
        self.release_all()
        return self._inner.wait_idle(timeout_ms)

    def shutdown(self) -> None:
        """See `WorkerAdapter.shutdown`."""
        self.release_all()
        self._inner.shutdown()
