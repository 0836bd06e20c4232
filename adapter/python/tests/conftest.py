"""Engines, adapters and memory for the tests, and what all of them do with these."""

import ctypes
import glob
import hashlib
import itertools
import os
import pathlib
import subprocess
import sys

import pytest

import kvring
from kvring import KvGroup

# Behind this folder: `conftest` is this file, and not the one there.
sys.path.append(str(pathlib.Path(__file__).parents[3] / "tests" / "vllm"))

from waiting import FOREVER_MS, wait_for

PATIENT = {f"{what}_ms": FOREVER_MS for what in ("attach_timeout", "register_timeout", "operation_timeout", "stall_after")}
FINGERPRINT = bytes(range(32))
_count = itertools.count()
_names = []


def unique_name():
    name = f"t-{os.getpid()}-{next(_count)}"
    _names.append(name)
    return name


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


_rounds = itertools.count(1)
_admissions = itertools.count()


def done(worker, job):
    """The report of a job."""
    assert worker.wait_job(job, FOREVER_MS)
    return {report.job: report for report in worker.get_finished()}[job]


def store(worker, chain, blocks, **more):
    """The report of a store in a round of its own."""
    return done(worker, worker.submit_store("r", (1, next(_rounds)), chain, blocks, **more))


def load(worker, handles, blocks, **more):
    """The report of a load."""
    return done(worker, worker.submit_load("r", handles, blocks, **more))


def found(scheduler, request, wanted, chunks, every=1):
    """Looks up, in the request's next admission: so many chunks are found."""
    hit = scheduler.lookup(request, next(_admissions), wanted, every)
    assert hit.chunks == chunks, (hit, scheduler.health(), scheduler.lookup_stats())
    return hit


@pytest.fixture
def engine():
    options = ["--slab", "1MiB", "--beat-interval-ms", "5"]
    with kvring.Engine(unique_name(), "64MiB", extra_args=options, start_timeout_s=FOREVER_MS / 1000) as engine:
        yield engine


@pytest.fixture
def make(engine):
    """Adapters on the test's engine, attached, and shut down at its end."""
    made = []

    class Make:
        def worker(self, *groups, fingerprint=FINGERPRINT, owner=None, **options):
            fixed = {"world": 1, "rank": 0, "chunk_tokens": 16, "name": engine.name}
            worker = kvring.WorkerAdapter(fingerprint, **fixed | PATIENT | options)
            made.append(worker)
            if groups:
                worker.register_kv_caches(groups, owner=owner)
                wait_for(worker.is_healthy, "the worker is attached")
            return worker

        def cached(self, blocks=4, page=4096, **options):
            """A worker with one KV group, and its memory."""
            memory = Memory(blocks, page)
            return self.worker(KvGroup(blocks, 1, [memory.tensor()]), owner=memory, **options), memory

        def scheduler(self, fingerprint=FINGERPRINT, **options):
            scheduler = kvring.PollingSchedulerAdapter(fingerprint, **{"name": engine.name} | PATIENT | options)
            made.append(scheduler)
            wait_for(scheduler.is_healthy, "the scheduler is attached")
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
