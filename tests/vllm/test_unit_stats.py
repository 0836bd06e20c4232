"""Counts add up over steps, ranks and processes, and reach Prometheus."""

import pickle
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from kvring.vllm import KvringConnector
from kvring.vllm.metadata import KvringMetadata, KvringWorkerMetadata, Load, Outcome, Store
from kvring.vllm.stats import COUNTERS, KvringStats


def test_counts_add_up() -> None:
    stats = KvringStats()
    assert stats.take() is None and stats.is_empty()
    stats.add("load_bytes", 4e9)
    stats.add("load_seconds", 2.0)
    taken = stats.take()
    assert taken is not None and stats.is_empty() and not taken.is_empty()
    other = KvringConnector.build_kv_connector_stats(
        pickle.loads(pickle.dumps(taken)).to_dict() | {"lookup_tokens": 100, "hit_tokens": 25}
    )
    line = taken.aggregate(other).reduce()
    assert line["kvring_load_bytes"] == 8e9 and line["kvring_load_GB/s"] == 2.0
    assert all(name.startswith("kvring_") for name in line), "vLLM's line of these numbers says nowhere else whose they are"
    assert not any("rate" in name for name in line), "vLLM shows a hit rate of its own, of something slightly different"


def test_prometheus_gets_every_counter() -> None:
    registry = CollectorRegistry()

    def counter(**kwargs: object) -> Counter:
        return Counter(registry=registry, **kwargs)  # type: ignore[arg-type]

    class Config:
        kv_transfer_config = None

    types = {Gauge: Gauge, Counter: counter, Histogram: Histogram}
    metrics = KvringConnector.build_prom_metrics(Config(), types, ["engine"], {0: ["0"], 1: ["1"]})  # type: ignore[arg-type]
    metrics.observe({"lookups": 3, "unknown": 1}, 1)
    text = generate_latest(registry).decode()
    assert 'vllm:kvring_lookups_total{engine="1"} 3.0' in text
    for name in COUNTERS:
        assert f'vllm:kvring_{name}_total{{engine="0"}} 0.0' in text


def test_the_documentation_has_every_counter() -> None:
    page = Path(__file__).parents[2] / "docs" / "operations.md"
    rows = [f"| `{name}` | {meaning} |" for name, meaning in COUNTERS.items()]
    assert "\n".join(rows) in page.read_text()


def test_what_travels_between_processes_survives() -> None:
    load = Load(1, "r", 32, True, (b"a", b"b"), [1, 2])
    store = Store(2, "r", (7, 2), None, [b"k" * 16], [3])
    meta = KvringMetadata([load], [store], [5], idle=True)
    assert pickle.loads(pickle.dumps(meta)) == meta


def test_ranks_are_counted() -> None:
    one = KvringWorkerMetadata({1: Outcome(ranks=1), 2: Outcome(ranks=1, chunks_failed=3, ranks_failed=1)})
    two = KvringWorkerMetadata({1: Outcome(ranks=1, chunks_failed=1, ranks_failed=1), 3: Outcome(ranks=1)})
    joined = one.aggregate(two)
    assert joined.outcomes == {1: Outcome(2, 1, 1), 2: Outcome(1, 3, 1), 3: Outcome(1)}
    assert one.outcomes[1] == Outcome(1), "what is joined is not changed"
