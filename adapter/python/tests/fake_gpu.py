"""The fake CUDA driver of `gpu-kernels/tests/fake`, for tests: also those of `tests/vllm`."""

import ctypes
import functools
import hashlib
import os
import pathlib
import shutil
import subprocess
import sys
import warnings

import pytest

INSIDE = "KVRING_TEST_FAKE_CUDA"
BUILD = pathlib.Path(__file__).parents[3] / "gpu-kernels" / "tests" / "fake" / "build"


@pytest.fixture(scope="session")
def driver(tmp_path_factory):
    """The folder that the fake is in."""
    if shutil.which("g++") is None:
        warnings.warn("no g++ here: NOTHING of copies to and from a GPU is tested", stacklevel=1)
        pytest.skip("no g++ to build the fake CUDA driver")
    # One folder for all workers of xdist: the first one builds it. Without xdist it outlives the session, so each checkout has a
    # folder of its own.
    checkout = hashlib.sha256(str(BUILD).encode()).hexdigest()[:12]
    folder = tmp_path_factory.getbasetemp().parent / f"kvring-fake-cuda-{checkout}"
    subprocess.run([BUILD, folder], check=True, capture_output=True, text=True)
    return folder


def with_driver(**settings):
    """Runs the test in a process with the fake, with these settings (`control.cpp` lists them)."""

    def decorate(test):
        @functools.wraps(test)
        def run(request, **arguments):
            if INSIDE in os.environ:
                test(request, **arguments)
                return
            path = f"{request.getfixturevalue('driver')}:{os.environ.get('LD_LIBRARY_PATH', '')}".rstrip(":")
            environ = {**os.environ, **settings, INSIDE: "1", "LD_LIBRARY_PATH": path}
            name = f"{request.node.path}::{request.node.name}"
            command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", name]
            ended = subprocess.run(command, env=environ, capture_output=True, text=True)
            assert ended.returncode == 0 and "1 passed" in ended.stdout, ended.stdout + ended.stderr

        return run

    return decorate


class Cuda:
    """Uses the driver as torch does: the primary context of device 0, and a stream to compute on."""

    def __init__(self, device=0):
        self.library = ctypes.CDLL("libcuda.so.1")
        context = ctypes.c_void_p()
        self.call("cuInit", 0)
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self.call("cuCtxSetCurrent", context)
        self.stream = self.new_stream()
        self._patterns = {}

    def call(self, name, *arguments):
        result = getattr(self.library, name)(*arguments)
        assert result == 0, (name, result)

    def new_stream(self):
        stream = ctypes.c_void_p()
        self.call("cuStreamCreate", ctypes.byref(stream), 1)
        return stream.value

    def alloc(self, size):
        address = ctypes.c_uint64()
        self.call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(size))
        return address.value

    def fill(self, address, size, seed, delay_us=0):
        """Fills this memory later, as a kernel on the stream."""
        stream, address, size = ctypes.c_void_p(self.stream), ctypes.c_uint64(address), ctypes.c_size_t(size)
        self.call("fake_cuda_fill", stream, address, size, ctypes.c_uint(seed), ctypes.c_uint(delay_us))

    def pattern(self, size, seed):
        """The bytes that `fill` writes: they begin the same at every size."""
        if seed not in self._patterns:
            scratch = self.alloc(1 << 14)
            self.fill(scratch, 1 << 14, seed)
            self.synchronize()
            self._patterns[seed] = ctypes.string_at(scratch, 1 << 14)
        return self._patterns[seed][:size]

    def synchronize(self):
        self.call("cuStreamSynchronize", ctypes.c_void_p(self.stream))
