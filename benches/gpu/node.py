"""A cache in a torch tensor, an engine, and adapters to both, for the parts of `torch_rounds.py`."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

LAYOUTS = ["LBHNC", "LBNHC", "LHBNC", "BLHNC", "BLNHC", "BHLNC"]
LIMIT_MS = 60_000
PER_CHUNK = 4
"""Blocks of a chunk."""


@dataclass(frozen=True)
class Sizes:
    """The sizes of a cache. Content is counted in bytes, because kvring does not look at it."""

    layers: int = 4
    blocks: int = 96
    heads: int = 2
    tokens: int = 16
    content: int = 64

    def strides(self, layout: str) -> tuple[dict[str, int], int]:
        """Each axis's bytes from one element to the next, and all bytes. `layout` names the axes, the outermost first."""
        counts = {"L": self.layers, "B": self.blocks, "H": self.heads, "N": self.tokens, "C": self.content}
        strides, extent = {}, 1
        for axis in reversed(layout):
            strides[axis] = extent
            extent *= counts[axis]
        return strides, extent

    @property
    def chunk(self) -> int:
        return PER_CHUNK * self.layers * self.heads * self.tokens * self.content


class Cache:
    """A paged cache in one tensor: `layers[l][block]` is that block's part of a layer."""

    def __init__(self, torch: Any, device: str, layout: str, sizes: Sizes) -> None:
        self.torch, self.sizes, self.layout = torch, sizes, layout
        strides, extent = sizes.strides(layout)
        self.buffer = torch.zeros(extent, dtype=torch.uint8, device=device)
        shape = (sizes.blocks, sizes.heads, sizes.tokens, sizes.content)
        steps = tuple(strides[axis] for axis in "BHNC")
        self.layers = [self.buffer.as_strided(shape, steps, layer * strides["L"]) for layer in range(sizes.layers)]

    def group(self, kvring: Any) -> Any:
        tensors = [(layer.data_ptr(), tuple(layer.shape), tuple(layer.stride()), 1) for layer in self.layers]
        return kvring.KvGroup(self.sizes.blocks, PER_CHUNK, tensors)

    def pattern(self, seed: int, blocks: int) -> Any:
        """Bytes for some blocks of all layers that follow from the seed and the place. They are the same on every device."""
        shape = (self.sizes.layers, blocks, self.sizes.heads, self.sizes.tokens, self.sizes.content)
        count = shape[0] * shape[1] * shape[2] * shape[3] * shape[4]
        place = self.torch.arange(count, dtype=self.torch.int64, device=self.buffer.device)
        mixed = (place + seed * 1_000_003) * 2_654_435_761
        return (((mixed >> 13) ^ (mixed >> 29)) & 0xFF).to(self.torch.uint8).reshape(shape)

    def patterns(self, seeds: Sequence[int]) -> Any:
        """The patterns of some chunks, one after the other."""
        return self.torch.cat([self.pattern(seed, PER_CHUNK) for seed in seeds], dim=1)

    def index(self, blocks: Sequence[int]) -> Any:
        """An index for `write` and `read`. Making it waits for the stream, so it is made before work that is to be late."""
        return self.torch.tensor(list(blocks), device=self.buffer.device)

    def write(self, index: Any, content: Any) -> None:
        """Writes the content by one kernel for each layer, on the current stream."""
        for layer, part in zip(self.layers, content, strict=True):
            layer[index] = part

    def read(self, index: Any) -> Any:
        return self.torch.stack([layer[index] for layer in self.layers])


class Node:
    """An engine, and the settings with which adapters attach to it."""

    def __init__(self, torch: Any, device: str, copy: str, arena: str) -> None:
        import kvring

        self.torch, self.kvring, self.device, self.copy = torch, kvring, device, copy
        self.engine = kvring.Engine(f"gpu-{os.getpid()}", arena)
        self.counter = itertools.count(1)

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"

    @property
    def stream(self) -> int | None:
        return self.torch.cuda.current_stream().cuda_stream if self.on_gpu else None

    def sleep(self, milliseconds: float) -> None:
        """Puts a kernel on the stream that does nothing for a while."""
        if self.on_gpu:
            self.torch.cuda._sleep(int(milliseconds * 1.5e6))

    @contextlib.contextmanager
    def pair(self, cache: Cache, fingerprint: bytes, name: str | None = None) -> Iterator[Pair]:
        name = name or self.engine.name
        common = {"name": name, "client": f"torch-{os.getpid()}"}
        worker = self.kvring.WorkerAdapter(fingerprint, world=1, rank=0, chunk_tokens=64, copy=self.copy, **common)
        scheduler = self.kvring.PollingSchedulerAdapter(fingerprint, **common)
        try:
            device = self.torch.cuda.current_device() if self.on_gpu else None
            worker.register_kv_caches([cache.group(self.kvring)], owner=cache, device=device)
            assert scheduler.wait_ready(LIMIT_MS), f"the scheduler is not attached: {scheduler.health()}"
            yield Pair(self, cache, worker, scheduler)
        finally:
            worker.shutdown()
            scheduler.shutdown()


class Pair:
    """A worker with its cache, and a scheduler."""

    def __init__(self, node: Node, cache: Cache, worker: Any, scheduler: Any) -> None:
        self.node, self.cache, self.worker, self.scheduler = node, cache, worker, scheduler
        self.reports: dict[int, Any] = {}

    def submit_store(self, keys: Sequence[bytes], blocks: Sequence[int], stream: int | None, source: int = 1) -> int:
        return self.worker.submit_store("s", (source, next(self.node.counter)), keys, blocks, stream=stream)

    def submit_load(self, hit: Any, blocks: Sequence[int], stream: int | None) -> int:
        return self.worker.submit_load("l", hit.handles(0, hit.chunks), blocks, stream=stream)

    def end(self, job: int) -> Any:
        if not self.worker.wait_job(job, LIMIT_MS):
            raise AssertionError(f"job {job} did not end within {LIMIT_MS} ms")
        self.reports.update((report.job, report) for report in self.worker.get_finished())
        return self.reports.pop(job)

    def store(self, keys: Sequence[bytes], blocks: Sequence[int]) -> None:
        report = self.end(self.submit_store(keys, blocks, self.node.stream))
        assert report.done == len(keys), f"expected {len(keys)} chunks stored, got {report}"

    def found(self, keys: Sequence[bytes]) -> Any:
        return self.scheduler.lookup("l", next(self.node.counter), keys)

    def load(self, keys: Sequence[bytes], blocks: Sequence[int], before: Callable[[], None] = lambda: None) -> None:
        """Loads the chunks. `before` puts work on the stream right before the load."""
        hit = self.found(keys)
        assert hit.chunks == len(keys), f"expected {len(keys)} chunks, found {hit.chunks}"
        before()
        report = self.end(self.submit_load(hit, blocks, self.node.stream))
        assert report.done == len(keys), f"expected {len(keys)} chunks loaded, got {report}"
        self.scheduler.end_session("l")


def key(seed: int) -> bytes:
    return b"torch-rounds" + seed.to_bytes(4, "big")


def fingerprint(text: str) -> bytes:
    return text.encode().ljust(32, b".")[:32]
