"""Single edges of the connector's contract with vLLM."""

import ctypes
import json
import logging
import os
import subprocess
from types import SimpleNamespace
from typing import Any

import pytest
from harness.driver import Wanted
from harness.support import PROMPT, ends, forget, harness, is_right, run, worker_side
from real.engine import binary
from waiting import FOREVER_MS, wait_for

import kvring
from kvring.vllm.metadata import KvringMetadata, Load, Outcome
from kvring.vllm.scheduler import SchedulerSide
from kvring.vllm.stores import OpenStore
from kvring.vllm.tracker import OpenLoad


def test_a_request_is_told_of_only_those_bad_blocks_that_were_to_be_loaded() -> None:
    """`load_cannot_be` names every block of the request, also those that vLLM had itself and that others are using: with
    `kv_load_failure_policy=fail` vLLM then ends those others as well."""
    side = SchedulerSide.__new__(SchedulerSide)
    side._next_job, side._loads, side._open_loads, side.load_waits = 0, [], {}, False
    side.trackers = {"r": SimpleNamespace(local_tokens=8, admission=0, settled=False, load=None)}
    side.geometry = SimpleNamespace(groups=(SimpleNamespace(tokens=4),), chunk_tokens=4)
    side.load_cannot_be("r", SimpleNamespace(get_block_ids=lambda: ([1, 2, 3, 4],)))
    assert side._loads[0].blocks == [3, 4]


def test_a_job_ends_with_the_report_of_the_last_rank() -> None:
    """Until then that rank may read what the lease keeps. Of two ranks with the same bytes both load, and one stores."""
    side = SchedulerSide.__new__(SchedulerSide)
    side.geometry = SimpleNamespace(ranks=4, world=2)
    side._open_loads = {1: OpenLoad(1, "r", 0, False, 0, 0)}
    side.open_stores = {2: OpenStore(2, "r", 0, 0, 1, [1])}
    ended: list[int] = []
    side._load_ended, side._store_ended = lambda load: ended.append(load.job), ended.append
    for job in (1, 2, 1, 1):
        side._reported(job, Outcome(ranks=1))
    assert not ended
    for job in (2, 1):
        side._reported(job, Outcome(ranks=1))
    assert ended == [2, 1]


def test_what_vllm_kept_through_our_reset_is_not_found_after_its_own(engine: kvring.Engine) -> None:
    """Weights are changed, and the reset finds a request running: vLLM keeps its blocks, but resets the connector. New requests
    find those blocks, and what they find is stored. Then the reset is tried again."""
    made = harness(engine)
    side = made.scheduler.connector.scheduler
    made.add(Wanted("running", PROMPT, 30))
    while not made.wanted["running"].output:
        made.step()
    made.ledger.forget_stored()
    made.calls.cache_was_reset()
    assert not made.scheduler.reset_prefix_cache(reset_connector=True)
    before = made.ledger.counters["stored_chunks"]
    run(made, "finds", PROMPT, 4)
    assert made.ledger.counters["stored_chunks"] > before, "nothing was stored: this test tests nothing"
    assert made.scheduler.reset_prefix_cache()
    run(made, "later", PROMPT, 4)
    hit, salt = made.calls.hits["later"], side._salt
    # A reset that comes alone is no reason to forget anything.
    assert made.scheduler.reset_prefix_cache()
    made.shutdown()
    is_right(made)
    assert not hit and side._salt == salt


def test_an_unfinished_request_does_not_lose_its_fence_when_the_report_of_its_load_is_lost(engine: kvring.Engine) -> None:
    """`request_finished` says False as long as `tracker.load` is set, and that is reset only after a call that may raise."""
    made = harness(engine, options={"load": "async"}, max_batched=64)
    run(made, "warm", PROMPT[:16])
    forget(made)
    inner = made.sessions._inner
    calls: list[Any] = []

    def once(request: str, admission: int, keep: int = 0) -> None:
        if keep == 0 and not calls:
            calls.append(request)
            raise RuntimeError("injected")
        inner.free_lookup_locks(request, admission, keep)

    made.sessions.free_lookup_locks = once
    made.add(Wanted("a", PROMPT[:40], 8))
    for _ in range(8):
        made.step()
    made.faults.hold = 1.0
    made.run(200)
    left = sorted(made.scheduler.connector.scheduler.trackers)
    made.shutdown()
    is_right(made)
    assert calls and not left


def test_a_load_that_raises_anything_is_reported_and_so_are_those_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only `KvringError`: MemoryError, a panic, a TypeError of ours."""
    side, recorder = worker_side(monkeypatch)
    recorder.raises["load"] = MemoryError()
    side.start_loads(KvringMetadata(loads=[Load(job, f"r{job}", 4, False, (b"",), [job]) for job in (1, 2)]))
    assert side._received == {"r1", "r2"} and set(side._outcomes) == {1, 2} and side._invalid_blocks == {1, 2}


def test_a_load_that_fails_says_so_in_a_few_lines(engine: kvring.Engine, caplog: pytest.LogCaptureFixture) -> None:
    """A prompt of 16k tokens is a thousand chunks; the engine's death is one event."""
    memory = bytearray(64 * 4096)
    address = ctypes.addressof((ctypes.c_char * len(memory)).from_buffer(memory))
    worker = kvring.WorkerAdapter(b"f" * 32, world=1, rank=0, chunk_tokens=16, name=engine.name)
    asker = kvring.PollingSchedulerAdapter(b"f" * 32, name=engine.name)
    worker.register_kv_caches([kvring.KvGroup(64, 1, [(address, (64, 1024), (1024, 1), 4)])], owner=memory)
    keys = [bytes([index % 256, index // 256]) * 8 for index in range(1000)]
    wait_for(lambda: asker.is_healthy() and worker.is_healthy(), "both are attached")
    worker.submit_store("r", (1, 1), keys, [index % 64 for index in range(1000)])
    assert worker.wait_idle(FOREVER_MS)
    # The arena may still be being allocated: perhaps not all chunks had room.
    hit = asker.lookup("r", 0, keys)
    assert hit.chunks >= 100
    # As after the arena has been made anew: none of the handles leads anywhere. The arena's id follows magic and count.
    altered = bytearray(hit.handles(0, hit.chunks))
    altered[16] ^= 1
    kvring.set_log_level(logging.DEBUG)
    try:
        caplog.set_level(logging.DEBUG, "kvring")
        worker.submit_load("r", bytes(altered), [index % 64 for index in range(hit.chunks)])
        assert worker.wait_idle(FOREVER_MS)
        worker.shutdown()
        asker.shutdown()
        # Lines come in their order, so the earlier ones have come by then.
        wait_for(lambda: sum("shut down" in text for text in caplog.messages) >= 2, "both have said that they are shut down")
    finally:
        kvring.set_log_level(logging.INFO)
    lines = [record for record in caplog.records if "load failed" in record.getMessage() and record.levelno >= logging.INFO]
    assert len(lines) <= 5, f"{len(lines)} lines, the last one: {lines[-1].getMessage()}"


@pytest.mark.parametrize("key", ["lookup_timeout_ms", "stall_after_ms", "drain_timeout_ms"])
@pytest.mark.parametrize("value", [1e300, 1e18])
def test_an_absurd_number_is_an_error_that_names_the_key(key: str, value: float, engine: kvring.Engine) -> None:
    try:
        made = harness(engine, options={key: value})
    except kvring.ConfigError as error:
        assert key in str(error)
    else:
        made.shutdown()


def test_what_earlier_releases_had_about_waiting_is_accepted_and_one_line_says_so(
    engine: kvring.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("kvring.vllm.connector.logger.warning", lambda text, *values: said.append(text % values))
    old = {"lookup": "async", "lookup_timeout_ms": 0.001, "pending_timeout_ms": 0.001, "poll_interval_us": 0}
    made = harness(engine, options=old, max_batched=64)
    for name in ("cold", "warm"):
        run(made, name, PROMPT[:33])
        forget(made)
    assert made.calls.hits["warm"] == 32
    assert len(said) == 1 and all(f"kvring.{option}" in said[0] for option in old), said
    ends(made)


def test_a_prompt_of_a_million_tokens_is_looked_up_held_loaded_and_released() -> None:
    """In blocks of 16 tokens these are 65536 chunks: a lookup has no largest length."""
    tokens, block = 1 << 20, 16
    chunks = tokens // block
    prompt = [3 + n * n % 977 for n in range(tokens - 1)]
    # A chunk takes a page of memory.
    options = ["--max-chunks", str(2 * chunks), "--client-share", "1"]
    with kvring.Engine(f"million-{os.getpid()}", "320MiB", extra_args=options, start_timeout_s=FOREVER_MS / 1000) as engine:
        wait_for(lambda: _is_allocated(engine), "the whole arena is allocated")
        made = harness(engine, block_size=block, num_blocks=chunks + 100, max_model_len=tokens, max_batched=1 << 17)
        run(made, "cold", prompt, 1)
        made.check_idle(last=False)
        forget(made)
        run(made, "warm", prompt, 1)
        assert made.calls.hits["warm"] == (chunks - 1) * block
        ends(made)
        # Everything that was held has been given back.
        wait_for(lambda: not any(_counters(engine)[name] for name in ("leases", "pins")), "nothing is held any more")


def _status(engine: kvring.Engine) -> dict[str, Any]:
    said = subprocess.run([binary(), "status", "--name", engine.name, "--json"], check=True, stdout=subprocess.PIPE).stdout
    return json.loads(said)


def _is_allocated(engine: kvring.Engine) -> bool:
    arena = _status(engine)["engine"]
    return bool(arena["arena_bytes_allocated"] == arena["arena_bytes"])


def _counters(engine: kvring.Engine) -> dict[str, int]:
    return _status(engine)["counters"]


@pytest.mark.parametrize("copy", ["batch", "staged", "zerocopy"])
def test_a_way_of_copying_that_only_a_gpu_has_is_refused_on_a_cpu(copy: str, engine: kvring.Engine) -> None:
    with pytest.raises(kvring.ConfigError, match=r"kvring\.copy: .*CPU"):
        harness(engine, options={"copy": copy})
