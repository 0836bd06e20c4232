"""Engines that vLLM starts (`kvring.autostart`): races, dead engines, and engines that a user has stopped."""

import glob
import json
import os
import signal
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from waiting import wait_for

import kvring
from kvring.engine import binary_path
from kvring.vllm.autostart import Keeper


def _pids(name: str) -> list[int]:
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            words = open(f"/proc/{pid}/cmdline", "rb").read().split(b"\0")
        except OSError:
            continue
        if b"serve" in words and name.encode() in words:
            found.append(int(pid))
    return found


@pytest.fixture
def name():
    name = f"auto-{os.getpid()}-{time.monotonic_ns() % 100000}"
    yield name
    for pid in _pids(name):
        os.kill(pid, signal.SIGTERM)
    wait_for(lambda: not _pids(name), "the engines have ended")
    for path in glob.glob(f"/dev/shm/kvring.{name}.*"):
        os.unlink(path)
    log = kvring.Engine(name, "64MiB", detach=True).log_path
    if log is not None and os.path.exists(log):
        os.unlink(log)


def test_of_several_that_start_at_once_all_find_an_engine(name: str) -> None:
    barrier = threading.Barrier(4)

    def ensure() -> None:
        keeper = Keeper(name, "64MiB")
        barrier.wait()
        keeper.ensure()

    with ThreadPoolExecutor(4) as pool:
        for one in [pool.submit(ensure) for _ in range(4)]:
            one.result()
    assert kvring.engine_state(name) == "serving"
    assert len(_pids(name)) == 1


def test_a_second_engine_of_a_name_does_not_empty_the_log_of_the_first(name: str) -> None:
    first = kvring.Engine(name, "64MiB", detach=True).start()
    path = first.log_path
    # A thread of the engine's own writes its log: it may serve before the first line is there.
    wait_for(lambda: os.path.getsize(path) > 0, "the log has a line")
    size = os.path.getsize(path)
    with pytest.raises(kvring.EngineError):
        # A Keeper that has lost a race does this.
        kvring.Engine(name, "64MiB", detach=True).start()
    text = open(path, "rb").read()
    os.kill(first.pid, signal.SIGTERM)
    assert len(text) >= size and b"\0" not in text, f"{size} bytes were there before, now: {text[:300]!r}"


def test_an_engine_that_dies_is_started_again_and_leaves_no_zombie(name: str) -> None:
    keeper = Keeper(name, "64MiB")
    try:
        keeper.ensure()
        assert keeper._engine is not None
        pid = keeper._engine.pid
        keeper.watch()
        os.kill(pid, signal.SIGKILL)
        # It is not our child, so the process that takes orphans in reaps it.
        wait_for(lambda: not os.path.exists(f"/proc/{pid}"), "it is no zombie any more")
        wait_for(lambda: kvring.engine_state(name) == "serving", "another one serves")
    finally:
        keeper.close()


def _arena_bytes(name: str) -> int:
    said = subprocess.run([binary_path(), "status", "--json", "--name", name], stdout=subprocess.PIPE)
    return json.loads(said.stdout)["engine"]["arena_bytes"]


def _is_left_alone(keeper: Keeper, name: str) -> None:
    """The keeper has looked, several times, and started none."""
    wait_for(lambda: keeper._gone >= 3, "it looks, and looks again")
    # The one that was stopped may take longer to end than the keeper to look.
    wait_for(lambda: _pids(name) == [] or kvring.engine_state(name) == "serving", "nobody is there, or somebody else")
    assert kvring.engine_state(name) in ("absent", "stopped") and _pids(name) == []


def test_an_engine_that_a_user_stops_stays_so_until_the_user_or_a_new_vllm_starts_one(name: str, caplog) -> None:
    keeper = Keeper(name, "64MiB")
    try:
        keeper.ensure()
        keeper.watch()
        with caplog.at_level("WARNING", logger="vllm.kvring"):
            os.kill(_pids(name)[0], signal.SIGTERM)
            _is_left_alone(keeper, name)
        said = [record.getMessage() for record in caplog.records if "stopped or removed" in record.getMessage()]
        assert len(said) == 1 and name in said[0], said
        # A user starts one of another size.
        by_hand = kvring.Engine(name, "32MiB", detach=True).start()
        wait_for(lambda: keeper._gone == 0, "it is seen")
        os.kill(by_hand.pid, signal.SIGKILL)
        wait_for(lambda: kvring.engine_state(name) == "serving" and _pids(name) != [by_hand.pid], "it is started again")
        assert _arena_bytes(name) == 32 << 20, "with the size that it had"
        subprocess.run([binary_path(), "remove", "--force", "--name", name], check=True)
        _is_left_alone(keeper, name)
        # One that was stopped with --keep leaves its segments, but is not dead either.
        kept = kvring.Engine(name, "32MiB", extra_args=["--keep"], detach=True).start()
        wait_for(lambda: keeper._gone == 0, "it is seen")
        os.kill(kept.pid, signal.SIGTERM)
        _is_left_alone(keeper, name)
        assert kvring.engine_state(name) == "stopped"
        # A vLLM that starts anew has an engine.
        Keeper(name, "32MiB").ensure()
        assert kvring.engine_state(name) == "serving"
    finally:
        keeper.close()


def test_an_engine_is_not_bound_to_the_cpu_of_the_worker_that_starts_it(name: str) -> None:
    ours = os.sched_getaffinity(0)
    if len(ours) < 2:
        print("SKIPPED the part with CPUs: there is one")
    try:
        os.sched_setaffinity(0, {min(ours)})
        keeper = Keeper(name, "64MiB")
        keeper.ensure()
        assert keeper._engine is not None and keeper._engine.pid is not None
        assert os.sched_getaffinity(keeper._engine.pid) == ours
    finally:
        os.sched_setaffinity(0, ours)


def test_closing_does_not_wait_for_an_engine_that_is_starting(name: str, monkeypatch) -> None:
    """vLLM's shutdown: `close` meets a thread that may be in `Engine.start`, for up to 30 s."""
    starting, may_start = threading.Event(), threading.Event()
    start = kvring.Engine.start

    def slow(self):
        starting.set()
        may_start.wait()
        return start(self)

    monkeypatch.setattr(kvring.Engine, "start", slow)
    dead = kvring.Engine(name, "64MiB", detach=True)
    start(dead)
    dead.kill()
    keeper = Keeper(name, "64MiB")
    keeper.watch()
    starting.wait()
    assert keeper._thread is not None
    # If this waited, it would never return.
    keeper.close()
    assert keeper._thread.is_alive()
    # The start that had begun ends, and no other begins: the engine outlives this vLLM, as it should.
    may_start.set()
    keeper._thread.join()
    assert kvring.engine_state(name) == "serving"
