"""Stands between vLLM and the connector under test, and writes down what passes: from outside, by subclassing.

vLLM is told to take its connector from this module; which one that is comes in the environment, so that it works in every
process of vLLM's. What is recorded: how long each call took (no call may take longer than its deadline: that is a
contract, not a benchmark), what each lookup answered and how many tokens each admission loaded, which blocks failed. Hooks
run something before or after the n-th call of a method: that is how an engine dies *during* a load.
"""

import functools
import importlib
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

VARIABLE = "KVRING_TEST_TAP"


class Lookup(NamedTuple):
    """One call of `get_num_new_matched_tokens`."""

    request: str
    admission: int
    """How often the request had been preempted."""
    tokens: int
    """That it had then, generated ones included."""
    local: int
    """Of these, that vLLM had itself."""
    found: int | None
    """The answer; `None` is "ask again": another request is loading what this one lacks."""
    seconds: float


class Record:
    """The calls of the connector in this process."""

    def __init__(self, directory: str | None = None) -> None:
        self.calls: dict[str, list[float]] = {}
        """By method: count, the longest in seconds, the sum in seconds."""
        self.lookups: list[Lookup] = []
        self.admissions: dict[str, list[int]] = {}
        """By request: tokens loaded, for each `update_state_after_alloc`."""
        self.failed_blocks = 0
        self.failed_requests = 0
        self.instances: list[object] = []
        self.hooks: list[Hook] = []
        self.directory = directory

    def took(self, method: str, seconds: float) -> None:
        entry = self.calls.setdefault(method, [0, 0.0, 0.0])
        entry[0] += 1
        entry[2] += seconds
        if seconds > entry[1]:
            entry[1] = seconds
            if self.directory:  # other processes are read by the file that they leave
                path = Path(self.directory) / f"calls-{os.getpid()}.json"
                path.with_suffix(".new").write_text(json.dumps(self.calls))
                path.with_suffix(".new").rename(path)

    def saw(self, method: str, arguments: tuple, answer: object, seconds: float) -> None:
        """Keeps the arguments and answers that tests ask for."""
        if method == "get_num_new_matched_tokens":
            request, local = arguments
            found = answer[0] if answer is not None else None
            self.lookups.append(Lookup(request.request_id, request.num_preemptions, request.num_tokens, local, found, seconds))
        elif method == "update_state_after_alloc":
            self.admissions.setdefault(arguments[0].request_id, []).append(arguments[2])
        elif method == "get_block_ids_with_load_errors":
            self.failed_blocks += len(answer or ())
        elif method == "get_transfer_results":
            self.failed_requests += len(getattr(answer, "failed_recving", None) or ())

    def clear(self) -> None:
        self.calls.clear()
        self.lookups.clear()
        self.admissions.clear()
        self.failed_blocks = self.failed_requests = 0


class Hook:
    """Runs `action` once, before or after the `nth` call of `method` from now on."""

    def __init__(self, method: str, action: Callable[[], object], nth: int = 1, when: str = "before") -> None:
        self.method, self.action, self.when = method, action, when
        self.left = nth
        self.done = False

    def at(self, method: str, when: str) -> None:
        if self.done or method != self.method or when != self.when:
            return
        self.left -= 1
        if self.left == 0:
            self.done = True
            self.action()


class Clock:
    """Seconds in which a thread ran or waited for somebody: not those in which it was ready and had no core.

    The tests share two cores, and a call is not to blame for the time in which another thread was scheduled. Where the kernel
    does not tell (`schedstat`), it is plain time."""

    def __init__(self) -> None:
        self.thread = threading.local()
        self.plain = False
        """For measurements: the time of day, which costs less to read."""

    def now(self) -> float:
        if self.plain:
            return time.perf_counter()
        if getattr(self.thread, "process", None) != os.getpid():  # a fork needs a file of its own
            self.thread.process = os.getpid()
            try:
                self.thread.file = os.open("/proc/thread-self/schedstat", os.O_RDONLY)
            except OSError:
                self.thread.file = -1
        if self.thread.file < 0:
            return time.perf_counter()
        delayed = int(os.pread(self.thread.file, 64, 0).split()[1])
        return time.perf_counter() - delayed * 1e-9


record = Record()
clock = Clock()


def wrapped(name: str, method: Callable) -> Callable:
    """`method`, timed and seen. A hook's own time is nobody's: it does not count."""

    @functools.wraps(method)
    def call(self, *arguments, **named):
        for hook in record.hooks:
            hook.at(name, "before")
        start = clock.now()
        answer = None
        try:
            answer = method(self, *arguments, **named)
            return answer
        finally:
            seconds = clock.now() - start
            record.took(name, seconds)
            record.saw(name, arguments, answer, seconds)
            for hook in record.hooks:
                hook.at(name, "after")

    return call


def tapped(connector: type, only: list[str] | None = None) -> type:
    """A subclass of `connector` that behaves the same and is recorded: all its methods, or `only` some."""
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1

    methods: dict[str, Callable] = {}
    for base in reversed(connector.__mro__):
        if issubclass(base, KVConnectorBase_V1) and base is not KVConnectorBase_V1:
            for name, value in vars(base).items():
                if only is not None and name not in only:
                    continue
                if callable(value) and not name.startswith("_") and not isinstance(value, type):
                    methods[name] = wrapped(name, value)

    def __init__(self, *arguments, **named):
        record.instances.append(self)
        connector.__init__(self, *arguments, **named)

    methods["__init__"] = functools.wraps(connector.__init__)(__init__)
    return type(connector.__name__, (connector,), {**methods, "__module__": connector.__module__})


@functools.cache
def load(name: str) -> type:
    """The connector that the environment names, broken if it says so, and tapped."""
    settings = json.loads(os.environ[VARIABLE])
    record.directory = settings.get("directory")
    connector = getattr(importlib.import_module(settings["module"]), name)
    if settings.get("broken"):
        from real import broken

        for variant in settings["broken"]:
            getattr(broken, variant)()
    clock.plain = bool(settings.get("plain_clock"))
    return tapped(connector, settings.get("only"))


def __getattr__(name: str) -> type:
    # vLLM asks this module for the connector by its name.
    if name.startswith("_"):
        raise AttributeError(name)
    return load(name)
