"""Caches on a GPU, with the fake CUDA driver of `gpu-kernels/tests/fake`: its device memory is this process's, its streams are
threads. Each test runs in a process of its own that finds the fake in the place of the driver.
"""

import ctypes
import random

import pytest
from conftest import done, found, keys, load, store
from fake_gpu import Cuda, driver, with_driver
from waiting import FOREVER_MS, wait_for

import kvring
from kvring import KvGroup

__all__ = ["driver"]
MODES = ["auto", "batch", "staged", "zerocopy"]
LAYOUTS = ["BLHNC", "BLNHC", "BHLNC", "LBHNC", "LBNHC", "LHBNC"]
SIZES = {"B": 24, "L": 3, "H": 2, "N": 16, "C": 32}


class Cache:
    """A cache as vLLM lays it out, the outermost axis first."""

    def __init__(self, cuda, layout="BLHNC"):
        self.cuda = cuda
        strides, extent = {}, 1
        for axis in reversed(layout):
            strides[axis] = extent
            extent *= SIZES[axis]
        self.address, self.bytes = cuda.alloc(extent), extent
        ctypes.memset(self.address, 0xA5, extent)
        shape = [SIZES[axis] for axis in "BHNC"]
        self.tensors = [
            (self.address + layer * strides["L"], shape, [strides[axis] for axis in "BHNC"], 1) for layer in range(SIZES["L"])
        ]
        self.blocks = SIZES["B"]

    def group(self, per_chunk=1):
        self.made = KvGroup(self.blocks, per_chunk, self.tensors)
        return self.made

    def pieces(self, block):
        return [(address + block * stride, size) for address, stride, size in self.made.planes]

    def read(self, block):
        return b"".join(ctypes.string_at(address, size) for address, size in self.pieces(block))

    def write(self, block, seed):
        """Writes at once, while nothing is under way."""
        for address, size in self.pieces(block):
            ctypes.memmove(address, random.Random(f"{seed} {address}").randbytes(size), size)

    def compute(self, block, seed, delay_us):
        """Writes later, on the stream."""
        for address, size in self.pieces(block):
            self.cuda.fill(address, size, seed, delay_us)

    def computed(self, block, seed):
        return b"".join(self.cuda.pattern(size, seed) for _, size in self.pieces(block))


def on_gpu(request, cache, per_chunk=1, **options):
    worker = request.getfixturevalue("make").worker(**options)
    worker.register_kv_caches([cache.group(per_chunk)], device=0)
    wait_for(worker.is_healthy, "the worker is attached")
    return worker


@pytest.mark.parametrize("copy", MODES)
@with_driver()
def test_what_is_stored_is_loaded(request, copy):
    cuda = Cuda()
    for layout in LAYOUTS:
        cache = Cache(cuda, layout)
        # A namespace for each: their bytes are not the same.
        options = {"fingerprint": layout.encode().ljust(32), "checksum": "verify" if layout == "LHBNC" else "off"}
        worker = on_gpu(request, cache, 2, copy=copy, **options)
        assert len(cache.made.planes) == {"B": 1, "L": 3}[layout[0]] * (2 if layout == "LHBNC" else 1)
        for block in range(8):
            cache.write(block, block)
        before = [cache.read(block) for block in range(24)]
        report = store(worker, keys("a", 4), range(8), stream=cuda.stream)
        assert (report.done, report.failed, report.why) == (4, 0, {})
        hit = found(request.getfixturevalue("make").scheduler(options["fingerprint"]), "q", keys("a", 4), 4)
        # Without a stream: after the default one.
        blocks = [20, 9, kvring.SKIP, 11, 23, 10, 8, 22]
        report = load(worker, hit.handles(0, 4), blocks)
        assert (report.done, report.failed, report.why) == (4, 0, {})
        expected = list(before)
        for source, block in enumerate(blocks):
            if block != kvring.SKIP:
                expected[block] = before[source]
        assert [cache.read(block) for block in range(24)] == expected


def random_rounds(request, rounds):
    """Stores blocks that are still being computed, and loads into blocks that are still being written; the wrong rounds."""
    cuda = Cuda()
    cache = Cache(cuda, "LBNHC")
    worker = on_gpu(request, cache, copy=MODES[1 + rounds % 3])
    scheduler = request.getfixturevalue("make").scheduler()
    rng = random.Random(rounds)
    seeds = {}
    wrong = []
    for number in range(rounds):
        seed = 1 + number % 7
        source, target = rng.sample(range(cache.blocks), 2)
        key = keys(f"round {number}", 1)
        cache.compute(source, seed, rng.choice([0, 300, 1500]))
        job = worker.submit_store("r", (1, number + 1), key, [source], stream=cuda.stream)
        if rng.random() < 0.3:
            # The block's next owner, on the stream too.
            worker.flush([job])
            cache.compute(source, 99, rng.choice([0, 300]))
        if done(worker, job).done != 1:
            continue
        seeds[number] = (key, seed)
        old, (key, seed) = rng.choice(sorted(seeds.items()))
        # The block's last owner writes until the load may write.
        cache.compute(target, 98, rng.choice([0, 300, 1500]))
        request_id = f"{number} {old}"
        hit = found(scheduler, request_id, key, 1)
        report = load(worker, hit.handles(0, 1), [target], stream=cuda.stream)
        scheduler.end_session(request_id)
        if report.done:
            # Work that is on the stream must not follow the load and be looked at in its place.
            cuda.synchronize()
            if cache.read(target) != cache.computed(target, seed):
                wrong.append(number)
    assert len(seeds) > rounds / 2
    return wrong


@pytest.mark.parametrize("rounds", [150, 151, 152])
@with_driver(FAKE_CUDA_DELAY_US="300")
def test_copies_come_after_what_is_on_the_stream(request, rounds):
    assert random_rounds(request, rounds) == []


@with_driver(FAKE_CUDA_IGNORE="cuStreamWaitEvent")
def test_without_waiting_for_the_stream_this_would_be_seen(request):
    assert len(random_rounds(request, 40)) > 5


@with_driver()
def test_a_stream_that_is_captured_takes_no_copy(request):
    cuda = Cuda()
    cache = Cache(cuda)
    worker = on_gpu(request, cache)
    stream, graph = ctypes.c_void_p(cuda.stream), ctypes.c_void_p()
    assert store(worker, keys("a", 1), [0], stream=cuda.stream).done == 1
    hit = found(request.getfixturevalue("make").scheduler(), "q", keys("a", 1), 1)
    cuda.call("cuStreamBeginCapture_v2", stream, 0)
    with pytest.raises(kvring.KvringError, match="captured into a CUDA graph"):
        worker.submit_store("r", (1, 2), keys("b", 1), [0], stream=cuda.stream)
    with pytest.raises(kvring.KvringError, match="captured into a CUDA graph"):
        worker.submit_load("q", hit.handles(0, 1), [1], stream=cuda.stream)
    cuda.call("cuStreamEndCapture", stream, ctypes.byref(graph))
    assert worker.get_finished() == [] and worker.wait_idle(FOREVER_MS)
    assert store(worker, keys("b", 1), [0], stream=cuda.stream).done == 1


@with_driver(FAKE_CUDA_DEVICES="2")
def test_memory_that_is_not_the_devices_is_refused(request):
    cuda = Cuda()
    cache = Cache(cuda)
    worker = request.getfixturevalue("make").worker()
    for device, why in [(1, "got memory of device 0"), (2, "expected a CUDA device below 2, got 2")]:
        with pytest.raises(kvring.LayoutError, match=why):
            worker.register_kv_caches([cache.group()], device=device)
    host = ctypes.create_string_buffer(1 << 16)
    group = KvGroup(16, 1, [(ctypes.addressof(host), (16, 4096), (4096, 1), 1)])
    with pytest.raises(kvring.LayoutError, match=r"of device 0's memory .* got"):
        worker.register_kv_caches([group], owner=host, device=0)
    # A cache that reaches beyond its allocation.
    group = KvGroup(16, 1, [(cache.address, (16, 4096), (1 << 20, 1), 1)])
    with pytest.raises(kvring.LayoutError, match="got an allocation that ends at"):
        worker.register_kv_caches([group], device=0)
    with pytest.raises((OverflowError, TypeError)):
        worker.register_kv_caches([cache.group()], device=-1)
    # After all of these a right cache is still taken.
    worker.register_kv_caches([cache.group()], device=0)
    assert worker.shard_bytes == SIZES["L"] * SIZES["H"] * SIZES["N"] * SIZES["C"]


@with_driver(FAKE_CUDA_PTX_MAX="7.0")
def test_a_driver_that_is_too_old_for_kernels_copies_in_batches(request):
    cuda = Cuda()
    for copy in ["staged", "zerocopy"]:
        worker = request.getfixturevalue("make").worker(copy=copy)
        with pytest.raises(kvring.LayoutError, match=f"copy = {copy}: not possible here: the driver is too old"):
            worker.register_kv_caches([Cache(cuda).group()], device=0)
    cache = Cache(cuda)
    worker = on_gpu(request, cache)
    assert store(worker, keys("a", 1), [0], stream=cuda.stream).done == 1


@with_driver(FAKE_CUDA_DEVICES="0")
def test_a_driver_without_a_device_is_refused(request):
    memory = ctypes.create_string_buffer(1 << 16)
    group = KvGroup(16, 1, [(ctypes.addressof(memory), (16, 4096), (4096, 1), 1)])
    with pytest.raises(kvring.LayoutError, match="finds no device"):
        request.getfixturevalue("make").worker().register_kv_caches([group], owner=memory, device=0)


def test_where_there_is_no_driver_a_gpus_memory_is_refused(make):
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        pass
    else:
        pytest.skip("there is a CUDA driver here")
    memory = ctypes.create_string_buffer(1 << 16)
    group = KvGroup(16, 1, [(ctypes.addressof(memory), (16, 4096), (4096, 1), 1)])
    worker = make.worker()
    with pytest.raises(kvring.LayoutError, match=r"no CUDA driver here: libcuda\.so\.1"):
        worker.register_kv_caches([group], owner=memory, device=0)
    # Copies of host memory have no use for a stream.
    worker.register_kv_caches([group], owner=memory)
    assert store(worker, keys("a", 1), [0], stream=0xDEAD).done == 1


@with_driver()
def test_a_load_whose_end_the_driver_does_not_tell_ends_its_worker(request):
    """The GPU may still write into its blocks then, so vLLM must not go on to compute from them."""
    cuda = Cuda()
    cache = Cache(cuda)
    worker = on_gpu(request, cache)
    cache.write(0, 0)
    assert store(worker, keys("a", 1), [0], stream=cuda.stream).done == 1
    hit = found(request.getfixturevalue("make").scheduler(), "q", keys("a", 1), 1)
    for call in (b"cuEventQuery", b"cuEventSynchronize", b"cuStreamSynchronize"):
        cuda.library.fake_cuda_fail(call, 999, 1)
    job = worker.submit_load("q", hit.handles(0, 1), [1], stream=cuda.stream)
    with pytest.raises(kvring.DeviceError, match="vLLM must not go on"):
        while not worker.wait_job(job, FOREVER_MS):
            pass
    with pytest.raises(kvring.DeviceError):
        worker.get_finished()
    assert worker.get_block_ids_with_load_errors() == []
