"""A client of a kvring engine. It stores two chunks of a KV cache, looks them up, loads them into other blocks of the cache,
and compares the bytes. Start an engine in one terminal, and the client in another one:

    kvring serve --name example --arena 64MiB
    python examples/client.py example

`client.rs` does the same in Rust.
"""

import ctypes
import hashlib
import sys

import kvring

BLOCK = 4096
"""The bytes that one block of tokens takes in the KV cache."""
PATIENCE_MS = 3_600_000
"""How long this example waits for the engine to attach and to store. A lookup waits for nobody."""


def main(engine: str = "default") -> None:
    """Stores, looks up, loads and verifies."""
    # Ask first whether the engine is there: adapters that find none wait for it, and everything else goes on without it.
    if (state := kvring.engine_state(engine)) != "serving":
        sys.exit(f"expected an engine named {engine} that serves, it is {state}: start it with `kvring serve --name {engine}`")
    options = {"name": engine, "operation_timeout_ms": PATIENCE_MS, "stall_after_ms": PATIENCE_MS}

    # A namespace is named by a digest of all that decides what the bytes mean: the model, its weights, the dtype.
    fingerprint = hashlib.sha256(b"a model").digest()
    # A chunk is named by a key: usually a digest of all tokens up to the chunk's end.
    keys = [hashlib.sha256(tokens).digest() for tokens in (b"The first tokens", b"The first tokens and the next ones")]
    # The KV cache: four blocks in one tensor. Here a chunk is one block. The first two blocks have been computed.
    cache = ctypes.create_string_buffer(b"a" * BLOCK + b"b" * BLOCK, 4 * BLOCK)
    group = kvring.KvGroup(4, 1, [(ctypes.addressof(cache), (4, BLOCK), (BLOCK, 1), 1)])

    # A worker stores and loads. It is told once where the KV cache lies; the engine never sees these addresses.
    worker = kvring.WorkerAdapter(fingerprint, world=1, rank=0, chunk_tokens=16, **options)
    worker.register_kv_caches([group], owner=cache)
    # A scheduler looks up. It is usually in another process.
    scheduler = kvring.PollingSchedulerAdapter(fingerprint, **options)
    for adapter in (worker, scheduler):
        if not adapter.wait_ready(PATIENCE_MS):
            sys.exit(f"expected an engine named {engine} that serves, it is {adapter.health()}")

    # Store the chunks from blocks 0 and 1, in the background. A round, (source, number), is one store by all ranks.
    worker.wait_job(worker.submit_store("request 1", (1, 1), keys, [0, 1]), PATIENCE_MS)
    hit = scheduler.lookup("request 2", 0, keys)
    # Load what was found into blocks 2 and 3. Until the session ends, the engine keeps these chunks in place.
    worker.wait_job(worker.submit_load("request 2", hit.handles(0, hit.chunks), [2, 3][: hit.chunks]), PATIENCE_MS)
    scheduler.end_session("request 2")
    finished = worker.get_finished()
    scheduler.shutdown()
    worker.shutdown()

    # Verify.
    if hit.chunks != 2 or cache.raw[2 * BLOCK :] != cache.raw[: 2 * BLOCK]:
        sys.exit(f"expected 2 chunks with the bytes that were stored, got {hit} and {finished}")
    print(f"stored, found and loaded {hit.chunks} chunks; their bytes are the same")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except kvring.KvringError as error:
        sys.exit(f"error: {error}")
