"""Which request owns which block when, and what the connector does with it: obligations P1, P2 and the load half of P3.

Nothing here needs the connector's help. Ownership comes from vLLM's block pool and block tables, jobs from the calls that
the connector's worker side makes (`jobs.py`). A block that the pool hands out again is another block: it gets a new
*generation*. So "no source of an open store has changed its owner" is a comparison of two numbers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.request import Request

KEY_BYTES = 16

Reported = tuple[tuple[int, int], bytes, int]
"""A chunk that a rank has stored: (round, key, rank)."""


@dataclass
class Violation:
    """An obligation that was not met."""

    rule: str
    text: str
    step: int

    def __str__(self) -> str:
        return f"step {self.step}: {self.rule}: {self.text}"


@dataclass
class Admission:
    """One life of a request between two losses of its blocks."""

    number: int = 0
    local: int = 0
    external: int = 0
    is_async: bool = False
    loads: dict[int, int] = field(default_factory=dict)
    """Loads submitted, by rank."""
    stored_to: dict[int, int] = field(default_factory=dict)
    """The chunk up to which stores were submitted, by rank."""
    again: int | None = None
    """The first chunk whose store has failed on some rank: from there on chunks may be stored again."""


@dataclass
class Snapshot:
    """The state when a step was scheduled: with asynchronous scheduling the worker runs the step later."""

    step: int
    tables: dict[str, tuple[list[int], ...]]
    gens: list[int]
    fresh: list[int]
    """Blocks handed out for this step."""
    owned: set[int]
    history: dict[str, list[dict[int, tuple[int, int]]]]
    """For each request and group: the (block id, generation) by block index, in this admission; also of blocks freed since."""
    admissions: dict[str, Admission]


@dataclass
class Job:
    """A store or a load, from its submission until it is reported or flushed."""

    rank: int
    job: int
    request: str
    is_store: bool
    sources: list[tuple[int, int]]
    """The (block id, generation) of each block that it reads or writes."""
    step: int
    first: int = 0
    """Of a store: its first chunk."""
    admission: Admission | None = None
    round: tuple[int, int] = (0, 0)
    keys: list[bytes] = field(default_factory=list)
    flushed: bool = False
    blamed: bool = False


class Ledger:
    """Judges jobs against block tables."""

    def __init__(self, *, groups: int, block_size: int, chunk_blocks: int, num_blocks: int, skip: int) -> None:
        self.groups = groups
        self.block_size = block_size
        self.chunk_blocks = chunk_blocks
        self.chunk_tokens = block_size * chunk_blocks
        self.skip = skip
        self.violations: list[Violation] = []
        self.log: list[str] = []
        self.counters: dict[str, int] = {}
        self.step = 0
        self.gens = [0] * num_blocks
        self._fresh: list[int] = []
        self.requests: dict[str, Request] = {}
        self.admissions: dict[str, Admission] = {}
        self._history: dict[str, list[dict[int, tuple[int, int]]]] = {}
        self._lost: set[str] = set()
        self.open: dict[tuple[int, int], Job] = {}
        self.stored: dict[bytes, int] = {}
        """Keys that every rank has stored, with the step in which the last one was reported."""
        self._stored_ranks: dict[tuple[tuple[int, int], bytes], set[int]] = {}
        self._reported: list[Reported] = []
        self.salts: dict[str, list[bytes | None]] = {}
        self.salted: Callable[[bytes, bytes | None], bytes] = lambda key, salt: key
        self.writers: set[int] = {0}
        self._rounds: dict[tuple[int, int], tuple[str, tuple[bytes, ...], tuple[int, ...]]] = {}
        self.running: Snapshot | None = None
        """The step that the workers run right now."""

    # -- what happens in the scheduler ---------------------------------------------------------------------------------

    def watch(self, scheduler: "Scheduler") -> None:
        """Listens to the block pool and to the loss of a request's blocks."""
        pool = scheduler.kv_cache_manager.block_pool
        manager = scheduler.kv_cache_manager
        get_new_blocks, free, pop = pool.get_new_blocks, manager.free, manager.pop_blocks_for_free

        def counted(num_blocks: int) -> Any:
            blocks = get_new_blocks(num_blocks)
            for block in blocks:
                self.gens[block.block_id] += 1
                self._fresh.append(block.block_id)
            return blocks

        def freed(request: "Request") -> None:
            self.lose(request.request_id)
            free(request)

        def popped(request: "Request") -> Any:
            self.lose(request.request_id)
            return pop(request)

        pool.get_new_blocks = counted  # type: ignore[method-assign]
        manager.free = freed  # type: ignore[method-assign]
        manager.pop_blocks_for_free = popped  # type: ignore[method-assign]

    def lose(self, request: str) -> None:
        """The request has lost its blocks: its admission is over."""
        self._lost.add(request)

    def admit(self, request: str, local: int, external: int, is_async: bool) -> None:
        """`update_state_after_alloc` of a request that had no blocks."""
        number = self.admissions[request].number + 1 if request in self.admissions else 1
        self.admissions[request] = Admission(number, local, external, is_async)

    def snapshot(self, scheduler: "Scheduler") -> Snapshot:
        """After `schedule()`."""
        manager = scheduler.kv_cache_manager
        tables = {}
        owned: set[int] = set()
        for request_id in scheduler.requests:
            table = manager.get_block_ids(request_id)
            if any(table):
                tables[request_id] = table
        for request_id, table in tables.items():
            if request_id in self._lost or request_id not in self._history:
                self._history[request_id] = [{} for _ in range(self.groups)]
                self._lost.discard(request_id)
            for group, ids in enumerate(table):
                known = self._history[request_id][group]
                for index, block in enumerate(ids):
                    if block:
                        owned.add(block)
                        known[index] = (block, self.gens[block])
        fresh, self._fresh = self._fresh, []
        history = {request: [dict(group) for group in groups] for request, groups in self._history.items()}
        return Snapshot(self.step, tables, list(self.gens), fresh, owned, history, dict(self.admissions))

    # -- what the connector's worker side does -------------------------------------------------------------------------

    def chunk_keys(self, request: str, chunk: int) -> list[bytes]:
        """The keys of a request's chunk, those of earlier admissions first: the hash of its last block, changed by what the
        connector adds to it. None for a chunk that is not complete."""
        last = self.requests[request].block_hashes[(chunk + 1) * self.chunk_blocks - 1 :][:1]
        salts = self.salts.get(request, [None])
        return [self.salted(bytes(value), salt)[:KEY_BYTES] for value in last for salt in salts]

    def is_key(self, request: str, chunk: int, key: bytes) -> bool:
        """Is this the key of that chunk, now or in an earlier admission?"""
        return key[:KEY_BYTES] in self.chunk_keys(request, chunk)

    def learn_salt(self, request: str, salt: bytes | None) -> None:
        """The connector changes this request's keys by this salt from now on."""
        known = self.salts.setdefault(request, [salt])
        if known[-1] != salt:
            known.append(salt)

    def store(
        self,
        rank: int,
        job: int,
        request: str,
        round_: tuple[int, int],
        keys: Sequence[bytes],
        blocks: Sequence[int],
        parent: bytes | None,
        computed: int,
    ) -> None:
        """P1 of a store: these blocks hold these tokens, and they are computed."""
        now = self.running
        assert now is not None
        where = f"store of {request} on rank {rank}"
        if not keys or len(blocks) != len(keys) * self.groups * self.chunk_blocks:
            return self.blame("P1", f"{where}: {len(keys)} keys and {len(blocks)} blocks")
        if request not in self.requests:
            return self.blame("P1", f"{where}: unknown request")
        first = self._find(request, keys[0])
        if first is None:
            return self.blame("P1", f"{where}: its first key is none of the request's")
        for offset, key in enumerate(keys):
            if not self.is_key(request, first + offset, key):
                return self.blame("P1", f"{where}: key {offset} is not that of chunk {first + offset}")
        if first > 0 and parent is not None and not self.is_key(request, first - 1, parent):
            self.blame("P1", f"{where}: its parent is not the key of chunk {first - 1}")
        stop = first + len(keys)
        if stop * self.chunk_tokens > computed:
            self.blame("P1", f"{where}: up to token {stop * self.chunk_tokens}, but {computed} are computed")
        keys = [key[:KEY_BYTES] for key in keys]
        known = (str(request), tuple(keys), tuple(blocks))
        if self._rounds.setdefault(round_, known) != known:
            self.blame("P1", f"{where}: round {round_} is something else on another rank")
        admission = now.admissions.get(request)
        if admission is not None:
            done = admission.stored_to.get(rank, 0)
            if first < done and (admission.again is None or first < admission.again):
                self.blame("P1", f"{where}: chunk {first} again, {done} were stored in admission {admission.number}")
            admission.stored_to[rank] = stop
        sources = []
        history = now.history.get(request, [{} for _ in range(self.groups)])
        for group, index, block in self._places(first, blocks):
            want, gen = history[group].get(index, (None, -1))
            at = f"{where}: group {group}, tokens from {index * self.block_size}"
            if block == 0:
                self.blame("P1", f"{at}: the null block")
            elif block != want:
                self.blame("P1", f"{at}: block {block}, but the block manager has {want}")
            elif now.gens[block] != gen and block in now.owned:
                self.blame("P2", f"{at}: block {block} has been given away before the store began")
            sources.append((block, gen if block == want else now.gens[block]))
        self.count("stores")
        self.count("stored_chunks", len(keys))
        self.note(f"rank {rank} store {job} {request} chunks {first}..{stop} blocks {list(blocks)}")
        self.open[rank, job] = Job(rank, job, request, True, sources, self.step, first, admission, round_, keys)

    def load(self, rank: int, job: int, request: str, blocks: Sequence[int]) -> None:
        """P1 of a load: exactly the blocks of the external hit, none that vLLM already held."""
        now = self.running
        assert now is not None
        where = f"load of {request} on rank {rank}"
        admission = now.admissions.get(request)
        table = now.tables.get(request)
        if admission is None or table is None or admission.external == 0:
            return self.blame("P1", f"{where}: nothing was to be loaded")
        admission.loads[rank] = admission.loads.get(rank, 0) + 1
        if admission.loads[rank] > 1:
            self.blame("P1", f"{where}: a second time in admission {admission.number}")
        per_chunk = self.groups * self.chunk_blocks
        hit = admission.local + admission.external
        stop = -(-hit // self.chunk_tokens)
        first = stop - len(blocks) // per_chunk
        if len(blocks) % per_chunk or first < 0:
            return self.blame("P1", f"{where}: {len(blocks)} blocks")
        if first * self.chunk_tokens > admission.local:
            self.blame("P1", f"{where}: from token {first * self.chunk_tokens}, but vLLM has only {admission.local}")
        sources = []
        for group, index, block in self._places(first, blocks):
            begin = index * self.block_size
            want = table[group][index] if index < len(table[group]) else 0
            at = f"{where}: group {group}, tokens from {begin}"
            if begin + self.block_size <= admission.local:
                if block != self.skip:
                    self.blame("P1", f"{at}: vLLM holds them already, block {block} would be overwritten")
            elif block == 0:
                self.blame("P1", f"{at}: into the null block")
            elif block == self.skip:
                if want and begin < hit:
                    self.blame("P1", f"{at}: left out, but they belong to the hit of {hit}")
            elif block != want or begin >= hit:
                self.blame("P1", f"{at}: into block {block}, but the block manager has {want} (hit {hit})")
            if block not in (0, self.skip):
                sources.append((block, now.gens[block]))
        self.count("loads")
        self.note(f"rank {rank} load {job} {request} chunks {first}..{stop} blocks {list(blocks)}")
        self.open[rank, job] = Job(rank, job, request, False, sources, self.step)

    def finished(self, rank: int, job: int, complete: bool, failed: bool) -> None:
        """The connector has learned that a job has ended. `complete`: a store has written all of its chunks itself. (A chunk that
        another vLLM is storing may never be there.)"""
        record = self.open.pop((rank, job), None)
        if failed and record is not None and record.admission is not None:
            again = record.admission.again
            record.admission.again = record.first if again is None else min(again, record.first)
        if record is not None and record.is_store and complete:
            self._reported += [(record.round, key, rank) for key in record.keys]

    def take_reported(self) -> "list[Reported]":
        """Chunks whose stores the workers have reported in this step."""
        reported, self._reported = self._reported, []
        return reported

    def learn_stored(self, reported: "list[Reported]") -> None:
        """The scheduler side has got these reports: from now on lookups may be expected to find the keys."""
        for round_, key, rank in reported:
            ranks = self._stored_ranks.setdefault((round_, key), set())
            ranks.add(rank)
            if ranks >= self.writers:
                self.stored.setdefault(key, self.step)

    def flushed(self, rank: int, jobs: Sequence[int]) -> None:
        """From now on these stores read nothing."""
        for job in jobs:
            record = self.open.get((rank, job))
            if record is not None and record.is_store:
                record.flushed = True

    def forget_stored(self) -> None:
        """The cache was emptied, or is gone."""
        self.stored.clear()
        self._stored_ranks.clear()
        self._reported.clear()

    def before_forward(self, rank: int, now: Snapshot) -> None:
        """P2: after `handle_preemptions`, before anything writes."""
        for record in self.open.values():
            if record.rank != rank or record.flushed or record.blamed:
                continue
            lost = [block for block, gen in record.sources if now.gens[block] != gen and block in now.owned]
            if lost:
                record.blamed = True
                kind = "store still reads" if record.is_store else "load still writes"
                self.blame("P2", f"{kind} block(s) {lost} of {record.request} on rank {rank} that have a new owner")

    # -- helpers -------------------------------------------------------------------------------------------------------

    def _find(self, request: str, key: bytes) -> int | None:
        chunks = range(len(self.requests[request].block_hashes) // self.chunk_blocks)
        return next((chunk for chunk in chunks if self.is_key(request, chunk, key)), None)

    def _places(self, first: int, blocks: Sequence[int]) -> list[tuple[int, int, int]]:
        """(group, index in its block table, block) of the blocks of chunks from `first` on."""
        per_group, made = self.chunk_blocks, []
        for at, block in enumerate(blocks):
            chunk, place = divmod(at, self.groups * per_group)
            group, inner = divmod(place, per_group)
            made.append((group, (first + chunk) * per_group + inner, block))
        return made

    def blame(self, rule: str, text: str) -> None:
        """Records a violation."""
        violation = Violation(rule, text, self.step)
        self.violations.append(violation)
        self.log.append(f"  !! {violation}")

    def note(self, text: str) -> None:
        """A line of the step log."""
        self.log.append(f"  {text}")

    def count(self, name: str, by: int = 1) -> None:
        """A counter of the report."""
        self.counters[name] = self.counters.get(name, 0) + by
