"""The messages of each step between the scheduler's side and the workers. vLLM pickles them between processes."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata, KVConnectorWorkerMetadata

from .adapters import Adapter


@dataclass(slots=True)
class Load:
    """A load: the worker copies chunks into blocks."""

    job: int
    request: str
    tokens: int
    """How many tokens vLLM counts as computed once this load has ended."""
    wait: bool
    """Does this step's forward pass wait for it (synchronous)? Else it runs between steps."""
    handles: bytes
    """The chunks, the same for all ranks. Empty where the load has failed already."""
    blocks: list[int]
    """The block ids of one chunk after the other, all groups; `SKIP` where nothing is to be written."""


@dataclass(slots=True)
class Store:
    """A store: the worker keeps chunks that this step's forward pass, or an earlier one, completes."""

    job: int
    request: str
    round: tuple[int, int]
    parent: bytes | None
    keys: list[bytes]
    blocks: list[int]
    adapter: Adapter | None = None
    """The LoRA adapter with which the KV must have been computed."""


@dataclass(slots=True)
class KvringMetadata(KVConnectorMetadata):
    """One step, from the scheduler to every worker."""

    loads: list[Load] = field(default_factory=list)
    stores: list[Store] = field(default_factory=list)
    flush: list[int] = field(default_factory=list)
    """The jobs of stores whose blocks may have a new owner: none of them may still read when the forward pass begins."""
    flush_all: bool = False
    """All stores are to be flushed, because the scheduler's side does not know which."""
    idle: bool = False
    """This step has no forward pass, so to wait for a load in it delays nothing."""


@dataclass(slots=True)
class Outcome:
    """The result of a job, on the ranks that have reported it."""

    ranks: int = 0
    chunks_failed: int = 0
    ranks_failed: int = 0

    def add(self, other: Outcome) -> None:
        """Joins two reports on the same job."""
        self.ranks += other.ranks
        self.chunks_failed += other.chunks_failed
        self.ranks_failed += other.ranks_failed


@dataclass(slots=True)
class KvringWorkerMetadata(KVConnectorWorkerMetadata):
    """One step, from a worker (or, aggregated, from all of them) to the scheduler."""

    outcomes: dict[int, Outcome] = field(default_factory=dict)
    adapters: list[Adapter] = field(default_factory=list)
    """News of LoRA adapters: those that were loaded, or are no longer known."""

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        """Joins two ranks' reports of one step; called by vLLM. Neither report is changed."""
        assert isinstance(other, KvringWorkerMetadata)
        joined = {job: Outcome(o.ranks, o.chunks_failed, o.ranks_failed) for job, o in self.outcomes.items()}
        for job, outcome in other.outcomes.items():
            joined.setdefault(job, Outcome()).add(outcome)
        return KvringWorkerMetadata(joined, self.adapters + other.adapters)
