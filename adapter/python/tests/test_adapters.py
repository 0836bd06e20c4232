"""Stores, lookups and loads; groups and skipped pages; arguments that are refused; engines that die, hang or are missing."""

import ctypes
import gc
import os
import signal
import threading
import time
import traceback
import weakref
from collections.abc import Sequence

import pytest
from conftest import FINGERPRINT, PATIENT, Memory, done, found, keys, load, store, unique_name
from waiting import FOREVER_MS, wait_for

import kvring
from kvring import SKIP, KvGroup, _logs


@pytest.mark.parametrize("checksum", ["off", "store", "verify"])
def test_what_is_stored_is_found_and_loaded(make, checksum):
    memory = Memory(16, 8192, room=64)
    worker = make.worker(KvGroup(16, 2, [memory.tensor()]), checksum=checksum, model="m", dtype="float32")
    assert (worker.shard_bytes, worker.blocks_per_chunk) == (16384, 2)
    room = memory.room()
    for block in range(8):
        memory.fill(block, block + 1)
    chain = keys("a", 4)
    report = store(worker, chain, list(range(8)))
    assert (report.request, report.is_store, report.done, report.failed, report.why) == ("r", True, 4, 0, {})
    assert report.bytes == 4 * 16384 and report.seconds > 0 and report.skipped == 0
    again = store(worker, chain[2:], range(4, 8), parent=chain[1])
    assert (again.done, again.skipped) == (0, 2)
    scheduler = make.scheduler()
    hit = found(scheduler, "q", chain + keys("b", 2), 4)
    report = load(worker, hit.handles(1, 4), (15, 14, 13, 12, 11, 10))
    assert (report.is_store, report.done, report.failed) == (False, 3, 0)
    assert [memory.read(15 - at) for at in range(6)] == [bytes([at + 3]) * 8192 for at in range(6)]
    assert memory.read(8) == b"\xa5" * 8192 and memory.room() == room
    assert worker.get_block_ids_with_load_errors() == [] and worker.get_finished() == []
    # The longest prefix of every second key.
    spread = tuple(key for pair in zip(keys("x", 4), chain) for key in pair)
    found(scheduler, "e", spread, 0)
    found(scheduler, "e", spread, 4, every=2)
    # The same answer for the same admission.
    assert [scheduler.lookup("same", 0, wanted).chunks for wanted in (chain[:2], [], chain)] == [2, 2, 2]
    assert scheduler.open_sessions() == 3
    scheduler.free_lookup_locks("same", 0, 1)
    for session in ("q", "e", "same", "nobody"):
        scheduler.end_session(session)
    assert scheduler.open_sessions() == 0
    assert scheduler.lookup_stats()["answered"] >= 3 and scheduler.client_stats()["attachments"] == 1
    wait_for(lambda: scheduler.reset_cache() == 4, "4 chunks are dropped")


def test_a_chunk_is_the_blocks_of_all_groups_and_those_that_are_skipped_are_not_written(make):
    one, two = Memory(8, 4096, room=16), Memory(8, 100, room=4)
    worker = make.worker(KvGroup(8, 2, [one.tensor()]), KvGroup(8, 1, [two.tensor()]), checksum="verify")
    assert (worker.blocks_per_chunk, worker.shard_bytes) == (3, 8292)
    one.fill(0, 1), one.fill(1, 2), two.fill(0, 3)
    assert store(worker, keys("a", 1), [0, 1, 0]).done == 1
    hit = found(make.scheduler(), "r", keys("a", 1), 1)
    report = load(worker, hit.handles(0, 1), [5, SKIP, 6])
    assert (report.done, report.failed) == (1, 0)
    assert one.read(5) == b"\1" * 4096 and two.read(6) == b"\3" * 100
    assert one.read(6) == b"\xa5" * 4096 and set(one.room() + two.room()) == {0xA5}
    assert load(worker, hit.handles(0, 1), [SKIP] * 3).done == 1
    with pytest.raises(kvring.LayoutError, match="got SKIP as the chunk's block 1"):
        store(worker, keys("b", 1), [0, SKIP, 0])
    # A failed load names the blocks that it had.
    stale = bytearray(hit.handles(0, 1))
    stale[4 * 8 + 3] ^= 8
    report = load(worker, bytes(stale), [5, SKIP, 7])
    assert (report.done, report.failed) == (0, 1) and sum(report.why.values()) == 1
    assert worker.get_block_ids_with_load_errors() == [5, 7]
    assert worker.get_block_ids_with_load_errors() == []


def test_a_wrong_argument_is_refused_with_what_was_expected(make):
    worker, memory = make.cached()
    scheduler, bare, other = make.scheduler(), make.worker(), make.worker(rank=1, world=2)
    assert (bare.shard_bytes, bare.blocks_per_chunk) == (0, 0)
    group = KvGroup(4, 1, [memory.tensor()])

    def ask(*arguments):
        return lambda: scheduler.lookup("r", 0, *arguments)

    def stores(count, blocks, by=worker):
        return lambda: by.submit_store("r", (1, 1), keys("a", count), blocks)

    def made(kind, fingerprint=FINGERPRINT, **options):
        return lambda: kind(fingerprint, **options)

    def made_worker(**options):
        return made(kvring.WorkerAdapter, **{"world": 1, "rank": 0, "chunk_tokens": 1} | options)

    for error, match, call in [
        (kvring.KvringError, "register_kv_caches", stores(1, [0], bare)),
        (TypeError, r"keys\[1\]: expected bytes of at least 16 bytes, got str", ask((bytes(16), "a"))),
        (TypeError, r"keys\[0\]: .* got int", ask(bytes(16))),
        (TypeError, "keys: expected a sequence, got int", ask(5)),
        (ValueError, r"keys\[3\]: expected at least 16 bytes, got 15", ask((b"", bytes(16), b"", bytes(15)), 2)),
        (kvring.ConfigError, "every", ask([], 0)),
        (kvring.LayoutError, "expected 1 block ids for each of 2 chunks, 2 in all, got 3", stores(2, [0, 1, 2])),
        (kvring.LayoutError, "expected block ids below 4, got 4", stores(1, [4])),
        (kvring.LayoutError, r"blocks\[0\]: .* got -1", stores(1, [-1])),
        (TypeError, "", stores(1, ["a"])),
        (kvring.ConfigError, "fingerprint: expected 32 bytes, got 3", made(kvring.PollingSchedulerAdapter, b"abc")),
        (kvring.ConfigError, "stall_after", made(kvring.PollingSchedulerAdapter, stall_after_ms=0)),
        (kvring.ConfigError, "spin_us", made(kvring.PollingSchedulerAdapter, spin_us=float("nan"))),
        (kvring.ConfigError, "name", made(kvring.PollingSchedulerAdapter, name="a/b")),
        (kvring.ConfigError, "checksum: expected off, store or verify", made_worker(checksum="on")),
        (kvring.ConfigError, 'copy: expected one of auto, batch, staged, zerocopy, got "dma"', made_worker(copy="dma")),
        (kvring.ConfigError, "rank", made_worker(rank=1)),
        (kvring.RegisterError, "expected 1, got 2", lambda: other.register_kv_caches([group])),
    ]:
        with pytest.raises(error, match=match):
            call()
    assert issubclass(kvring.ConfigError, kvring.KvringError) and issubclass(kvring.LayoutError, ValueError)
    assert issubclass(kvring.EngineError, RuntimeError) and issubclass(kvring.EngineError, kvring.KvringError)
    assert not issubclass(kvring.RegisterError, ValueError)


def test_hostile_handles_are_refused_or_fail(make):
    worker, _ = make.cached()
    assert store(worker, keys("a", 2), [0, 1]).done == 2
    hit = found(make.scheduler(), "r", keys("a", 2), 2)
    good = hit.handles(0, 2)
    for arguments in [(0, 3), (2, 1)]:
        with pytest.raises(ValueError, match="expected 0 <= start <= stop <= 2"):
            hit.handles(*arguments)
    assert load(worker, hit.handles(2, 2), []).done == 0
    wrong = [b"", b"kvr", good[:-1], good + b"\0", good[8:], os.urandom(len(good)), bytes(32), good[:32] + good]
    wrong += [good[:7] + b"\2" + good[8:], good[:8] + b"\xff" * 8 + good[16:]]
    for data in wrong:
        with pytest.raises(ValueError, match="handles: expected"):
            worker.submit_load("r", data, [2, 3])
    with pytest.raises(TypeError, match="handles: expected bytes, got str"):
        worker.submit_load("r", "handles", [2, 3])
    # Any other byte changed is a chunk that is not there, or another arena.
    for at in range(16, len(good)):
        data = bytearray(good)
        data[at] ^= 0x41
        report = load(worker, bytes(data), [2, 3])
        assert (report.done, report.failed) == ((0, 2) if at < 32 else (1, 1)), at
    assert set(worker.get_block_ids_with_load_errors()) == {2, 3}


def dropped(scheduler):
    """How many chunks a reset has dropped; `None`: there is still too much that the engine is to be told first."""
    try:
        return scheduler.reset_cache()
    except kvring.EngineError as error:
        assert "busy" in str(error), error
        return None


def test_an_engine_that_is_stopped_costs_no_hit(make, engine):
    (worker, memory), scheduler = make.cached(), make.scheduler()
    chain = keys("a", 2)
    memory.fill(0, 5), memory.fill(1, 6)
    assert store(worker, chain, [0, 1]).done == 2
    os.kill(engine.pid, signal.SIGSTOP)
    try:
        # More than fit into the ring of what it is to be told.
        for at in range(1000):
            hit = found(scheduler, f"r{at}", chain, 2)
        assert load(worker, hit.handles(0, 2), [2, 3]).done == 2
        assert (memory.read(2), memory.read(3)) == (b"\5" * 4096, b"\6" * 4096)
        assert all(scheduler.is_current(f"r{at}") for at in range(1000))
        assert scheduler.open_sessions() == 1000
    finally:
        os.kill(engine.pid, signal.SIGCONT)
    # Once it goes on it is told what is held: none of that is dropped, and all of it once it is released.
    wait_for(lambda: dropped(scheduler) == 0, "it is asked to drop what nobody holds")
    for at in range(1000):
        scheduler.end_session(f"r{at}")
    wait_for(lambda: dropped(scheduler) == 2, "both chunks are dropped")


def test_an_engine_that_is_killed_and_restarted_has_what_it_had(make, engine):
    worker, memory = make.cached()
    memory.fill(0, 7)
    scheduler, chain = make.scheduler(), keys("a", 1)
    assert store(worker, chain, [0]).done == 1
    hit = found(scheduler, "r", chain, 1)
    assert kvring.engine_state(engine.name) == "serving"
    engine.kill()
    wait_for(lambda: kvring.engine_state(engine.name) == "dead", "the engine is dead")
    wait_for(lambda: scheduler.health() == worker.health() == "dead", "both have noticed")
    assert not scheduler.is_healthy() and not worker.is_healthy()
    # What is there is found, held and loaded; only stores need an engine that lives.
    before = scheduler.lookup_stats()
    late = found(scheduler, "dead", chain, 1)
    after = scheduler.lookup_stats()
    assert after["not_serving"] == before["not_serving"] + 1 and after["degraded"] == before["degraded"]
    assert scheduler.is_current("r")
    with pytest.raises(kvring.EngineError):
        scheduler.reset_cache()
    report = store(worker, keys("b", 1), [0])
    assert (report.done, report.failed) == (0, 1) and report.why
    for handles, block in ((hit.handles(0, 1), 3), (late.handles(0, 1), 2)):
        assert load(worker, handles, [block]).done == 1
        assert memory.read(block) == b"\7" * 4096
    engine.start()
    wait_for(lambda: scheduler.is_healthy() and worker.is_healthy(), "both are attached again")
    found(scheduler, "after", chain, 1)
    assert scheduler.client_stats()["reattachments"] == 1
    # The next engine holds what was held under the earlier one, and what was found while there was none.
    assert scheduler.is_current("r") and scheduler.is_current("dead")
    for request in ("r", "dead", "after"):
        assert scheduler.reset_cache() == 0
        scheduler.end_session(request)
    wait_for(lambda: scheduler.reset_cache() == 1, "the chunk is dropped")


def test_an_engine_that_is_killed_again_and_again_costs_no_hit(make, engine):
    """Ten times a second: it is dead, or recovers, or has only just begun to serve, and nobody has attached to it."""
    (worker, memory), scheduler = make.cached(), make.scheduler()
    chain = keys("a", 2)
    memory.fill(0, 5), memory.fill(1, 6)
    assert store(worker, chain, [0, 1]).done == 2
    held = found(scheduler, "held", chain, 2)
    lives, wrong = 10, []

    def restart():
        try:
            for _ in range(lives):
                engine.kill()
                time.sleep(0.05)
                engine.start()
                time.sleep(0.05)
        except BaseException as error:
            wrong.append(error)

    thread = threading.Thread(target=restart)
    thread.start()
    asked = 0
    while thread.is_alive():
        hit = found(scheduler, "r", chain, 2)
        assert load(worker, hit.handles(0, 2), [2, 3]).done == 2
        assert (memory.read(2), memory.read(3)) == (b"\5" * 4096, b"\6" * 4096)
        memory.fill(2, 0), memory.fill(3, 0)
        assert scheduler.is_current("r") and scheduler.is_current("held")
        scheduler.end_session("r")
        asked += 1
    thread.join()
    assert not wrong and asked > lives and scheduler.lookup_stats()["not_serving"] > 0
    wait_for(lambda: scheduler.is_healthy() and worker.is_healthy(), "both are attached again")
    assert load(worker, held.handles(0, 2), [2, 3]).done == 2 and scheduler.reset_cache() == 0
    scheduler.end_session("held")
    wait_for(lambda: scheduler.reset_cache() == 2, "both chunks are dropped")


def test_an_answer_does_not_hold_once_an_engine_has_started_empty(make, engine):
    (worker, _), scheduler = make.cached(), make.scheduler()
    chain = keys("a", 1)
    assert store(worker, chain, [0]).done == 1
    hit = scheduler.lookup("r", 0, chain)
    assert hit.chunks == 1 and scheduler.is_current("r")
    engine.kill()
    engine.extra_args.append("--cold")
    engine.start()
    wait_for(lambda: scheduler.is_healthy() and worker.is_healthy(), "both are attached to it")
    assert not scheduler.is_current("r")
    assert scheduler.lookup("r", 0, chain).chunks == 0
    assert load(worker, hit.handles(0, 1), [1]).failed == 1
    # Nothing is there that could be gone: the answer holds.
    assert scheduler.is_current("r") and scheduler.is_current("nobody")


def test_without_an_engine_nothing_is_found_and_nothing_raises():
    name = unique_name()
    assert kvring.engine_state(name) == "absent"
    with pytest.raises(kvring.ConfigError):
        kvring.engine_state("a/b")
    scheduler = kvring.PollingSchedulerAdapter(FINGERPRINT, name=name)
    worker = kvring.WorkerAdapter(FINGERPRINT, world=1, rank=0, chunk_tokens=1, name=name, register_timeout_ms=1)
    worker.register_kv_caches([KvGroup(4, 1, [(memory := Memory(4, 4096)).tensor()])], owner=memory)
    assert not scheduler.wait_ready(1) and not worker.wait_ready(1)
    assert scheduler.lookup("r", 0, keys("a", 1)).chunks == 0
    assert store(worker, keys("a", 1), [0]).failed == 1
    wait_for(lambda: scheduler.health() == "absent" and worker.health() == "absent", "both have looked")
    for _ in range(2):
        worker.shutdown()
        scheduler.shutdown()
    assert scheduler.health() == "shut down"
    assert not scheduler.wait_ready(FOREVER_MS) and not worker.wait_ready(FOREVER_MS)
    with pytest.raises(kvring.KvringError):
        store(worker, keys("a", 1), [0])


def test_an_engine_of_another_release_is_no_error_and_the_log_says_what_came(caplog):
    with kvring.Engine(unique_name(), "64MiB", start_timeout_s=FOREVER_MS / 1000) as engine:

        def change_version(by):
            """Changes the ABI's version in the superblock, which a client reads before anything else."""
            with open(f"/dev/shm/kvring.{engine.name}.engine", "r+b") as segment:
                segment.seek(8)
                version = int.from_bytes(segment.read(4), "little") + by
                segment.seek(8)
                segment.write(version.to_bytes(4, "little"))
            return version

        came = change_version(70)
        assert kvring.engine_state(engine.name).startswith("incompatible")
        caplog.set_level("WARNING", "kvring")
        scheduler = kvring.PollingSchedulerAdapter(FINGERPRINT, name=engine.name)
        wait_for(lambda: scheduler.health().startswith("incompatible"), "the scheduler has looked")
        for number in (came - 70, came):
            assert str(number) in scheduler.health(), "expected, and what came"
        assert scheduler.lookup("r", 0, keys("a", 1)).chunks == 0
        wait_for(lambda: any(str(came) in text for text in caplog.messages), "a line says so")
        told = [text for text in caplog.messages if engine.name in text]
        assert len(told) == len(set(told)), told
        scheduler.shutdown()
        change_version(-70)


def test_salted_keys_are_other_keys(make):
    (worker, _), scheduler = make.cached(), make.scheduler()
    salt, plain = bytes(range(1, 17)), keys("salted", 2)
    stored = [bytes(a ^ b for a, b in zip(key, salt)) for key in plain]
    assert store(worker, stored, [0, 1]).done == 2
    found(scheduler, "stored", stored, 2)
    assert scheduler.lookup("salted", 0, plain, salt=salt).chunks == 2
    assert scheduler.lookup("plain", 0, plain).chunks == 0
    with pytest.raises(kvring.ConfigError, match="expected 16 bytes, got 3"):
        scheduler.lookup("wrong", 0, plain, salt=b"abc")


def test_flushes_and_preemptions_wait_for_stores_and_not_for_the_engine(make, engine):
    worker, _ = make.cached(64, 1 << 16)
    jobs = [worker.submit_store(f"r{at}", (1, at), keys(at, 16), range(at * 16, at * 16 + 16)) for at in range(4)]
    worker.flush([*jobs[:2], 999])
    worker.handle_preemptions(["r2"])
    worker.handle_preemptions()
    worker.flush([])
    assert worker.wait_idle(FOREVER_MS) and worker.wait_some(0) and worker.wait_job(12345, 0)
    assert sorted(report.job for report in worker.get_finished()) == jobs
    os.kill(engine.pid, signal.SIGSTOP)
    job = worker.submit_store("s", (1, 9), keys("s", 1), [0])
    assert not worker.wait_job(job, 1) and not worker.wait_some(1) and not worker.wait_idle(1)
    engine.kill()
    worker.flush([job])
    assert done(worker, job).failed == 1


def test_another_thread_runs_while_one_waits(make, engine):
    (worker, _), scheduler = make.cached(), make.scheduler()
    os.kill(engine.pid, signal.SIGSTOP)
    job = worker.submit_store("s", (1, 1), keys("s", 1), [0])
    answers = []
    calls = [
        lambda: scheduler.reset_cache() in (0, 1),
        lambda: worker.wait_job(job, FOREVER_MS),
        lambda: worker.wait_idle(FOREVER_MS),
        lambda: worker.flush([job]) is None,
    ]
    threads = [threading.Thread(target=lambda call=call: answers.append(call())) for call in calls]
    for thread in threads:
        thread.start()
    # This thread goes on meanwhile, and so do the calls that wait for nothing.
    for _ in range(1000):
        assert worker.get_finished() == [] and worker.shard_bytes == 4096
        scheduler.health(), worker.client_stats(), scheduler.is_healthy()
    assert len(answers) == 0 and all(thread.is_alive() for thread in threads)
    os.kill(engine.pid, signal.SIGCONT)
    for thread in threads:
        thread.join()
    assert answers == [True] * 4


def test_many_threads_may_use_one_adapter(make):
    (worker, _), scheduler = make.cached(64), make.scheduler()
    wrong = []

    def work(thread):
        for step in range(20):
            wanted = keys((thread, step), 4)
            job = worker.submit_store(f"{thread}", (thread, step), wanted, range(thread * 8, thread * 8 + 4))
            if not worker.wait_job(job, FOREVER_MS):
                wrong.append("a store")
            hit = scheduler.lookup(f"{thread} {step}", 0, wanted)
            if hit.chunks == 4:
                worker.submit_load(f"{thread}", hit.handles(0, 4), range(thread * 8 + 4, thread * 8 + 8))
            scheduler.end_session(f"{thread} {step}")

    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert worker.wait_idle(FOREVER_MS) and not wrong
    assert sum(report.is_store for report in worker.get_finished()) == 160
    assert scheduler.open_sessions() == 0


def test_the_owner_lives_as_long_as_its_memory_may_be_touched(make):
    class Owner:
        pass

    memories = [Memory(4, 4096), Memory(4, 4096)]
    owners = [Owner(), Owner()]
    known = [weakref.ref(owner) for owner in owners]
    worker = make.worker()
    for memory in memories:
        worker.register_kv_caches([KvGroup(4, 1, [memory.tensor()])], owner=owners.pop(0))
    gc.collect()
    assert known[0]() is None and known[1]() is not None
    worker.shutdown()
    gc.collect()
    assert known[1]() is None


def test_an_adapter_that_is_dropped_ends(engine):
    memory = Memory(4, 4096)
    worker = kvring.WorkerAdapter(FINGERPRINT, world=1, rank=0, chunk_tokens=1, name=engine.name)
    worker.register_kv_caches([KvGroup(4, 1, [memory.tensor()])])
    wait_for(worker.is_healthy, "the worker is attached")

    def movers():
        tasks = f"/proc/{os.getpid()}/task"
        return [open(f"{tasks}/{task}/comm").read().strip() for task in os.listdir(tasks)].count("kvring-mover")

    wait_for(lambda: movers() == 1, "its thread has begun")
    del worker
    gc.collect()
    wait_for(lambda: movers() == 0, "its thread has ended")


def test_a_forked_child_has_none_of_its_parents_adapters_and_may_have_its_own(make):
    (worker, _), scheduler = make.cached(), make.scheduler()
    chain = keys("a", 1)
    assert store(worker, chain, [0]).done == 1
    child = os.fork()
    if child == 0:
        code = 1
        try:
            for call in (
                lambda: store(worker, keys("b", 1), [0]),
                lambda: scheduler.lookup("r", 0, chain),
                scheduler.reset_cache,
            ):
                try:
                    call()
                    os._exit(2)
                except kvring.KvringError:
                    pass
            assert not scheduler.is_healthy() and not worker.is_healthy() and worker.get_finished() == []
            assert not scheduler.wait_ready(FOREVER_MS) and not worker.wait_ready(FOREVER_MS)
            scheduler.shutdown(), worker.shutdown()
            # Its own adapters have a log of their own.
            own = make.scheduler()
            found(own, "child", chain, 1)
            assert _logs._thread.is_alive() and _logs._pid == os.getpid()
            own.shutdown()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    found(scheduler, "r", chain, 1)


def test_a_group_is_made_of_tensors_or_refused():
    group = KvGroup(256, 1, [(4096, (256, 2, 32, 128), (8192, 4096, 128, 1), 4)])
    assert (group.planes, group.block_bytes) == ([(4096, 32768, 32768)], 32768)
    heads = KvGroup(10, 2, [(4096, [10, 4, 8], [8, 80, 1], 1)])
    assert heads.planes == [(4096 + 80 * head, 8, 8) for head in range(4)] and heads.block_bytes == 32
    assert KvGroup(5, 1, [(4096, (10, 8), (8, 1), 2)]).planes == [(4096, 32, 32)]
    for blocks, per_chunk, tensors in [
        (3, 1, [(4096, (4, 8), (8, 1), 2)]),
        (4, 1, [(4096, (4, 8), (4, 1), 2)]),
        (4, 1, [(4096, (4, 8), (0, 1), 2)]),
        (4, 1, [(4096, (4, 8), (-8, 1), 2)]),
        (4, 1, [(4096, (4, 8), (1 << 70, 1), 2)]),
        (4, 1, [(-1, (4, 8), (8, 1), 2)]),
        (4, 1, [(0, (4, 8), (8, 1), 2)]),
        (4, 1, []),
        (4, 0, [(4096, (4, 8), (8, 1), 2)]),
        (2, 1, [(4096, (2, 70_000), (140_000, 2), 1)]),
    ]:
        with pytest.raises(kvring.LayoutError, match="expected"):
            KvGroup(blocks, per_chunk, tensors)
    with pytest.raises(ValueError, match="length 4"):
        KvGroup(4, 1, [(4096, (4, 8))])


def test_a_prompt_of_a_million_tokens_in_blocks_of_16_is_looked_up_held_loaded_and_released():
    """65536 chunks, in one lookup and one load."""
    count, page, blocks = 1 << 16, 4096, 64
    # Lookups hold as much as there is, and the directory of chunks is half full.
    options = ["--max-chunks", str(2 * count), "--client-share", "1"]
    with kvring.Engine(unique_name(), "320MiB", extra_args=options, start_timeout_s=FOREVER_MS / 1000) as engine:
        memory = Memory(blocks, page)
        for block in range(blocks):
            memory.fill(block, block)
        worker = kvring.WorkerAdapter(FINGERPRINT, world=1, rank=0, chunk_tokens=16, **PATIENT | {"name": engine.name})
        worker.register_kv_caches([KvGroup(blocks, 1, [memory.tensor()])], owner=memory)
        scheduler = kvring.PollingSchedulerAdapter(FINGERPRINT, **PATIENT | {"name": engine.name})
        assert worker.wait_ready(FOREVER_MS) and scheduler.wait_ready(FOREVER_MS)
        chain, stored = keys("million", count + 1), 0
        # In an arena that is still being allocated there may be no room yet for all of them.
        while stored < count:
            part = slice(stored, min(stored + 4096, count))
            parent = chain[stored - 1] if stored else None
            store(worker, chain[part], [at % (blocks // 2) for at in range(part.start, part.stop)], parent=parent)
            stored = scheduler.lookup("counts", stored, chain).chunks
            scheduler.end_session("counts")
        hit = found(scheduler, "r", chain, count)
        again = scheduler.lookup("other", 7, chain)
        assert scheduler.is_current("r") and scheduler.reset_cache() == 0
        wanted = [SKIP] * count
        last = count - blocks // 2
        wanted[last:] = range(blocks // 2, blocks)
        report = load(worker, hit.handles(0, count), wanted)
        assert (report.done, report.failed) == (count, 0)
        for block in range(blocks // 2):
            assert memory.read(blocks // 2 + block) == bytes([(last + block) % (blocks // 2)]) * page
        # Its first half alone is still held, and then nothing is.
        scheduler.end_session("r")
        assert again.chunks == count
        scheduler.free_lookup_locks("other", 7, count // 2)
        wait_for(lambda: scheduler.reset_cache() == count // 2, "the second half is dropped")
        scheduler.end_session("other")
        wait_for(lambda: scheduler.reset_cache() == count // 2, "the first half is dropped")
        assert scheduler.lookup_stats()["cut"] == 0
        worker.shutdown(), scheduler.shutdown()


def test_of_a_list_only_a_few_keys_are_read_behind_a_miss(make):
    """A long prompt that nobody has seen costs next to nothing. What is read of it is checked."""
    (worker, _), scheduler = make.cached(), make.scheduler()
    chain = keys("a", 2)
    assert store(worker, chain, [0, 1]).done == 2
    unread = chain + keys("b", 30) + ["no key"] * 1000
    found(scheduler, "r", unread, 2)
    with pytest.raises(TypeError, match=r"keys\[32\]"):
        scheduler.lookup("tuple", 0, tuple(unread))
    assert scheduler.open_sessions() == 1


def test_keys_may_come_from_a_sequence_that_uses_the_adapter_itself(make):
    (worker, _), scheduler = make.cached(), make.scheduler()
    chain = keys("a", 2)
    assert store(worker, chain, [0, 1]).done == 2

    class Chain(Sequence):
        def __len__(self):
            return len(chain)

        def __getitem__(self, index):
            assert scheduler.lookup("inner", 0, chain).chunks == 2
            return chain[index]

    found(scheduler, "outer", Chain(), 2)
    assert scheduler.open_sessions() == 2


def test_a_key_has_so_many_bytes():
    assert ctypes.sizeof(ctypes.c_uint64) * 2 == kvring.KEY_BYTES
