"""The options that every adapter takes."""

from typing import TypedDict


class ClientOptions(TypedDict, total=False):
    """The keyword arguments that every adapter takes. Times are in milliseconds (`_ms`) or microseconds (`_us`).

    * `name`: the engine's name, as in `kvring serve --name`; by default "default".
    * `client`: this client's name in `kvring status`; by default the process's name and id.
    * `attach_timeout_ms`: how long one attempt to attach may take before the next one; 5000.
    * `register_timeout_ms`: how long `register_kv_caches` waits for the engine; without one it is registered later; 5000.
    * `operation_timeout_ms`: how long a store, in the background, or `reset_cache` waits for the engine's answer; 2000.
    * `drain_timeout_ms`: how long `shutdown` waits for open jobs, and then for the engine's answer; 5000.
    * `flush_timeout_ms`: how long after its submission a store's copies may still begin, once its blocks are wanted; 200.
    * `stall_after_ms`: an engine that does not move for this long counts as stalled; 2000.
    * `spin_us`: how long a thread that waits for an answer of the engine spins before it sleeps; by default 20, and 0 on a single
      CPU. Lookups wait for no answer.
    """

    name: str
    client: str | None
    attach_timeout_ms: float
    register_timeout_ms: float
    operation_timeout_ms: float
    drain_timeout_ms: float
    flush_timeout_ms: float
    stall_after_ms: float
    spin_us: float | None
