"""Actions for a step or a hook inside vLLM's process: on the engine, or on the connector under test."""

import os
import signal
from pathlib import Path
from typing import Any

from waiting import FOREVER_MS, wait_for

from real import tap


def state(pid: int) -> str:
    """The state letter of a process; empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def kill(pid: int) -> None:
    """`kill -9`, and returns when the process is really dead."""
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: state(pid) in ("", "Z", "X"), f"process {pid} is dead")


def stop(pid: int) -> None:
    """SIGSTOP, and returns when the process has really stopped."""
    os.kill(pid, signal.SIGSTOP)
    wait_for(lambda: state(pid) in ("T", ""), f"process {pid} has stopped")


def resume(pid: int) -> None:
    os.kill(pid, signal.SIGCONT)


def flip(path: str, length: int) -> int:
    """Changes every byte of a file that is not 0, up to `length`; how many. Headers must not be among them."""
    import mmap

    changed, piece_bytes = 0, 1 << 20
    other = bytes(value and (value ^ 0x40) for value in range(256))
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as content:
        for start in range(0, length, piece_bytes):
            piece = content[start : min(length, start + piece_bytes)]
            # An arena is sparse: bytes that were never written are 0 and stay so.
            if here := len(piece) - piece.count(0):
                changed += here
                content[start : start + len(piece)] = piece.translate(other)
    return changed


def _sides() -> list[Any]:
    """kvring's scheduler and workers in this process, also of a kvring in a `MultiConnector`."""
    connectors = [inner for outer in tap.record.instances for inner in getattr(outer, "sub_connectors", [outer])]
    return [side for connector in connectors for side in vars(connector).values() if hasattr(side, "adapter")]


def worker_idle(_: Any) -> None:
    """Waits until kvring's workers in this process have no open job."""
    for side in _sides():
        if hasattr(side.adapter, "wait_idle"):
            side.adapter.wait_idle(FOREVER_MS)


def attached() -> int:
    """Waits until all of kvring's sides in this process are attached to an engine that serves; how many there are."""
    sides = _sides()
    wait_for(lambda: all(side.adapter.is_healthy() for side in sides), "all are attached")
    return len(sides)


def has_found(request: str) -> bool:
    """Has this request's lookup been answered, with a hit that vLLM has not allocated blocks for?"""
    trackers = next(side.trackers for side in _sides() if hasattr(side, "trackers"))
    tracker = next((one for name, one in trackers.items() if name.startswith(request)), None)
    return tracker is not None and not tracker.settled and tracker.hit is not None and tracker.hit.chunks > 0


def metric(name: str) -> float:
    """A counter as `/metrics` would show it, summed over its labels."""
    from vllm.v1.metrics.reader import get_metrics_snapshot

    return sum(one.value for one in get_metrics_snapshot() if one.name == name)
