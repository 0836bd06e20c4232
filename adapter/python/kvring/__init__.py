"""kvring: vLLM's KV cache in shared memory, kept when GPU memory is needed for something else.

Words: a *chunk* is the KV of some tokens, named by a *key* that covers its whole prefix (`bytes`, of which the first 16
count); a *shard* is one rank's part of a chunk; an *admission* is one life of a request in the scheduler; a *fingerprint* (32
bytes) names a namespace: a digest of everything that keys do not cover.

* `PollingSchedulerAdapter`: which chunks of a prompt are there?
* `WorkerAdapter`: stores and loads one rank's paged KV cache, described by `KvGroup`.
* `ClientOptions`: the options that all of these take.
* `Engine`: starts and stops an engine; `engine_state`: an engine's state; `engine_name` checks a name, and `byte_size` reads a
  size, as `kvring serve` does.

No engine, a dead one or a stopped one is never an exception. Lookups and loads need shared memory alone, so they go on while an
engine is stopped, dead or starting again; stores are dropped meanwhile. Without any engine lookups find 0 chunks. The adapters
log to `logging`, below the logger `kvring`, from the level on that `set_log_level` sets.
"""

from importlib.metadata import PackageNotFoundError as _NotFound
from importlib.metadata import version as _version

from ._native import (
    KEY_BYTES,
    SKIP,
    ConfigError,
    DeviceError,
    EngineError,
    Finished,
    Hit,
    KvGroup,
    KvringError,
    LayoutError,
    PollingSchedulerAdapter,
    RegisterError,
    WorkerAdapter,
    byte_size,
    engine_name,
    engine_state,
    set_log_level,
)
from .engine import Engine, binary_path
from .options import ClientOptions

try:
    __version__ = _version("kvring")
except _NotFound:  # The directory alone, without its installation.
    __version__ = "0"

__all__ = [
    "KEY_BYTES",
    "SKIP",
    "ClientOptions",
    "ConfigError",
    "DeviceError",
    "Engine",
    "EngineError",
    "Finished",
    "Hit",
    "KvGroup",
    "KvringError",
    "LayoutError",
    "PollingSchedulerAdapter",
    "RegisterError",
    "WorkerAdapter",
    "__version__",
    "binary_path",
    "byte_size",
    "engine_name",
    "engine_state",
    "set_log_level",
]
