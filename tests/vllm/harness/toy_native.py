"""An in-process stand-in for the native adapters: a dictionary, published in two phases."""

import itertools
from dataclasses import dataclass, field
from typing import Any

from .jobs import Finished

SKIP = (1 << 32) - 1


@dataclass
class ToyEngine:
    """Chunks by key, for all ranks; visible when every writer has written and the scheduler side has agreed."""

    writers: int
    visible: dict[bytes, dict[int, bytes]] = field(default_factory=dict)
    rounds: dict[tuple[int, int], dict[int, dict[bytes, bytes]]] = field(default_factory=dict)

    def commit(self, round_: tuple[int, int]) -> None:
        """Publishes a round that is complete."""
        ranks = self.rounds.pop(round_, {})
        if len(ranks) == self.writers:
            for key in next(iter(ranks.values())):
                self.visible.setdefault(key, {rank: chunks[key] for rank, chunks in ranks.items()})

    def drop(self, round_: tuple[int, int]) -> None:
        """Forgets a round."""
        self.rounds.pop(round_, None)


ENGINES: dict[str, ToyEngine] = {}


@dataclass
class ToyHit:
    """As `kvring.Hit`."""

    keys: list[bytes]

    @property
    def chunks(self) -> int:
        """The longest visible prefix."""
        return len(self.keys)

    def shards(self, rank: int, start: int, stop: int) -> bytes:
        """Opaque: the keys."""
        return b"".join(key[:16] for key in self.keys[start:stop])


class ToyLookups:
    """As `kvring.PollingSchedulerAdapter`."""

    def __init__(self, engine: ToyEngine) -> None:
        self.engine = engine
        self.sessions: dict[str, tuple[int, ToyHit]] = {}

    def lookup(self, request: str, admission: int, keys: list[bytes], every: int = 1) -> ToyHit:
        """Once per request and admission."""
        known = self.sessions.get(request)
        if known is None or known[0] != admission:
            chunks = [key[:16] for key in keys[every - 1 :: every]]
            found = list(itertools.takewhile(lambda key: key in self.engine.visible, chunks))
            known = self.sessions[request] = (admission, ToyHit(found))
        return known[1]

    def end_session(self, request: str) -> None:
        """Forgets it."""
        self.sessions.pop(request, None)

    def open_sessions(self) -> int:
        """How many there are."""
        return len(self.sessions)

    def reset_cache(self) -> int:
        """Everything is gone."""
        count = len(self.engine.visible)
        self.engine.visible.clear()
        return count


class ToyWorkerAdapter:
    """As `kvring.WorkerAdapter`: copies at once, reports later."""

    def __init__(self, engine: ToyEngine, shard: int, writer: bool) -> None:
        self.engine = engine
        self.shard = shard
        self.writer = writer
        self.views: list[list[Any]] = []
        """Of each group: the tensors of its layers."""
        self.chunk_blocks = 1
        self._next = 1
        self._ended: list[Finished] = []
        self._bad: list[int] = []

    def submit_store(
        self, request: str, round: tuple[int, int], keys: list[bytes], blocks: list[int], parent: bytes | None = None
    ) -> int:
        """Copies the blocks."""
        per_chunk = self.chunk_blocks * len(self.views)
        chunks = {}
        for index, key in enumerate(keys):
            data = b""
            for group, layers in enumerate(self.views):
                for inner in range(self.chunk_blocks):
                    block = blocks[index * per_chunk + group * self.chunk_blocks + inner]
                    data += b"".join(layer[block].contiguous().numpy().tobytes() for layer in layers)
            chunks[key[:16]] = data
        self.engine.rounds.setdefault(round, {})[self.shard] = chunks
        return self._end(request, True, done=len(keys))

    def submit_load(self, request: str, shards: bytes, blocks: list[int]) -> int:
        """Copies back."""
        import numpy as np
        import torch

        keys = [shards[at : at + 16] for at in range(0, len(shards), 16)]
        per_chunk = self.chunk_blocks * len(self.views)
        failed = 0
        for index, key in enumerate(keys):
            mine = blocks[index * per_chunk : (index + 1) * per_chunk]
            data = self.engine.visible.get(key, {}).get(self.shard)
            if data is None:
                failed += 1
                self._bad += [block for block in mine if block != SKIP]
                continue
            at = 0
            for group, layers in enumerate(self.views):
                for inner in range(self.chunk_blocks):
                    block = mine[group * self.chunk_blocks + inner]
                    for layer in layers:
                        size = layer[0].numel() * layer.element_size()
                        if block != SKIP:
                            page = np.frombuffer(data[at : at + size], dtype=np.float32)
                            layer[block] = torch.from_numpy(page.copy()).view(layer[block].shape)
                        at += size
        return self._end(request, False, done=len(keys) - failed, failed=failed)

    def _end(self, request: str, is_store: bool, done: int, failed: int = 0) -> int:
        job = self._next
        self._next += 1
        self._ended.append(Finished(job, request, is_store, done=done, failed=failed))
        return job

    def get_finished(self) -> list[Finished]:
        """Each once."""
        ended, self._ended = self._ended, []
        return ended

    def get_block_ids_with_load_errors(self) -> list[int]:
        """Each once."""
        bad, self._bad = self._bad, []
        return bad

    def flush(self, jobs: list[int]) -> None:
        """Nothing runs."""

    def handle_preemptions(self, requests: list[str] | None = None) -> None:
        """Nothing runs."""

    def wait_job(self, job: int, timeout_ms: float) -> bool:
        """Nothing runs."""
        return True

    def wait_idle(self, timeout_ms: float) -> bool:
        """Nothing runs."""
        return True

    def shutdown(self) -> None:
        """Nothing to do."""
