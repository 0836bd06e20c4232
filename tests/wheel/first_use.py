"""What somebody does first with the package: starts an engine, attaches a worker and a scheduler to it, stores two chunks, looks
them up, loads them into other blocks, and compares the bytes."""

import ctypes
import hashlib
import itertools
import os
import time

import kvring

BLOCK = 4096
LIMIT_MS = 86_400_000
"""As good as for ever: `tests/watch` ends what hangs."""

contents = [b"first".ljust(BLOCK), b"second".ljust(BLOCK)]
keys = [hashlib.sha256(content).digest() for content in contents]
# The KV cache: four blocks, one tensor. The last two are empty.
cache = ctypes.create_string_buffer(b"".join(contents), 4 * BLOCK)
group = kvring.KvGroup(4, 1, [(ctypes.addressof(cache), (4, BLOCK), (BLOCK, 1), 1)])
model = hashlib.sha256(b"a model").digest()

with kvring.Engine(f"wheel-{os.getpid()}", "16MiB", extra_args=["--slab", "1MiB"]) as engine:
    worker = kvring.WorkerAdapter(
        model, world=1, rank=0, chunk_tokens=16, name=engine.name, register_timeout_ms=LIMIT_MS, operation_timeout_ms=LIMIT_MS
    )
    worker.register_kv_caches([group], owner=cache)
    worker.wait_job(worker.submit_store("request 1", (1, 1), keys, [0, 1]), LIMIT_MS)

    scheduler = kvring.PollingSchedulerAdapter(model, name=engine.name, lookup_timeout_ms=LIMIT_MS)
    for admission in itertools.count():
        hit = scheduler.lookup("request 2", admission, keys)
        if hit.chunks:
            break
        # A scheduler that has not attached yet answers 0 chunks.
        time.sleep(0.01)
    worker.wait_job(worker.submit_load("request 2", hit.shards(0, 0, hit.chunks), [2, 3]), LIMIT_MS)
    scheduler.end_session("request 2")
    scheduler.shutdown()
    worker.shutdown()

assert hit.chunks == 2, hit.chunks
assert cache.raw[2 * BLOCK :] == b"".join(contents)
print(f"   kvring {kvring.__version__}: stored, found and loaded {hit.chunks} chunks")
