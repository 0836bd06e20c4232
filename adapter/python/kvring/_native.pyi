"""What the Rust side of the package offers. See `kvring/__init__.py` for the words used here."""

from collections.abc import Sequence
from typing import final

from typing_extensions import Unpack

from .options import ClientOptions

SKIP: int
"""As a block id of a load: this page is not written (vLLM holds it already, or has no block for it)."""

KEY_BYTES: int
"""Bytes of a chunk's key: 16. Longer hashes count by their first 16 bytes."""

KEYS_MAX: int
"""The most keys of one lookup; of a longer list the first ones are looked up, which is a right answer too."""

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
    """A size as `kvring serve --arena` takes it (`"8GiB"`, `"1.5G"`, `"4096"`), in bytes. Raises `ConfigError`."""

def engine_name(name: str) -> str:
    """A name as `kvring serve --name` takes it, unchanged. Raises `ConfigError`."""

def engine_state(name: str = "default") -> str:
    """How the engine of this name looks from outside: "serving", "recovering", "dead", "stopped" (asked to, with `--keep`),
    "absent" or "incompatible: why"."""

def client_defaults() -> ClientOptions: ...
def next_logs(timeout_ms: float) -> list[tuple[int, str, str]]:
    """Log records (`logging` level, target, text) of this process's adapters; waits for the first one, without the GIL.

    Empty after `timeout_ms`, and at once after `close_logs`."""

def close_logs() -> None:
    """Ends `next_logs`, for good: before the interpreter ends."""

def set_log_level(level: int) -> None:
    """Keeps records from this `logging` level on; `logging.INFO` to begin with. What is below costs nothing."""

@final
class Hit:
    """What a lookup found: the longest visible prefix, pinned for its request and admission."""

    @property
    def chunks(self) -> int: ...
    @property
    def world(self) -> int: ...
    def shards(self, rank: int, start: int, stop: int) -> bytes:
        """Where rank `rank` finds chunks `start` to `stop` (exclusive): for `WorkerAdapter.submit_load`, opaque here."""

@final
class SchedulerAdapter:
    """Lookups that are asked now and answered later."""

    def __init__(
        self,
        fingerprint: bytes,
        *,
        pending_timeout_ms: float = 30_000,
        **options: Unpack[ClientOptions],
    ) -> None: ...
    def submit_lookup(
        self, request: str, admission: int, keys: Sequence[bytes], every: int = 1, salt: bytes | None = None
    ) -> None:
        """Asks for the longest visible prefix of `keys[every - 1::every]`, once per request and admission.

        `salt`: 16 bytes that every key is XORed with, as what was stored under them must have been."""

    def check_lookup(self, request: str) -> Hit | None:
        """The answer; `None` while it is pending. A request that was never submitted has 0 chunks."""

    def is_current(self, request: str) -> bool:
        """Does the answer still hold? Not when the engine that gave it is gone: then this admission may be asked for again."""

    def free_lookup_locks(self, request: str, admission: int, keep: int = 0) -> None:
        """Gives up the pins beyond the first `keep` chunks. Unknown is fine."""

    def end_session(self, request: str) -> None:
        """Ends a request: its answer, its pending lookup, its pins. Unknown is fine."""

    def reset_cache(self) -> int:
        """Drops what this namespace holds and nobody has pinned; the number of chunks. Waits for the engine.

        Raises `EngineError` where the engine is not there to be asked."""

    def wait_ready(self, timeout_ms: float) -> bool:
        """Waits until the engine is there and has answered what this adapter has registered; without the GIL. False after
        `timeout_ms`, and after `shutdown`: then `health` says why. For tools and tests; vLLM goes on without an engine."""

    def is_healthy(self) -> bool:
        """Is the engine there and well? A few loads."""

    def health(self) -> str:
        """`healthy`, or what it is instead: absent, dead, recovering, attaching, stalled, unhealthy, refused: …"""

    def lookup_stats(self) -> dict[str, int]:
        """Counts of lookups: answered, degraded, timed_out, refused."""

    def client_stats(self) -> dict[str, int]:
        """Counts of what this client has seen of its engine: attachments, deaths, restarts, stalls …"""

    def open_sessions(self) -> int: ...
    def shutdown(self) -> None:
        """Ends the client. Idempotent."""

@final
class PollingSchedulerAdapter:
    """Lookups with a definite answer at once: spins, holding the GIL, for `poll_interval_us` (200, or 0 on one CPU; an answer
    takes a few microseconds, that of an engine that sleeps some 80), then waits without it. Where spinning brought nothing,
    most lookups wait at once."""

    def __init__(
        self,
        fingerprint: bytes,
        *,
        lookup_timeout_ms: float = 5.0,
        poll_interval_us: float | None = None,
        **options: Unpack[ClientOptions],
    ) -> None: ...
    def begin_step(self) -> None:
        """From here on all lookups together may wait for `lookup_timeout_ms`: a sick engine slows a scheduling step down
        by that much at most, however many requests ask. Without it each lookup may wait that long."""

    def lookup(self, request: str, admission: int, keys: Sequence[bytes], every: int = 1, salt: bytes | None = None) -> Hit:
        """The longest visible prefix of `keys[every - 1::every]`, pinned for this request and admission.

        Asked again for the same admission it is the same answer and no work; a timed-out 0 is an answer too."""

    def is_current(self, request: str) -> bool: ...
    def free_lookup_locks(self, request: str, admission: int, keep: int = 0) -> None: ...
    def end_session(self, request: str) -> None: ...
    def reset_cache(self) -> int: ...
    def wait_ready(self, timeout_ms: float) -> bool: ...
    def is_healthy(self) -> bool: ...
    def health(self) -> str: ...
    def lookup_stats(self) -> dict[str, int]: ...
    def client_stats(self) -> dict[str, int]: ...
    def open_sessions(self) -> int: ...
    def shutdown(self) -> None: ...

@final
class KvGroup:
    """Layers that share a block table."""

    def __init__(
        self,
        num_blocks: int,
        blocks_per_chunk: int,
        tensors: Sequence[tuple[int, Sequence[int], Sequence[int], int]],
    ) -> None:
        """`tensors`: one for each layer, in an order that is the same in every process: address of the first element, shape,
        strides (in elements) and bytes of an element. The first dimension counts blocks, or the same number of kernel
        blocks for each block. Pages are opaque bytes: a block's page may lie in several pieces.

        Raises `LayoutError` where the pages of two blocks overlap, or the first dimension is no multiple of `num_blocks`."""

    @property
    def planes(self) -> list[tuple[int, int, int]]:
        """The contiguous pieces that a block is made of: address for block 0, bytes from block to block, bytes."""

    @property
    def block_bytes(self) -> int:
        """Bytes of a block over all layers."""

@final
class Finished:
    """A job that has ended."""

    @property
    def job(self) -> int: ...
    @property
    def request(self) -> str: ...
    @property
    def is_store(self) -> bool: ...
    @property
    def done(self) -> int:
        """Chunks stored, or loaded and validated."""
    @property
    def skipped(self) -> int:
        """Of a store: chunks that were there already, or are being stored by somebody else."""
    @property
    def failed(self) -> int:
        """Chunks that a store dropped, or a load could not bring: see `why`."""
    @property
    def why(self) -> dict[str, int]:
        """Reasons, those that occurred, in chunks; they add up to `failed`."""
    @property
    def bytes(self) -> int: ...
    @property
    def seconds(self) -> float:
        """Time spent copying."""

@final
class WorkerAdapter:
    """Stores and loads of one rank's paged KV cache, in the background. Calls return at once unless they say otherwise."""

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
    ) -> None:
        """`copy_threads`: for a cache in host memory. `copy`: for one on a GPU, how its bytes are moved. "batch": DMA, one copy
        for each contiguous run; "staged": a kernel gathers or scatters in a buffer on the GPU, DMA moves that; "zerocopy": a
        kernel reads or writes the host's memory itself; "auto": what is measured to be fastest when the cache is registered
        (up to 100 ms). Ignored for host memory.

        Raises `ConfigError`, naming the option."""

    def register_kv_caches(self, groups: Sequence[KvGroup], owner: object = None, device: int | None = None) -> None:
        """Registers this rank's KV cache, now and after every restart of the engine; waits for the engine up to
        `register_timeout_ms`, and goes on without it. `owner` is kept alive as long as the memory may be touched.

        `device`: the CUDA device whose memory the groups' addresses are, as this process counts devices (torch's index);
        `None`: host memory.

        Raises `RegisterError` where ranks disagree or a chunk can never fit. Raises `LayoutError`, saying why, for memory that
        cannot be copied from and to: no CUDA driver or device, addresses that are not that device's, a `copy` that the driver
        or the layout does not allow."""

    @property
    def shard_bytes(self) -> int:
        """Bytes of this rank's part of a chunk; 0 before `register_kv_caches`."""
    @property
    def blocks_per_chunk(self) -> int:
        """Block ids that name a chunk: those of all groups, one group after the other."""

    def submit_store(
        self,
        request: str,
        round: tuple[int, int],
        keys: Sequence[bytes],
        blocks: Sequence[int],
        parent: bytes | None = None,
        stream: int | None = None,
    ) -> int:
        """Stores chunks in chain order; `blocks` are the block ids of one chunk after the other. `round`: (source,
        number), the same on all ranks. The blocks must keep their content until the job is reported, or flushed.

        `stream`: of a cache on a GPU, the stream that computes (a `CUstream`, torch's `Stream.cuda_stream`). The copy reads
        after everything that has been put on it so far, and nothing else has to be waited for. `None`: the default stream.
        Ignored for host memory, where the content must be there already.

        Raises `KvringError` while the stream is captured into a CUDA graph, and when the GPU has failed: nothing was taken."""

    def submit_load(self, request: str, shards: bytes, blocks: Sequence[int], stream: int | None = None) -> int:
        """Loads chunks from where a lookup found them; `SKIP` for pages that must not be written.

        `stream`: as for stores; the copy writes after everything that has been put on it so far (whoever still reads the
        blocks, or clears them). When the load is reported its bytes are there for whatever is put on any stream from then on."""

    def get_finished(self) -> list[Finished]:
        """Jobs that have ended since the last call, each exactly once."""

    def get_block_ids_with_load_errors(self) -> list[int]:
        """Blocks whose load has failed since the last call. A load's blocks are here no later than its report is there:
        call `get_finished` first."""

    def flush(self, jobs: Sequence[int]) -> None:
        """Before the blocks that these stores read are given to somebody else: when this returns they read them no more,
        whatever the engine does. Waits, without the GIL, for copies that run, and until `flush_timeout_ms` after its submission
        for each store that is still to be copied. Unknown and ended jobs are fine."""

    def handle_preemptions(self, requests: Sequence[str] | None = None) -> None:
        """`flush`, by request; `None`: all of them."""

    def wait_some(self, timeout_ms: float) -> bool:
        """Waits until fewer jobs are open than now; without the GIL."""

    def wait_job(self, job: int, timeout_ms: float) -> bool:
        """Waits until this job has ended; without the GIL."""

    def wait_idle(self, timeout_ms: float) -> bool:
        """Waits until no job is open; without the GIL."""

    def wait_ready(self, timeout_ms: float) -> bool: ...
    def is_healthy(self) -> bool: ...
    def health(self) -> str: ...
    def client_stats(self) -> dict[str, int]: ...
    def shutdown(self) -> None:
        """Finishes what is open (up to `drain_timeout_ms`; copies that run are always waited for). After it nothing touches
        the KV cache any more. Idempotent."""
