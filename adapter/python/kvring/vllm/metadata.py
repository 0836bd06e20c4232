"""What the scheduler's side tells the workers in each step, and what they tell it. Pickled by vLLM between processes."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata, KVConnectorWorkerMetadata

from .adapters import Adapter


@dataclass(slots=True)
class Load:
    """Bring chunks into blocks."""

    job: int
    request: str
    tokens: int
    """Tokens that vLLM counts as computed once this has ended."""
    wait: bool
    """Before this step's forward pass (synchronous), or between steps."""
    shards: tuple[bytes, ...]
    """For each shard of the world, where its part of the chunks is; none of them: the load has failed already."""
    blocks: list[int]
    """Of one chunk after the other, all groups; `SKIP` where nothing is to be written."""


@dataclass(slots=True)
class Store:
    """Keep chunks that this step's forward pass completes, or an earlier one's."""

    job: int
    request: str
    round: tuple[int, int]
    parent: bytes | None
    keys: list[bytes]
    blocks: list[int]
    adapter: Adapter | None = None
    """What it has to have been computed with."""


@dataclass(slots=True)
class KvringMetadata(KVConnectorMetadata):
    """One step, from the scheduler to every worker."""

    loads: list[Load] = field(default_factory=list)
    stores: list[Store] = field(default_factory=list)
    flush: list[int] = field(default_factory=list)
    """Stores whose blocks may have got a new owner: none of them may read any more when the forward pass begins."""
    flush_all: bool = False
    """The scheduler's side does not know: all of them."""
    idle: bool = False
    """No forward pass in this step: whoever waits for a load costs nobody anything."""


@dataclass(slots=True)
class Outcome:
    """What became of a job, on the ranks that have reported it."""

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
    """What is new of LoRA adapters."""

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        """As vLLM joins the ranks' reports of one step. Neither side is changed."""
        assert isinstance(other, KvringWorkerMetadata)
        joined = {job: Outcome(o.ranks, o.chunks_failed, o.ranks_failed) for job, o in self.outcomes.items()}
        for job, outcome in other.outcomes.items():
            joined.setdefault(job, Outcome()).add(outcome)
        return KvringWorkerMetadata(joined, self.adapters + other.adapters)
