"""Single edges of the connector's contract with vLLM."""

import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from harness.support import harness, want
from waiting import FOREVER_MS, wait_for

import kvring
from kvring.vllm.scheduler import SchedulerSide
from kvring.vllm.worker import WorkerSide

PROMPT = list(range(10, 74))


@pytest.fixture(scope="module")
def engine() -> Iterator[str]:
    name = f"edges-edges-{os.getpid()}"
    with kvring.Engine(name, "64MiB"):
        yield name


def test_a_request_is_told_of_only_those_bad_blocks_that_were_to_be_loaded(engine: str) -> None:
    """`load_cannot_be` names every block of the request, also those that vLLM had itself and that others are using: with
    `kv_load_failure_policy=fail` vLLM then ends those others as well."""
    side = SchedulerSide.__new__(SchedulerSide)
    side._next_job, side._loads, side._open_loads, side.load_waits = 0, [], {}, False
    side.trackers = {"r": SimpleNamespace(local_tokens=8, admission=0, settled=False, load=None)}
    side.geometry = SimpleNamespace(groups=(SimpleNamespace(tokens=4),), chunk_tokens=4)
    side.load_cannot_be("r", SimpleNamespace(get_block_ids=lambda: ([1, 2, 3, 4],)))
    assert side._loads[0].blocks == [3, 4]


def test_what_vllm_kept_through_our_reset_is_not_found_after_its_own(engine: str) -> None:
    """Weights are changed, and the reset finds a request running: vLLM keeps its blocks, but resets the connector. New requests
    find those blocks, and what they find is stored. Then the reset is tried again."""
    made = harness(engine, num_blocks=60)
    side = made.scheduler.connector.scheduler
    made.add(want("running", PROMPT, 30))
    while not made.wanted["running"].output:
        made.step()
    made.ledger.forget_stored()
    made.calls.cache_was_reset()
    assert not made.scheduler.reset_prefix_cache(reset_connector=True)
    before = made.ledger.counters["stored_chunks"]
    made.add(want("finds", PROMPT, 4))
    made.run(200)
    assert made.ledger.counters["stored_chunks"] > before, "nothing was stored: this test tests nothing"
    assert made.scheduler.reset_prefix_cache()
    made.add(want("later", PROMPT, 4))
    made.run(200)
    hit, salt = made.calls.hits["later"], side._salt
    # A reset that comes alone is no reason to forget anything.
    assert made.scheduler.reset_prefix_cache()
    blames = [str(one) for one in made.ledger.violations]
    made.shutdown()
    assert not hit and not blames, (hit, blames)
    assert side._salt == salt


def test_an_unfinished_request_does_not_lose_its_fence_when_the_report_of_its_load_is_lost(engine: str) -> None:
    """`request_finished` says False as long as `tracker.load` is set, and that is reset only after a call that may raise."""
    made = harness(engine, options={"load": "async"}, num_blocks=60, max_batched=64)
    made.add(want("warm", PROMPT[:16], 2))
    made.run(100)
    made.reset(running=False, connector=False)
    scheduler = made.scheduler.connector.scheduler
    inner = made.sessions._inner
    calls: list[Any] = []

    def once(request: str, admission: int, keep: int = 0) -> None:
        if keep == 0 and not calls:
            calls.append(request)
            raise RuntimeError("injected")
        inner.free_lookup_locks(request, admission, keep)

    made.sessions.free_lookup_locks = once
    made.faults.hold = 0.0
    made.add(want("a", PROMPT[:40], 8))
    for _ in range(8):
        made.step()
    made.faults.hold = 1.0
    made.run(200)
    left = sorted(scheduler.trackers)
    blames = [str(one) for one in made.ledger.violations]
    made.shutdown()
    assert calls
    assert not left and not blames, (left, blames)


def test_a_load_that_raises_anything_is_reported_and_so_are_those_behind_it() -> None:
    """Not only `KvringError`: MemoryError, a panic, a TypeError of ours."""
    side = WorkerSide.__new__(WorkerSide)
    from kvring.vllm.metadata import KvringMetadata, Load
    from kvring.vllm.stats import KvringStats

    class Adapter:
        def submit_load(self, *_: Any, stream: int | None) -> int:
            raise MemoryError

    side.adapter, side.stats, side.rank, side.device = Adapter(), KvringStats(), 0, None
    side.geometry = SimpleNamespace(shard_of=lambda rank: rank, groups=(None,))
    side._invalidates = True
    side._loads, side._outcomes, side._received, side._failed, side._invalid_blocks = {}, {}, set(), set(), set()
    loads = [Load(job, f"r{job}", 4, False, (b"",), [job]) for job in (1, 2)]
    try:
        side.start_loads(KvringMetadata(loads=loads))
    except MemoryError:
        pass  # The guard would answer it.
    assert side._received == {"r1", "r2"} and set(side._outcomes) == {1, 2} and side._invalid_blocks == {1, 2}


def test_a_load_that_fails_says_so_in_a_few_lines(caplog: pytest.LogCaptureFixture) -> None:
    """A prompt of 16k tokens is a thousand chunks; the engine's death is one event."""
    import ctypes
    import logging
    import time

    name = f"edges-flood-{os.getpid()}"
    memory = bytearray(64 * 4096)
    address = ctypes.addressof((ctypes.c_char * len(memory)).from_buffer(memory))
    with kvring.Engine(name, "64MiB"):
        worker = kvring.WorkerAdapter(b"f" * 32, world=1, rank=0, chunk_tokens=16, name=name)
        asker = kvring.PollingSchedulerAdapter(b"f" * 32, name=name, lookup_timeout_ms=FOREVER_MS)
        worker.register_kv_caches([kvring.KvGroup(64, 1, [(address, (64, 1024), (1024, 1), 4)])], owner=memory)
        keys = [bytes([index % 256, index // 256]) * 8 for index in range(1000)]
        wait_for(lambda: asker.is_healthy() and worker.is_healthy(), "both are attached")
        worker.submit_store("r", (1, 1), keys, [index % 64 for index in range(1000)])
        assert worker.wait_idle(FOREVER_MS)
        asker.begin_step()
        hit = asker.lookup("r", 0, keys)
        # The arena may still be being allocated.
        found = hit.chunks
        assert found >= 100
        shards = hit.shards(0, 0, found)
        # As after the arena has been made anew: none of the handles leads anywhere. Arena id: the first words of each record.
        altered = bytearray(shards)
        for at in range(16, len(altered), 56):
            altered[at] ^= 1
        shards = bytes(altered)
        kvring.set_log_level(logging.INFO)
        caplog.set_level(logging.INFO, "kvring")
        worker.submit_load("r", shards, [index % 64 for index in range(found)])
        assert worker.wait_idle(FOREVER_MS)
        time.sleep(1.0)
        worker.shutdown()
        asker.shutdown()
    lines = [record for record in caplog.records if "load failed" in record.getMessage()]
    assert len(lines) <= 5, f"{len(lines)} lines, the last one: {lines[-1].getMessage()}"


@pytest.mark.parametrize("key", ["lookup_timeout_ms", "stall_after_ms", "drain_timeout_ms", "poll_interval_us"])
@pytest.mark.parametrize("value", [1e300, 1e18])
def test_an_absurd_number_is_an_error_that_names_the_key(key: str, value: float, engine: str) -> None:
    try:
        made = harness(engine, num_blocks=60, options={key: value})
    except kvring.ConfigError as error:
        assert key in str(error)
    else:
        made.shutdown()


def test_a_prompt_of_more_chunks_than_a_lookup_asks_for_is_found_up_to_there(engine: str) -> None:
    most = 8192
    prompt = [3 + n * n % 977 for n in range(4 * (most + 40))]
    made = harness(engine, num_blocks=most + 100, max_model_len=len(prompt) + 16, max_batched=4096)
    for name in ("cold", "warm"):
        made.add(want(name, prompt, 4))
        made.run(100)
        made.check_idle(last=False)
        made.reset(running=False, connector=False)
    made.check_outputs()
    found = made.ledger.counters.get("hit_tokens", 0)
    # That it is not all of it is what a rule of the harness has to say against it.
    blames = [str(one) for one in made.ledger.violations if one.rule != "P5"]
    made.shutdown()
    assert not blames and found == 4 * most, (found, blames)


@pytest.mark.parametrize("copy", ["batch", "staged", "zerocopy"])
def test_a_way_of_copying_that_only_a_gpu_has_is_refused_on_a_cpu(copy: str, engine: str) -> None:
    with pytest.raises(kvring.ConfigError, match=r"kvring\.copy: .*CPU"):
        harness(engine, num_blocks=60, options={"copy": copy})
