"""Actions for a step or a hook inside vLLM's process: on the engine, or on the connector under test."""

import os
import signal
from pathlib import Path

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


def flip(path: str, offset: int = 0, length: int | None = None) -> int:
    """Inverts every byte of a file that is not 0, from `offset` on; how many. Headers must not be among them."""
    import mmap

    changed = 0
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as content:
        end = len(content) if length is None else min(len(content), offset + length)
        step = 1 << 20
        inverted = bytes(value and (value ^ 0x40) for value in range(256))
        # An arena is sparse: what was never written is 0 and stays so.
        for start in range(offset, end, step):
            piece = content[start : min(end, start + step)]
            if piece.count(0) != len(piece):
                changed += len(piece) - piece.count(0)
                content[start : start + len(piece)] = piece.translate(inverted)
    return changed


def instances() -> list[str]:
    """The roles of the connectors in this process."""
    return [connector.role.name for connector in tap.record.instances]


def worker_idle() -> int:
    """Waits until kvring's workers in this process have no open job; the number of workers."""
    adapters = [
        side.adapter
        for outer in tap.record.instances
        for connector in getattr(outer, "sub_connectors", [outer])
        for side in vars(connector).values()
        if hasattr(getattr(side, "adapter", None), "wait_idle")
    ]
    for adapter in adapters:
        adapter.wait_idle(FOREVER_MS)
    return len(adapters)


def metric(name: str) -> float:
    """A counter as `/metrics` would show it, summed over its labels."""
    from vllm.v1.metrics.reader import get_metrics_snapshot

    return sum(one.value for one in get_metrics_snapshot() if one.name == name)


def _sides() -> list[object]:
    """kvring's scheduler and workers in this process."""
    sides = [side for connector in tap.record.instances for side in vars(connector).values()]
    return [side for side in sides if hasattr(side, "adapter")]


def attached() -> int:
    """Waits until all of kvring's sides in this process are attached to an engine that serves; how many there are."""
    sides = _sides()
    wait_for(lambda: all(side.adapter.is_healthy() for side in sides), "all are attached")
    return len(sides)


def has_found(request: str) -> bool:
    """Has this request's lookup been answered, with a hit that vLLM has not allocated blocks for?"""
    trackers = next(side.trackers for side in _sides() if hasattr(side, "trackers"))
    (tracker,) = [one for name, one in trackers.items() if name.startswith(request)] or [None]
    return tracker is not None and not tracker.settled and tracker.hit is not None and tracker.hit.chunks > 0


def spoil_standin() -> int:
    """Spoils what the stand-in connector holds."""
    from real import standin

    return standin.spoil()
