"""Engines that start by themselves: races, what the dead leave behind, and what the loser of a race may touch."""

import glob
import os
import signal
import subprocess
import sys
import time

import kvring
import pytest
from kvring.vllm.autostart import Keeper

START = """
import sys, time
from kvring.vllm.autostart import Keeper
keeper = Keeper(sys.argv[1], "64MiB")
while time.time() < float(sys.argv[2]): pass
keeper.ensure()
print("pid", keeper._engine.pid if keeper._engine else 0, flush=True)
sys.stdin.read()
"""


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
    name = f"review-auto-{os.getpid()}-{time.monotonic_ns() % 100000}"
    yield name
    for pid in _pids(name):
        os.kill(pid, signal.SIGTERM)
    time.sleep(0.3)
    for path in glob.glob(f"/dev/shm/kvring.{name}.*"):
        os.unlink(path)


def test_of_several_that_start_at_once_all_find_an_engine(name: str) -> None:
    at = time.time() + 20
    command = [sys.executable, "-c", START, name, str(at)]
    procs = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(4)]
    said = [proc.communicate(b"", 100) for proc in procs]
    failed = [err.decode()[-600:] for proc, (_, err) in zip(procs, said) if proc.returncode]
    assert not failed, failed[0]
    assert len(_pids(name)) == 1


def test_who_finds_an_engine_does_not_empty_its_log(name: str) -> None:
    first = kvring.Engine(name, "64MiB", detach=True).start()
    path = first.log_path
    size = os.path.getsize(path)
    assert size > 0
    with pytest.raises(kvring.EngineError):
        # As a Keeper that lost the race.
        kvring.Engine(name, "64MiB", detach=True).start()
    text = open(path, "rb").read()
    os.kill(first.pid, signal.SIGTERM)
    assert len(text) >= size and b"\0" not in text, f"{size} bytes were there before, now: {text[:300]!r}"


def test_a_workers_dead_engine_does_not_stay_a_zombie(name: str) -> None:
    """Each worker's connector calls `ensure`, but only the scheduler's one looks after what it has started."""
    keeper = Keeper(name, "64MiB")
    keeper.ensure()
    pid = keeper._engine.pid
    os.kill(pid, signal.SIGKILL)
    time.sleep(1.0)
    state = open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[0]
    seen = kvring.engine_state(name)
    keeper.close()
    assert seen in ("absent", "dead"), seen
    assert state != "Z", "a zombie until this worker ends"


def test_closing_does_not_wait_for_an_engine_that_is_starting(name: str, monkeypatch) -> None:
    """vLLM's shutdown: `close` joins a thread that may be in `Engine.start`, for up to 30 s."""
    slow = kvring.Engine.start

    def start(self):
        time.sleep(8)
        return slow(self)

    monkeypatch.setattr(kvring.Engine, "start", start)
    keeper = Keeper(name, "64MiB")
    keeper.watch()
    time.sleep(1)
    began = time.monotonic()
    keeper.close()
    took = time.monotonic() - began
    assert took < 2, f"close took {took:.1f} s"
    time.sleep(0.5)
    assert kvring.engine_state(name) != "serving", "and an engine was started after the end"
