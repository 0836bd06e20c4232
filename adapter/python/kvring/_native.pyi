"""What the Rust side of the package offers: its names and types, and copies of its docstrings (`adapter/python/tests/stub.py`).

`kvring/__init__.py` explains the words used here."""

from collections.abc import Sequence
from typing import final

from typing_extensions import Unpack

from .options import ClientOptions

SKIP: int
"As a block id of a load: this page is not written (vLLM holds it already, or has no block for it)."
KEY_BYTES: int
"Bytes of a chunk's key: 16. Longer hashes count by their first 16 bytes."

class KvringError(Exception):
    """The base of all errors of this package."""

class ConfigError(KvringError, ValueError):
    """A configuration that cannot work; the message names the option."""

class LayoutError(KvringError, ValueError):
    """A KV cache that cannot be described, or block ids that it does not have."""

class RegisterError(KvringError):
    """The registration disagrees with what the engine has been told before: expected and got are in the message."""

class EngineError(KvringError, RuntimeError):
    """The engine did not do what only an operator asks of it: start, stop, clear."""

class DeviceError(KvringError, RuntimeError):
    """A GPU may still write into the KV cache, and its driver does not say: nothing may be computed from it any more."""

def byte_size(text: str) -> int:
    """Reads a size as `kvring serve --arena` takes it, such as `"8GiB"`, `"1.5G"` or `"4096"`, and returns it in bytes.

    Raises `ConfigError` for a text that is no size."""

def engine_name(name: str) -> str:
    """Checks an engine's name as `kvring serve --name` takes it, and returns it unchanged.

    Raises `ConfigError` for a name that no engine can have."""

def engine_state(name: str = "default") -> str:
    """Returns the state of the engine of this name as others see it, without attaching: "serving", "recovering" (it starts, and
    may be taking over what it held before), "dead", "stopped" (it was asked to stop, and `--keep` has kept what it held),
    "absent", "unhealthy" (it has found an error in its own tables), or "incompatible: " and the reason.

    Raises `ConfigError` for a name that no engine can have."""

def client_defaults() -> ClientOptions:
    """The options that every adapter takes, with their defaults: those of `kvring.ClientOptions`."""

def next_logs(timeout_ms: float) -> list[tuple[int, str, str]]:
    """Takes the log records of this process's adapters, each as (`logging` level, target, text). Waits at most `timeout_ms`
    milliseconds for the first one, without the GIL, and then returns an empty list; after `close_logs` it does not wait."""

def close_logs() -> None:
    """Ends `next_logs`, for good: called before the interpreter ends."""

def set_log_level(level: int) -> None:
    """Sets the lowest `logging` level of records that the adapters log; it is `logging.INFO` to begin with. A record below it
    costs nothing."""

@final
class Hit:
    """What a lookup found: the longest visible prefix of its keys, held for its request and admission."""

    @property
    def chunks(self) -> int:
        """The number of chunks found, from the first key on; 0 also if there is no engine whose tables may be read."""

    def handles(self, start: int, stop: int) -> bytes:
        """Returns the chunks from `start` up to `stop` (exclusive) as opaque bytes, which the scheduler sends to the processes of
        all ranks for `WorkerAdapter.submit_load`: each rank finds its own part of a chunk.

        Raises `ConfigError` for a chunk that the hit does not have."""

@final
class PollingSchedulerAdapter:
    """A scheduler's adapter: lookups that have a definite answer at once, in microseconds. They read the engine's tables in
    shared memory, so they wait for nobody, and go on while the engine sleeps, is stopped, dead, or recovering.

    `fingerprint`: 32 bytes that name the namespace, the same as the workers'. `options`: see `ClientOptions`.

    Raises `ConfigError`, which names the option, for a value that cannot work. An engine that is not there is no error."""

    def __init__(self, fingerprint: bytes, **options: Unpack[ClientOptions]) -> None: ...
    def lookup(self, request: str, admission: int, keys: Sequence[bytes], every: int = 1, salt: bytes | None = None) -> Hit:
        """Returns the longest visible prefix of `keys[every - 1::every]`, held for this request and admission until
        `free_lookup_locks` or `end_session`. Asked again for the same admission, it gives the same answer and does no work, as
        long as that holds (`is_current`).

        `request`: its name. `admission`: a number that grows each time that the request is preempted. `keys`: bytes of at
        least `KEY_BYTES` each, of which the first `KEY_BYTES` count, in chain order; of a list only a few are read beyond the
        first miss. `every`: the number of keys for each chunk, of which the last one names it. `salt`: 16 bytes that
        every key is XORed with, as what was stored under them must have been.

        Raises `ConfigError` for a key or a salt of wrong length, and `KvringError` in a forked child."""

    def is_current(self, request: str) -> bool:
        """Says whether the answer of this request's admission still holds. It does not once its arena has been replaced, or an
        engine has evicted some of it, because it could not wait for this client after a restart or has thrown it out: then the
        next lookup of the same admission looks again. Takes a few loads; after a restart, once, a load for each chunk."""

    def free_lookup_locks(self, request: str, admission: int, keep: int = 0) -> None:
        """Gives up what this request's admission holds beyond its first `keep` chunks. To be called when all ranks have
        reported the load (`keep` 0), or when less is loaded than was found. An unknown request is ignored."""

    def end_session(self, request: str) -> None:
        """Ends a request: its answer, and all that it holds. An unknown request is ignored."""

    def reset_cache(self) -> int:
        """Drops the chunks of this namespace that nobody holds, and returns their number. Waits for the engine, without the GIL,
        for up to `operation_timeout_ms`.

        Raises `EngineError` where no engine can be asked, or none answers in time."""

    def wait_ready(self, timeout_ms: float) -> bool:
        """Waits, without the GIL, until the engine is there and has accepted this client. Returns false after `timeout_ms`
        milliseconds, and after `shutdown`; `health` then says why. For tools and tests: vLLM goes on without an engine."""

    def is_healthy(self) -> bool:
        """Says whether the engine is there and well. Takes a few loads."""

    def health(self) -> str:
        """Returns "healthy", or what the engine is instead: "absent", "dead", "recovering", "attaching", "stalled", "unhealthy",
        "refused: " or "incompatible: " and the reason, or "shut down"."""

    def lookup_stats(self) -> dict[str, int]:
        """Returns how many lookups there were by their outcome: "answered" from the engine's tables, of these "not_serving" while
        the engine was stopped, dead or recovering, and "cut" because this client holds as much as it may; and answered with 0
        chunks, because there were no tables that may be read ("degraded"), or because not all workers have registered the
        namespace ("refused")."""

    def client_stats(self) -> dict[str, int]:
        """Returns counts of what this client has seen of its engine, by name: attachments, deaths, restarts, stalls, and more."""

    def open_sessions(self) -> int:
        """Returns the number of requests that have looked something up and have not ended."""

    def shutdown(self) -> None:
        """Detaches from the engine, and gives up everything that is held. Waits, without the GIL, for up to `drain_timeout_ms`.
        Lookups find nothing from then on. A second call does nothing."""

@final
class KvGroup:
    """Describes the layers of a KV cache that share a block table.

    `num_blocks`: how many blocks there are. `blocks_per_chunk`: how many of them make a chunk. `tensors`: one tuple for each
    layer, in an order that is the same in every process: the address of the first element, the shape, the strides in
    elements, and the bytes of an element. The first dimension counts the blocks, or the same number of kernel blocks for each
    block. A page is opaque bytes, and may lie in several pieces.

    Raises `LayoutError` where the pages of two blocks overlap, where the first dimension is no multiple of `num_blocks`, and
    for a description without tensors or with chunks of no block."""

    def __init__(
        self, num_blocks: int, blocks_per_chunk: int, tensors: Sequence[tuple[int, Sequence[int], Sequence[int], int]]
    ) -> None: ...
    @property
    def planes(self) -> list[tuple[int, int, int]]:
        """The contiguous pieces that a block is made of, each as (address of block 0's piece, bytes from one block's piece to the
        next one's, bytes of the piece)."""

    @property
    def block_bytes(self) -> int:
        """The bytes of a block in all layers together."""

@final
class Finished:
    """A job that has ended. `WorkerAdapter.get_finished` makes it."""

    @property
    def job(self) -> int:
        """The job's id, as `submit_store` or `submit_load` returned it."""

    @property
    def request(self) -> str:
        """The name of the request that the job was submitted for."""

    @property
    def is_store(self) -> bool:
        """True for a store, false for a load."""

    @property
    def done(self) -> int:
        """The number of chunks stored, or loaded and validated."""

    @property
    def skipped(self) -> int:
        """Of a store: the number of chunks that were there already, or are being stored by another job."""

    @property
    def failed(self) -> int:
        """The number of chunks that a store dropped, or that could not be loaded; `why` has the reasons."""

    @property
    def why(self) -> dict[str, int]:
        """The number of failed chunks by reason; only reasons that occurred. They add up to `failed`."""

    @property
    def bytes(self) -> int:
        """The bytes copied."""

    @property
    def seconds(self) -> float:
        """The time spent copying, in seconds."""

@final
class WorkerAdapter:
    """A worker's adapter: stores and loads one rank's paged KV cache, in the background. Calls return at once unless they say
    otherwise.

    `fingerprint`: 32 bytes that name the namespace. `world`: the number of ranks. `rank`: this worker's, from 0 on.
    `chunk_tokens`: the tokens of a chunk. `model` and `dtype`: for people, in `kvring status`.

    `checksum`: "off", "store" (a store computes checksums) or "verify" (a load also compares them; a mismatch is a failed load).

    `copy_threads`: for a cache in host memory, how many threads copy; by default 2, or 1 on a single CPU.

    `copy`: for a cache on a GPU, how its bytes are moved. "batch": DMA, one copy for each contiguous run. "staged": a kernel
    gathers or scatters in a buffer on the GPU, and DMA moves that. "zerocopy": a kernel reads or writes the host's memory itself.
    "auto": whatever is measured to be fastest when the cache is registered, which takes up to 100 ms.

    `options`: see `ClientOptions`.

    Raises `ConfigError`, which names the option, for a value that cannot work. An engine that is not there is no error."""

    def __init__(
        self,
        fingerprint: bytes,
        *,
        world: int,
        rank: int,
        chunk_tokens: int,
        model: str = "",
        dtype: str = "",
        checksum: str = "off",
        copy_threads: int | None = None,
        copy: str = "auto",
        **options: Unpack[ClientOptions],
    ) -> None: ...
    def register_kv_caches(self, groups: Sequence[KvGroup], owner: object = None, device: int | None = None) -> None:
        """Registers this rank's KV cache, now and after every restart of the engine. Waits for the engine, without the GIL, for
        up to `register_timeout_ms`, and goes on without it: until it is there, stores are dropped and loads fail.

        `groups`: one for each block table; the block ids of a chunk are those of the first group, then those of the second,
        and so on. `owner`: an object that is kept alive for as long as the memory may be touched. `device`: the CUDA device in
        whose memory the groups' addresses are, as this process counts devices (torch's index); `None` for host memory.

        Raises `RegisterError` where ranks disagree, or a chunk can never fit into the arena. Raises `LayoutError`, with the
        reason, for memory that cannot be copied from and to: there is no CUDA driver or no such device, the addresses are not
        that device's, or the driver or the layout does not allow the `copy` that was asked for."""

    @property
    def shard_bytes(self) -> int:
        """The bytes of this rank's part of a chunk; 0 before `register_kv_caches`."""

    @property
    def blocks_per_chunk(self) -> int:
        """The number of block ids that name a chunk, those of all groups together; 0 before `register_kv_caches`."""

    def submit_store(
        self,
        request: str,
        round: tuple[int, int],
        keys: Sequence[bytes],
        blocks: Sequence[int],
        parent: bytes | None = None,
        stream: int | None = None,
    ) -> int:
        """Stores chunks, and returns the job's id. The blocks must keep their content until the job is reported or flushed.

        `request`: the name of the request. `round`: (source, number), the same on all ranks. `keys`: one for each chunk, in chain
        order; bytes of which the first `KEY_BYTES` count. `blocks`: the block ids of the first chunk, then those of the second,
        and so on, `blocks_per_chunk` for each. `parent`: the key before the first one, if there is one.

        `stream`: for a cache on a GPU, the stream that computes (a `CUstream`; torch's `Stream.cuda_stream`). The copy reads
        after everything that is on that stream at the time of this call, and needs no other waiting. `None`: the default stream.
        For host memory it is ignored, and the content must be there already.

        Raises `LayoutError` for block ids that the cache does not have, or a wrong number of them; `ConfigError` for a key that
        is too short; and `KvringError` before `register_kv_caches`, after `shutdown`, while the stream is captured into a CUDA
        graph, and when the GPU has failed. No job has been taken then."""

    def submit_load(self, request: str, handles: bytes, blocks: Sequence[int], stream: int | None = None) -> int:
        """Loads chunks from where a lookup found them, and returns the job's id. The blocks belong to the job until it is
        reported.

        `request`: the name of the request. `handles`: what `Hit.handles` returned. `blocks`: the block ids for the
        first chunk, then those for the second, and so on, `blocks_per_chunk` for each; `SKIP` for a page that must not be
        written.

        `stream`: as for `submit_store`. The copy writes after everything that is on that stream at the time of this call. When
        the load is reported, its bytes are there for whatever is put on any stream from then on.

        Raises what `submit_store` raises, and `ConfigError` for `handles` that are not from `Hit.handles` of this release."""

    def get_finished(self) -> list[Finished]:
        """Returns the jobs that have ended since the last call, each exactly once.

        Raises `DeviceError` when a load is lost: a GPU may still write into the KV cache, and nothing may be computed from it."""

    def get_block_ids_with_load_errors(self) -> list[int]:
        """Returns the ids of the blocks whose load has failed since the last call. A load's blocks are here no later than its
        report is in `get_finished`: call that first."""

    def flush(self, jobs: Sequence[int]) -> None:
        """To be called before the blocks that these stores read are given to somebody else: when it returns, the stores read them
        no more, whatever the engine does. Waits, without the GIL, for copies that run, and for each store that is still to be
        copied until `flush_timeout_ms` after its submission. `jobs`: ids of `submit_store`. Jobs that are unknown, or have ended,
        are ignored."""

    def handle_preemptions(self, requests: Sequence[str] | None = None) -> None:
        """As `flush`, for all stores of these requests, by name; `None`: for all stores."""

    def wait_some(self, timeout_ms: float) -> bool:
        """Waits, without the GIL, until fewer jobs are open than now. Returns false after `timeout_ms` milliseconds.

        Raises `DeviceError` as `get_finished` does."""

    def wait_job(self, job: int, timeout_ms: float) -> bool:
        """Waits, without the GIL, until this job has ended; true also for an unknown job. Returns false after `timeout_ms`
        milliseconds.

        Raises `DeviceError` as `get_finished` does."""

    def wait_idle(self, timeout_ms: float) -> bool:
        """Waits, without the GIL, until no job is open. Returns false after `timeout_ms` milliseconds.

        Raises `DeviceError` as `get_finished` does."""

    def wait_ready(self, timeout_ms: float) -> bool:
        """Waits, without the GIL, until the engine is there and has answered this rank's registration, if there is one. Returns
        false after `timeout_ms` milliseconds, and after `shutdown`; `health` then says why. For tools and tests: vLLM goes on
        without an engine."""

    def is_healthy(self) -> bool:
        """Says whether the engine is there and well, and has accepted this rank's registration. Takes a few loads."""

    def health(self) -> str:
        """Returns "healthy", or what the engine is instead for this rank: "absent", "dead", "recovering", "attaching", "stalled",
        "unhealthy", "refused: " or "incompatible: " and the reason, or "shut down"."""

    def client_stats(self) -> dict[str, int]:
        """Returns counts of what this client has seen of its engine, by name: attachments, deaths, restarts, stalls, and more."""

    def shutdown(self) -> None:
        """Finishes the open jobs, without the GIL: waits for them for up to `drain_timeout_ms`, and for copies that run however
        long they take. Afterwards nothing of this adapter touches the KV cache any more. A second call does nothing."""
