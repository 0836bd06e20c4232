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
    visible: dict[bytes, dict[int, list[Any]]] = field(default_factory=dict)
    """By key and shard: the pages of a chunk."""
    rounds: dict[tuple[int, int], dict[int, dict[bytes, list[Any]]]] = field(default_factory=dict)
    """By round, shard and key: the pages of chunks that no lookup finds yet."""

    def commit(self, round_: tuple[int, int]) -> None:
        """Publishes a round that is complete."""
        ranks = self.rounds.pop(round_, {})
        if len(ranks) == self.writers:
            for key in next(iter(ranks.values())):
                self.visible.setdefault(key, {rank: chunks[key] for rank, chunks in ranks.items()})


ENGINES: dict[str, ToyEngine] = {}


@dataclass
class ToyHit:
    """As `kvring.Hit`: the longest visible prefix."""

    keys: list[bytes]

    @property
    def chunks(self) -> int:
        return len(self.keys)

    def handles(self, start: int, stop: int) -> bytes:
        """Opaque: the keys."""
        return b"".join(self.keys[start:stop])


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
        self.sessions.pop(request, None)

    def open_sessions(self) -> int:
        return len(self.sessions)


class ToyWorkerAdapter:
    """As `kvring.WorkerAdapter`: copies at once, reports later."""

    def __init__(self, engine: ToyEngine, shard: int) -> None:
        self.engine = engine
        self.shard = shard
        self._layers: list[list[Any]] = []
        """For each block of a chunk: the tensors of its group's layers."""
        self._next = 1
        self._ended: list[Finished] = []
        self._bad: list[int] = []

    def register(self, layers: list[list[Any]]) -> None:
        self._layers = layers

    def submit_store(
        self, request: str, round: tuple[int, int], keys: list[bytes], blocks: list[int], parent: bytes | None = None
    ) -> int:
        """Copies the blocks."""
        self.engine.rounds.setdefault(round, {})[self.shard] = {
            key[:16]: [layer[block].clone() for block, layer in self._pages(blocks, index)] for index, key in enumerate(keys)
        }
        return self._end(request, True, done=len(keys))

    def submit_load(self, request: str, handles: bytes, blocks: list[int]) -> int:
        """Copies back."""
        failed = 0
        for index, at in enumerate(range(0, len(handles), 16)):
            stored = self.engine.visible.get(handles[at : at + 16], {}).get(self.shard)
            failed += stored is None
            for number, (block, layer) in enumerate(self._pages(blocks, index)):
                if block != SKIP and stored is None:
                    self._bad.append(block)
                elif block != SKIP and stored is not None:
                    layer[block].copy_(stored[number])
        return self._end(request, False, done=len(handles) // 16 - failed, failed=failed)

    def _pages(self, blocks: list[int], chunk: int) -> list[tuple[int, Any]]:
        """The pages of a chunk: the block, and the layer's tensor."""
        of_chunk = blocks[chunk * len(self._layers) :]
        return [(block, layer) for block, layers in zip(of_chunk, self._layers) for layer in layers]

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

    def _nothing_runs(self, *_: Any) -> bool:
        return True

    flush = handle_preemptions = wait_job = wait_idle = shutdown = _nothing_runs
