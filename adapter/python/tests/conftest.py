"""Engines and memory for the tests: an engine of its own for each test, or one for those that do it no harm."""

import ctypes
import glob
import hashlib
import itertools
import os
import subprocess
import sys
import time

import pytest

import kvring

LIMIT_MS = 86_400_000
"""As good as for ever: no test has a limit by the clock, which a slow machine would meet. `tests/watch` ends what hangs."""

PATIENT = {f"{what}_ms": LIMIT_MS for what in ("attach_timeout", "register_timeout", "operation_timeout", "stall_after")}
FINGERPRINT = bytes(range(32))
_count = itertools.count()
_names = []


def unique_name():
    name = f"t-{os.getpid()}-{next(_count)}"
    _names.append(name)
    return name


def eventually(state, what="it"):
    """Waits until `state()` is true. Looks come seldomer the longer it takes: a wait in vain stands still, for `tests/watch`."""
    looks = 0
    while not state():
        looks += 1
        if looks % 1000 == 0:
            print(f"still waiting, after {looks} looks: {what}", file=sys.__stderr__, flush=True)
        time.sleep(min(0.001 * (1 + looks // 50), 0.1))


def keys(tag, count):
    return [hashlib.sha256(f"{tag} {index}".encode()).digest() for index in range(count)]


class Memory:
    """`blocks` pages of `page` bytes, with `room` bytes after each."""

    def __init__(self, blocks, page, room=0):
        self.blocks, self.page, self.stride = blocks, page, page + room
        self.buffer = ctypes.create_string_buffer(b"\xa5" * (blocks * self.stride), blocks * self.stride)
        self.address = ctypes.addressof(self.buffer)

    def tensor(self):
        return (self.address, (self.blocks, self.page), (self.stride, 1), 1)

    def fill(self, block, byte):
        ctypes.memset(self.address + block * self.stride, byte, self.page)

    def read(self, block):
        return ctypes.string_at(self.address + block * self.stride, self.page)

    def room(self):
        return b"".join(
            ctypes.string_at(self.address + block * self.stride + self.page, self.stride - self.page)
            for block in range(self.blocks)
        )


@pytest.fixture
def engine():
    with kvring.Engine(unique_name(), "64MiB", extra_args=["--slab", "1MiB", "--beat-interval-ms", "5"]) as engine:
        yield engine


@pytest.fixture
def make(engine):
    """Adapters on the test's engine, attached, and shut down at its end."""
    made = []

    class Make:
        def worker(self, *groups, fingerprint=FINGERPRINT, owner=None, **options):
            options = {"world": 1, "rank": 0, "chunk_tokens": 16, "name": engine.name, **PATIENT, **options}
            worker = kvring.WorkerAdapter(fingerprint, **options)
            made.append(worker)
            if groups:
                worker.register_kv_caches(groups, owner=owner)
                eventually(worker.is_healthy, "the worker's health")
            return worker

        def polling(self, fingerprint=FINGERPRINT, **options):
            scheduler = kvring.PollingSchedulerAdapter(
                fingerprint, **{"name": engine.name, "lookup_timeout_ms": LIMIT_MS, **PATIENT, **options}
            )
            made.append(scheduler)
            eventually(scheduler.is_healthy, "the scheduler's health")
            return scheduler

        def scheduler(self, fingerprint=FINGERPRINT, **options):
            scheduler = kvring.SchedulerAdapter(fingerprint, **{"name": engine.name, **PATIENT, **options})
            made.append(scheduler)
            eventually(scheduler.is_healthy, "the scheduler's health")
            return scheduler

    yield Make()
    for adapter in made:
        adapter.shutdown()


@pytest.fixture(scope="session", autouse=True)
def nothing_is_left():
    yield
    for name in _names:
        subprocess.run([kvring.binary_path(), "remove", "--name", name], capture_output=True, check=False)
    left = [path for name in _names for path in glob.glob(f"/dev/shm/kvring.{name}.*")]
    assert not left, left
