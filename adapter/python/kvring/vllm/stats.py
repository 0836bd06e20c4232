"""What happened since the last step, for vLLM's periodic log line and for Prometheus."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

COUNTERS = {
    "lookups": "requests that were looked up, each once, however often vLLM preempts it",
    "lookups_not_serving": "lookups that were answered while the engine was stopped, dead or starting again",
    "lookups_cut": "lookups whose answer was cut because this vLLM holds as much as one client of the engine may",
    "lookups_degraded": "lookups that found nothing because there was no engine, or not all workers were known to it yet",
    "lookup_tokens": "tokens of the requests that were looked up",
    "hit_tokens": "tokens that were found for them, also of those that vLLM had itself",
    "load_tokens": "tokens that vLLM was told to take from the cache",
    "loads": "loads that ended, for each rank",
    "loads_failed": "loads that failed, for each rank: their tokens are recomputed",
    "load_bytes": "bytes loaded",
    "load_seconds": "time spent copying loads",
    "stores": "stores that ended, for each rank",
    "store_chunks": "chunks stored, for each rank",
    "store_chunks_skipped": "chunks that were there already, for each rank",
    "store_chunks_dropped": "chunks that were not stored, for each rank: no space, no engine, preempted",
    "store_bytes": "bytes stored",
    "store_seconds": "time spent copying stores",
    "errors": "errors inside the connector, each of which was answered by going on without the cache",
}
"""Counters, and what they count. The Prometheus name is `vllm:kvring_<name>`."""


@dataclass
class KvringStats(KVConnectorStats):
    """Counts since the last step; they add up."""

    data: dict[str, Any] = field(default_factory=dict)

    def add(self, name: str, by: float = 1) -> None:
        """Adds `by` to a counter."""
        self.data[name] = self.data.get(name, 0) + by

    def take(self) -> KvringStats | None:
        """Returns the counts and starts again from 0; `None` where nothing happened."""
        if not self.data:
            return None
        taken = KvringStats(data=self.data)
        self.data = {}
        return taken

    def reset(self) -> None:
        """Forgets everything."""
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        """Adds another rank's, or another step's, counts."""
        for name, value in other.data.items():
            self.add(name, value)
        return self

    def reduce(self) -> dict[str, int | float]:
        """The counts for one line of the log. Each number has its name from `/metrics`, or one that begins as those do. There is
        no hit rate, because vLLM itself shows that of a connector (external prefix cache)."""
        data = self.data
        line: dict[str, int | float] = {name: round(value, 6) for name, value in data.items() if name in COUNTERS}
        for what in ("load", "store"):
            if seconds := data.get(f"{what}_seconds"):
                line[f"{what}_GB/s"] = round(data.get(f"{what}_bytes", 0) / seconds / 1e9, 2)
        return {f"kvring_{name}": value for name, value in line.items()}

    def is_empty(self) -> bool:
        """Did nothing happen?"""
        return not self.data


class KvringPromMetrics(KVConnectorPromMetrics):
    """The counters as Prometheus metrics, one set for each of vLLM's engines."""

    def __init__(
        self, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: dict[int, list[object]]
    ):
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        counters = {
            name: self._counter_cls(name=f"vllm:kvring_{name}", documentation=f"kvring: {meaning}.", labelnames=labelnames)
            for name, meaning in COUNTERS.items()
        }
        self._counters = {
            engine: {name: counter.labels(*values) for name, counter in counters.items()}
            for engine, values in per_engine_labelvalues.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Adds one interval's counts."""
        counters = self._counters.get(engine_idx, {})
        for name, value in transfer_stats_data.items():
            if name in counters:
                counters[name].inc(value)
