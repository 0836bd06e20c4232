"""Store, look up, load; groups and skipped pages; what is refused; what becomes of it all when the engine has trouble."""

import ctypes
import gc
import os
import signal
import threading
import traceback
import weakref

import pytest
from conftest import FINGERPRINT, LIMIT_MS, Memory, eventually, keys, unique_name

import kvring
from kvring import SKIP, KvGroup, _logs


def done(worker, job):
    assert worker.wait_job(job, LIMIT_MS)
    reports = {report.job: report for report in worker.get_finished()}
    return reports[job]


def lookup(scheduler, request, wanted, chunks, admission=0):
    """With patience: a machine that is busy may leave a lookup no time."""
    tries = iter(range(admission, admission + 1000))
    hit = None

    def found():
        nonlocal hit
        hit = scheduler.lookup(request, next(tries), wanted)
        return hit.chunks == chunks

    eventually(found, f"{chunks} chunks")
    return hit


@pytest.mark.parametrize("checksum", ["off", "store", "verify"])
def test_what_is_stored_is_found_and_loaded(make, checksum):
    memory = Memory(16, 8192, room=64)
    worker = make.worker(KvGroup(16, 2, [memory.tensor()]), checksum=checksum, model="m", dtype="float32")
    assert (worker.shard_bytes, worker.blocks_per_chunk) == (16384, 2)
    room = memory.room()
    for block in range(8):
        memory.fill(block, block + 1)
    chain = keys("a", 4)
    report = done(worker, worker.submit_store("r", (1, 1), chain, list(range(8))))
    assert (report.request, report.is_store, report.done, report.failed, report.why) == ("r", True, 4, 0, {})
    assert report.bytes == 4 * 16384 and report.seconds > 0 and report.skipped == 0
    again = done(worker, worker.submit_store("r", (1, 2), chain[2:], range(4, 8), parent=chain[1]))
    assert (again.done, again.skipped) == (0, 2)
    scheduler = make.polling()
    hit = lookup(scheduler, "q", chain + keys("b", 2), 4)
    assert hit.world == 1
    report = done(worker, worker.submit_load("q", hit.shards(0, 1, 4), (15, 14, 13, 12, 11, 10)))
    assert (report.is_store, report.done, report.failed) == (False, 3, 0)
    assert [memory.read(15 - at) for at in range(6)] == [bytes([at + 3]) * 8192 for at in range(6)]
    assert memory.read(8) == b"\xa5" * 8192 and memory.room() == room
    assert worker.get_block_ids_with_load_errors() == [] and worker.get_finished() == []
    # The same answer for the same admission; the longest prefix of every second key.
    assert scheduler.lookup("q", 0, []).chunks in (0, 4)
    spread = [key for pair in zip(keys("x", 4), chain) for key in pair]
    assert lookup(scheduler, "e", tuple(spread), 0).chunks == 0
    eventually(lambda: scheduler.lookup("e", next_admission(), tuple(spread), 2).chunks == 4)
    assert scheduler.open_sessions() == 2
    scheduler.free_lookup_locks("q", 0, 1)
    scheduler.end_session("q")
    scheduler.end_session("e")
    scheduler.end_session("nobody")
    assert scheduler.open_sessions() == 0
    assert scheduler.lookup_stats()["answered"] >= 3 and scheduler.client_stats()["attachments"] == 1
    eventually(lambda: scheduler.reset_cache() == 4, "4 chunks dropped")


_admissions = iter(range(100_000, 200_000))


def next_admission():
    return next(_admissions)


def test_the_asynchronous_scheduler(make):
    memory = Memory(4, 4096)
    worker = make.worker(KvGroup(4, 1, [memory.tensor()]))
    chain = keys("a", 3)
    assert done(worker, worker.submit_store("r", (1, 1), chain, [0, 1, 2])).done == 3
    scheduler = make.scheduler()
    assert scheduler.check_lookup("r").chunks == 0
    scheduler.submit_lookup("r", 0, chain)
    eventually(lambda: scheduler.check_lookup("r") is not None)
    assert scheduler.check_lookup("r").chunks == 3
    assert repr(scheduler.check_lookup("r")) == "Hit(chunks=3, world=1)"
    scheduler.end_session("r")


def test_groups_and_skipped_pages(make):
    one, two = Memory(8, 4096, room=16), Memory(8, 100, room=4)
    worker = make.worker(KvGroup(8, 2, [one.tensor()]), KvGroup(8, 1, [two.tensor()]), checksum="verify")
    assert (worker.blocks_per_chunk, worker.shard_bytes) == (3, 8292)
    one.fill(0, 1), one.fill(1, 2), two.fill(0, 3)
    assert done(worker, worker.submit_store("r", (1, 1), keys("a", 1), [0, 1, 0])).done == 1
    hit = lookup(make.polling(), "r", keys("a", 1), 1)
    report = done(worker, worker.submit_load("r", hit.shards(0, 0, 1), [5, SKIP, 6]))
    assert (report.done, report.failed) == (1, 0)
    assert one.read(5) == b"\1" * 4096 and two.read(6) == b"\3" * 100
    assert one.read(6) == b"\xa5" * 4096 and set(one.room() + two.room()) == {0xA5}
    assert done(worker, worker.submit_load("r", hit.shards(0, 0, 1), [SKIP] * 3)).done == 1
    with pytest.raises(kvring.LayoutError, match="got SKIP as the chunk's block 1"):
        worker.submit_store("r", (1, 2), keys("b", 1), [0, SKIP, 0])
    # A failed load names the blocks that it had.
    stale = bytearray(hit.shards(0, 0, 1))
    stale[16 + 3 * 8] ^= 8
    report = done(worker, worker.submit_load("r", bytes(stale), [5, SKIP, 7]))
    assert (report.done, report.failed) == (0, 1) and sum(report.why.values()) == 1
    assert worker.get_block_ids_with_load_errors() == [5, 7]
    assert worker.get_block_ids_with_load_errors() == []


def test_what_is_refused_says_what_was_expected(make, engine):
    memory = Memory(4, 4096)
    worker = make.worker(KvGroup(4, 1, [memory.tensor()]))
    scheduler = make.polling()
    bare = make.worker()
    assert (bare.shard_bytes, bare.blocks_per_chunk) == (0, 0)
    with pytest.raises(kvring.KvringError, match="register_kv_caches"):
        bare.submit_store("r", (1, 1), keys("a", 1), [0])
    with pytest.raises(TypeError, match=r"keys\[1\]: expected bytes of at least 16 bytes, got str"):
        scheduler.lookup("r", 0, [bytes(16), "a"])
    with pytest.raises(TypeError, match=r"keys\[0\]: .* got int"):
        scheduler.lookup("r", 0, bytes(16))
    with pytest.raises(TypeError, match="keys: expected a sequence, got int"):
        scheduler.lookup("r", 0, 5)
    with pytest.raises(ValueError, match=r"keys\[3\]: expected at least 16 bytes, got 15"):
        scheduler.lookup("r", 0, [b"", bytes(16), b"", bytes(15)], 2)
    with pytest.raises(kvring.ConfigError, match="every"):
        scheduler.lookup("r", 0, [], 0)
    with pytest.raises(kvring.LayoutError, match="expected 1 block ids for each of 2 chunks, 2 in all, got 3"):
        worker.submit_store("r", (1, 1), keys("a", 2), [0, 1, 2])
    with pytest.raises(kvring.LayoutError, match="expected block ids below 4, got 4"):
        worker.submit_store("r", (1, 1), keys("a", 1), [4])
    with pytest.raises(kvring.LayoutError, match=r"blocks\[0\]: .* got -1"):
        worker.submit_store("r", (1, 1), keys("a", 1), [-1])
    with pytest.raises(TypeError):
        worker.submit_store("r", (1, 1), keys("a", 1), ["a"])
    with pytest.raises(kvring.ConfigError, match="fingerprint: expected 32 bytes, got 3"):
        kvring.SchedulerAdapter(b"abc")
    with pytest.raises(kvring.ConfigError, match="stall_after"):
        kvring.SchedulerAdapter(FINGERPRINT, stall_after_ms=0)
    for wrong in (-1, float("nan")):
        with pytest.raises(kvring.ConfigError, match="lookup_timeout_ms"):
            kvring.PollingSchedulerAdapter(FINGERPRINT, lookup_timeout_ms=wrong)
    with pytest.raises(kvring.ConfigError, match="name"):
        kvring.SchedulerAdapter(FINGERPRINT, name="a/b")
    with pytest.raises(kvring.ConfigError, match="checksum: expected off, store or verify"):
        kvring.WorkerAdapter(FINGERPRINT, world=1, rank=0, chunk_tokens=1, checksum="on")
    with pytest.raises(kvring.ConfigError, match="rank"):
        kvring.WorkerAdapter(FINGERPRINT, world=1, rank=1, chunk_tokens=1)
    other = make.worker(rank=1, world=2)
    with pytest.raises(kvring.RegisterError, match="expected 1, got 2"):
        other.register_kv_caches([KvGroup(4, 1, [memory.tensor()])])
    assert issubclass(kvring.ConfigError, (kvring.KvringError)) and issubclass(kvring.LayoutError, ValueError)
    assert issubclass(kvring.EngineError, RuntimeError) and issubclass(kvring.EngineError, kvring.KvringError)
    assert not issubclass(kvring.RegisterError, ValueError)


def test_hostile_shards(make):
    memory = Memory(4, 4096)
    worker = make.worker(KvGroup(4, 1, [memory.tensor()]))
    assert done(worker, worker.submit_store("r", (1, 1), keys("a", 2), [0, 1])).done == 2
    hit = lookup(make.polling(), "r", keys("a", 2), 2)
    good = hit.shards(0, 0, 2)
    for arguments in [(1, 0, 1), (0, 0, 3), (0, 2, 1)]:
        with pytest.raises(ValueError, match="expected a rank below 1"):
            hit.shards(*arguments)
    assert done(worker, worker.submit_load("r", hit.shards(0, 2, 2), [])).done == 0
    wrong = [b"", b"kvr", good[:-1], good + b"\0", good[56:], os.urandom(16 + 112), bytes(16), good[:16] + good]
    wrong += [good[:7] + b"\2" + good[8:], good[:8] + b"\xff" * 8 + good[16:], good[:36] + b"\1" + good[37:]]
    for data in wrong:
        with pytest.raises(ValueError, match="shards: expected"):
            worker.submit_load("r", data, [2, 3])
    with pytest.raises(TypeError, match="shards: expected bytes, got str"):
        worker.submit_load("r", "shards", [2, 3])
    # Any other byte changed is a load that fails, or one that brings the right bytes.
    for at in range(16, len(good)):
        data = bytearray(good)
        data[at] ^= 0x41
        try:
            report = done(worker, worker.submit_load("r", bytes(data), [2, 3]))
        except ValueError:
            continue
        assert report.failed == 1 and report.done == 1, at
    assert set(worker.get_block_ids_with_load_errors()) == {2, 3}


def test_an_engine_that_does_not_answer_costs_a_step_one_timeout(make, engine):
    scheduler = make.polling(lookup_timeout_ms=100)
    memory = Memory(4, 4096)
    worker = make.worker(KvGroup(4, 1, [memory.tensor()]))
    assert done(worker, worker.submit_store("r", (1, 1), keys("a", 1), [0])).done == 1
    lookup(scheduler, "before", keys("a", 1), 1)
    before = scheduler.lookup_stats()
    os.kill(engine.pid, signal.SIGSTOP)
    scheduler.begin_step()
    assert all(scheduler.lookup(f"r{at}", 0, keys("a", 1)).chunks == 0 for at in range(50))
    after = scheduler.lookup_stats()
    assert after["timed_out"] > before["timed_out"]
    assert after["timed_out"] + after["degraded"] - before["timed_out"] - before["degraded"] == 50
    # Nothing is asked of it while it is asleep; and it is used again when it is not.
    os.kill(engine.pid, signal.SIGCONT)
    scheduler.begin_step()
    assert scheduler.lookup("r0", 0, keys("a", 1)).chunks == 0
    eventually(lambda: (scheduler.begin_step(), scheduler.lookup("r0", next_admission(), keys("a", 1)).chunks)[1] == 1)


def test_kill_minus_nine_and_restart(make, engine):
    memory = Memory(4, 4096)
    worker = make.worker(KvGroup(4, 1, [memory.tensor()]))
    memory.fill(0, 7)
    scheduler = make.polling()
    assert done(worker, worker.submit_store("r", (1, 1), keys("a", 1), [0])).done == 1
    hit = lookup(scheduler, "r", keys("a", 1), 1)
    assert kvring.engine_state(engine.name) == "serving"
    engine.kill()
    eventually(lambda: kvring.engine_state(engine.name) == "dead")
    eventually(lambda: not scheduler.is_healthy() and not worker.is_healthy())
    eventually(lambda: scheduler.health() == "dead" and worker.health() == "dead")
    assert scheduler.lookup("dead", 0, keys("a", 1)).chunks == 0
    with pytest.raises(kvring.EngineError):
        scheduler.reset_cache()
    report = done(worker, worker.submit_store("r", (1, 2), keys("b", 1), [0]))
    assert (report.done, report.failed) == (0, 1) and report.why
    # What had been found is loaded while it is dead.
    assert done(worker, worker.submit_load("r", hit.shards(0, 0, 1), [3])).done == 1
    assert memory.read(3) == b"\7" * 4096
    engine.start()
    eventually(lambda: scheduler.is_healthy() and worker.is_healthy())
    lookup(scheduler, "after", keys("a", 1), 1)
    assert scheduler.client_stats()["reattachments"] == 1


def test_without_an_engine():
    name = unique_name()
    assert kvring.engine_state(name) == "absent"
    with pytest.raises(kvring.ConfigError):
        kvring.engine_state("a/b")
    scheduler = kvring.PollingSchedulerAdapter(FINGERPRINT, name=name)
    worker = kvring.WorkerAdapter(FINGERPRINT, world=1, rank=0, chunk_tokens=1, name=name, register_timeout_ms=1)
    memory = Memory(4, 4096)
    worker.register_kv_caches([KvGroup(4, 1, [memory.tensor()])])
    assert scheduler.lookup("r", 0, keys("a", 1)).chunks == 0
    assert done(worker, worker.submit_store("r", (1, 1), keys("a", 1), [0])).failed == 1
    eventually(lambda: scheduler.health() == "absent" and worker.health() == "absent")
    for _ in range(2):
        worker.shutdown()
        scheduler.shutdown()
    assert scheduler.health() == "shut down"
    with pytest.raises(kvring.KvringError):
        worker.submit_store("r", (1, 1), keys("a", 1), [0])


def test_an_engine_of_another_release_is_no_error_and_says_what_came(caplog):
    with kvring.Engine(unique_name(), "64MiB") as engine:
        # The ABI's version, in the superblock that is all a client has to go by.
        with open(f"/dev/shm/kvring.{engine.name}.engine", "r+b") as segment:
            segment.seek(8)
            version = int.from_bytes(segment.read(4), "little")
            segment.seek(8)
            segment.write((version + 70).to_bytes(4, "little"))
        assert kvring.engine_state(engine.name).startswith("incompatible")
        caplog.set_level("WARNING", "kvring")
        scheduler = kvring.PollingSchedulerAdapter(FINGERPRINT, name=engine.name)
        eventually(lambda: scheduler.health().startswith("incompatible"))
        for number in (version, version + 70):
            assert str(number) in scheduler.health(), "expected, and what came"
        assert scheduler.lookup("r", 0, keys("a", 1)).chunks == 0
        eventually(lambda: any(str(version + 70) in record.getMessage() for record in caplog.records))
        told = [record.getMessage() for record in caplog.records if engine.name in record.getMessage()]
        assert len(told) == len(set(told)), told
        scheduler.shutdown()
        with open(f"/dev/shm/kvring.{engine.name}.engine", "r+b") as segment:
            segment.seek(8)
            segment.write(version.to_bytes(4, "little"))


def test_salted_keys_are_other_keys(make):
    memory = Memory(4, 4096)
    worker, scheduler = make.worker(KvGroup(4, 1, [memory.tensor()]), owner=memory), make.polling()
    salt, plain = bytes(range(1, 17)), keys("salted", 2)
    stored = [bytes(a ^ b for a, b in zip(key, salt)) for key in plain]
    assert done(worker, worker.submit_store("r", (1, 1), stored, [0, 1])).done == 2
    assert lookup(scheduler, "stored", stored, 2).chunks == 2
    scheduler.begin_step()
    assert scheduler.lookup("salted", 0, plain, salt=salt).chunks == 2
    assert scheduler.lookup("plain", 0, plain).chunks == 0
    with pytest.raises(kvring.ConfigError, match="expected 16 bytes, got 3"):
        scheduler.lookup("wrong", 0, plain, salt=b"abc")


def test_flush_and_preemptions(make, engine):
    memory = Memory(64, 1 << 16)
    worker = make.worker(KvGroup(64, 1, [memory.tensor()]))
    jobs = [worker.submit_store(f"r{at}", (1, at), keys(at, 16), range(at * 16, at * 16 + 16)) for at in range(4)]
    worker.flush([*jobs[:2], 999])
    worker.handle_preemptions(["r2"])
    worker.handle_preemptions()
    worker.flush([])
    assert worker.wait_idle(LIMIT_MS) and worker.wait_some(0) and worker.wait_job(12345, 0)
    assert sorted(report.job for report in worker.get_finished()) == jobs
    os.kill(engine.pid, signal.SIGSTOP)
    job = worker.submit_store("s", (1, 9), keys("s", 1), [0])
    assert not worker.wait_job(job, 1) and not worker.wait_some(1) and not worker.wait_idle(1)
    engine.kill()
    worker.flush([job])
    assert done(worker, job).failed == 1


def test_another_thread_runs_while_one_waits(make, engine):
    memory = Memory(4, 4096)
    worker = make.worker(KvGroup(4, 1, [memory.tensor()]), operation_timeout_ms=LIMIT_MS)
    scheduler = make.polling(lookup_timeout_ms=LIMIT_MS)
    os.kill(engine.pid, signal.SIGSTOP)
    job = worker.submit_store("s", (1, 1), keys("s", 1), [0])
    answers = []
    calls = [
        lambda: scheduler.lookup("r", 0, keys("s", 1)).chunks in (0, 1),
        lambda: worker.wait_job(job, LIMIT_MS),
        lambda: worker.wait_idle(LIMIT_MS),
        lambda: worker.flush([job]) is None,
    ]
    threads = [threading.Thread(target=lambda call=call: answers.append(call())) for call in calls]
    for thread in threads:
        thread.start()
    # This one goes on meanwhile, and so do the calls that wait for nothing.
    for _ in range(1000):
        assert worker.get_finished() == [] and worker.shard_bytes == 4096
        scheduler.health(), worker.client_stats(), scheduler.is_healthy()
    assert len(answers) == 0 and all(thread.is_alive() for thread in threads)
    os.kill(engine.pid, signal.SIGCONT)
    for thread in threads:
        thread.join()
    assert answers == [True] * 4


def test_many_threads_on_one_adapter(make):
    memory = Memory(64, 4096)
    worker = make.worker(KvGroup(64, 1, [memory.tensor()]))
    scheduler = make.polling(lookup_timeout_ms=LIMIT_MS)
    wrong = []

    def work(thread):
        for step in range(20):
            wanted = keys((thread, step), 4)
            job = worker.submit_store(f"{thread}", (thread, step), wanted, range(thread * 8, thread * 8 + 4))
            if not worker.wait_job(job, LIMIT_MS):
                wrong.append("a store")
            hit = scheduler.lookup(f"{thread} {step}", 0, wanted)
            if hit.chunks == 4:
                worker.submit_load(f"{thread}", hit.shards(0, 0, 4), range(thread * 8 + 4, thread * 8 + 8))
            scheduler.end_session(f"{thread} {step}")

    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert worker.wait_idle(LIMIT_MS) and not wrong
    reports = worker.get_finished()
    assert sum(report.is_store for report in reports) == 160
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


def test_what_is_dropped_ends(engine):
    name = engine.name
    memory = Memory(4, 4096)
    worker = kvring.WorkerAdapter(FINGERPRINT, world=1, rank=0, chunk_tokens=1, name=name)
    worker.register_kv_caches([KvGroup(4, 1, [memory.tensor()])])
    eventually(worker.is_healthy)

    def movers():
        tasks = f"/proc/{os.getpid()}/task"
        return [open(f"{tasks}/{task}/comm").read().strip() for task in os.listdir(tasks)].count("kvring-mover")

    eventually(lambda: movers() == 1)
    del worker
    gc.collect()
    eventually(lambda: movers() == 0)


def test_fork(make):
    memory = Memory(4, 4096)
    worker = make.worker(KvGroup(4, 1, [memory.tensor()]))
    scheduler = make.polling()
    assert done(worker, worker.submit_store("r", (1, 1), keys("a", 1), [0])).done == 1
    child = os.fork()
    if child == 0:
        code = 1
        try:
            # The parent's are not ours.
            for call in (
                lambda: worker.submit_store("r", (1, 2), keys("b", 1), [0]),
                lambda: scheduler.lookup("r", 0, keys("a", 1)),
                scheduler.reset_cache,
            ):
                try:
                    call()
                    os._exit(2)
                except kvring.KvringError:
                    pass
            assert not scheduler.is_healthy() and not worker.is_healthy() and worker.get_finished() == []
            scheduler.shutdown(), worker.shutdown()
            # Its own are, with a log of its own.
            own = make.polling()
            lookup(own, "child", keys("a", 1), 1)
            assert _logs._thread.is_alive() and _logs._pid == os.getpid()
            own.shutdown()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    lookup(scheduler, "r", keys("a", 1), 1)


def test_groups_from_tensors():
    group = KvGroup(256, 1, [(4096, (256, 2, 32, 128), (8192, 4096, 128, 1), 4)])
    assert (group.planes, group.block_bytes) == ([(4096, 32768, 32768)], 32768)
    heads = KvGroup(10, 2, [(4096, [10, 4, 8], [8, 80, 1], 1)])
    assert heads.planes == [(4096 + 80 * head, 8, 8) for head in range(4)] and heads.block_bytes == 32
    assert KvGroup(5, 1, [(4096, (10, 8), (8, 1), 2)]).planes == [(4096, 32, 32)]
    for wrong in [
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
            KvGroup(*wrong)
    with pytest.raises(ValueError, match="length 4"):
        KvGroup(4, 1, [(4096, (4, 8))])


def test_more_keys_than_one_lookup_takes(make):
    scheduler = make.polling()
    assert scheduler.lookup("r", 0, [bytes(16)] * (kvring.KEYS_MAX + 5)).chunks == 0
    assert ctypes.sizeof(ctypes.c_uint64) * 2 == kvring.KEY_BYTES
