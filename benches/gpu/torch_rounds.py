#!/usr/bin/env python3
"""kvring beside torch, in torch's own process: bytes, orderings, captured graphs, a matrix product's time, a killed worker.

    torch_rounds.py [--seconds S] [--json FILE] [--only PART,…]      on a GPU
    torch_rounds.py --cpu --seconds 5                                without one: the same rounds in host memory

Needs torch, the package `kvring`, and the command `kvring` (in PATH, or KVRING_BINARY). Parts:

* rounds    random stores and loads of every layout, bit-exact. Right before a store a slow kernel writes the cache on the same
            stream, and right before a load one reads it. Only kvring waits for them.
* graph     stores and loads while another thread captures CUDA graphs in the strictest mode.
* kill      a process is killed (-9) while it stores: no earlier chunk has changed, and all that it has committed are right.
* slowdown  a bf16 matrix product alone, and beside continuous stores and loads, in turn. Goal: less than 3 % slower.

Each part ends at its first mistake; the exit code is 1 where one has failed.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from node import LAYOUTS, PER_CHUNK, Cache, Node, Pair, Sizes, fingerprint, key

GOAL_PERCENT = 3.0
KILL_SIZES = Sizes(layers=8, blocks=256, content=256)
KILL_LAYOUT = "LBHNC"
"""The layout of both processes, because an engine takes only one for a fingerprint."""
VICTIM_SEEDS = 1 << 24
"""The first seed of the victim's chunks. No other chunk has seeds from here on."""
VICTIM_CHUNKS = 8
"""The number of chunks in each of the victim's stores."""

Found = dict[str, Any]


def rounds(node: Node, seconds: float) -> Found:
    """Makes random rounds over all layouts."""
    done, turn, until = 0, 0, time.monotonic() + seconds
    while turn < len(LAYOUTS) or time.monotonic() < until:
        layout = LAYOUTS[turn % len(LAYOUTS)]
        side = node.torch.cuda.Stream() if node.on_gpu and turn % 2 else None
        cache = Cache(node.torch, node.device, layout, Sizes(content=random.choice([16, 40, 64])))
        if node.on_gpu:
            # The cache was cleared on another stream.
            node.torch.cuda.synchronize()
        on_stream = node.torch.cuda.stream(side) if side else contextlib.nullcontext()
        with node.pair(cache, fingerprint(f"rounds {turn}")) as pair, on_stream:
            done += some_rounds(pair, 60 if node.on_gpu else 10)
        turn += 1
    return {"rounds": done, "layouts": LAYOUTS}


def some_rounds(pair: Pair, count: int) -> int:
    node, cache, torch = pair.node, pair.cache, pair.node.torch
    mirror = Cache(torch, node.device, cache.layout, cache.sizes)
    stored: list[list[int]] = []
    for _ in range(count):
        seeds = [next(node.counter) for _ in range(random.randint(1, 6))]
        blocks = random.sample(range(cache.sizes.blocks), len(seeds) * PER_CHUNK)
        content, index = cache.patterns(seeds), cache.index(blocks)
        # The content is written late, and nobody waits before the store is submitted.
        node.sleep(random.choice([0, 0.2, 2]))
        cache.write(index, content)
        pair.store([key(seed) for seed in seeds], blocks)
        mirror.write(index, content)
        stored = [*stored[-5:], seeds]

        seeds = random.choice(stored)
        blocks = random.sample(range(cache.sizes.blocks), len(seeds) * PER_CHUNK)
        content, index = cache.patterns(seeds), cache.index(blocks)
        before, readers = mirror.read(index), []

        def reader(index: Any = index, readers: list[Any] = readers) -> None:
            node.sleep(random.choice([0, 0.2, 2]))
            readers.append(cache.read(index))

        pair.load([key(seed) for seed in seeds], blocks, reader)
        assert torch.equal(readers[0], before), f"{cache.layout}: a load overtook a reader, or a store changed the cache"
        mirror.write(index, content)
        assert torch.equal(cache.buffer, mirror.buffer), f"{cache.layout}: wrong bytes in the cache"
    return count


def graph(node: Node, seconds: float) -> Found:
    """Captures graphs in one thread, and stores and loads in this one, which makes no calls of torch that a capture forbids."""
    torch = node.torch
    cache = Cache(torch, node.device, "LBHNC", Sizes())
    half = cache.sizes.blocks // 2
    from_blocks, into_blocks, chunks = range(half), range(half, 2 * half), half // PER_CHUNK
    content, into = cache.pattern(7, half), cache.index(into_blocks)
    cache.write(cache.index(from_blocks), content)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    captures, errors, ended = 0, [], threading.Event()

    def capture() -> None:
        nonlocal captures
        try:
            side, x = torch.cuda.Stream(), torch.arange(1024, device=node.device)
            while not ended.is_set():
                made = torch.cuda.CUDAGraph()
                with torch.cuda.graph(made, stream=side, capture_error_mode="global"):
                    y = x
                    for _ in range(20):
                        y = y + 1
                made.replay()
                torch.cuda.synchronize()
                assert torch.equal(y, x + 20), "a captured graph gave something else"
                captures += 1
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}")

    moved, until = 0, time.monotonic() + seconds
    with node.pair(cache, fingerprint("graph")) as pair:
        thread = threading.Thread(target=capture)
        thread.start()
        try:
            while time.monotonic() < until and not errors:
                keys = [key(next(node.counter)) for _ in range(chunks)]
                assert pair.end(pair.submit_store(keys, from_blocks, stream.cuda_stream)).done == chunks
                hit = pair.found(keys)
                assert pair.end(pair.submit_load(hit, into_blocks, stream.cuda_stream)).done == chunks
                pair.scheduler.end_session("l")
                moved += 1
        finally:
            ended.set()
            thread.join()
        assert not errors, errors
        torch.cuda.synchronize()
        assert torch.equal(cache.read(into), content), "wrong bytes after loads beside captures"
    assert captures > 0 and moved > 0, f"{captures} captures, {moved} stores and loads"
    return {"captures": captures, "stores_and_loads": moved}


def victim(node: Node, name: str) -> None:
    """Stores until it is killed. Each chunk's bytes follow from its key."""
    cache = Cache(node.torch, node.device, KILL_LAYOUT, KILL_SIZES)
    with node.pair(cache, fingerprint("kill"), name) as pair:
        before = None
        for turn in itertools.count():
            first = VICTIM_SEEDS + turn * VICTIM_CHUNKS
            seeds = range(first, first + VICTIM_CHUNKS)
            # Two sets of blocks in turn: the one that is written now is not being stored any more.
            at = turn % 2 * VICTIM_CHUNKS * PER_CHUNK
            blocks = range(at, at + VICTIM_CHUNKS * PER_CHUNK)
            cache.write(cache.index(blocks), cache.patterns(seeds))
            job = pair.submit_store([key(seed) for seed in seeds], blocks, node.stream, source=2)
            if before is not None:
                pair.end(before)
                print(turn, flush=True)
            before = job


def kill(node: Node, seconds: float) -> Found:
    """Kills a worker in the middle of its stores, again and again."""
    torch, cache = node.torch, Cache(node.torch, node.device, KILL_LAYOUT, KILL_SIZES)
    kills, committed, until = 0, 0, time.monotonic() + seconds
    with node.pair(cache, fingerprint("kill")) as pair:
        seeds = [next(node.counter) for _ in range(32)]
        keys, blocks = [key(seed) for seed in seeds], range(len(seeds) * PER_CHUNK)
        content, index = cache.patterns(seeds), cache.index(blocks)
        cache.write(index, content)
        pair.store(keys, blocks)
        while kills == 0 or time.monotonic() < until:
            kill_one(node)
            kills += 1
            cache.write(index, torch.zeros_like(content))
            pair.load(keys, blocks)
            assert torch.equal(cache.read(index), content), f"a chunk has changed after kill {kills}"
            committed += look_at_committed(pair)
            # The next worker stores the same keys again.
            pair.scheduler.reset_cache()
            cache.write(index, content)
            pair.store(keys, blocks)
    return {"kills": kills, "chunks_of_the_dead": committed}


def kill_one(node: Node) -> None:
    command = [sys.executable, __file__, "--victim", node.engine.name, "--copy", node.copy]
    command += [] if node.on_gpu else ["--cpu"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        stored = ""
        try:
            # The process is killed at a random moment, in the middle of some store.
            for line in itertools.islice(child.stdout, random.randint(1, 8)):
                stored = line
            time.sleep(random.uniform(0, 0.005))
        finally:
            child.send_signal(signal.SIGKILL)
    assert stored, "the process that was to be killed has stored nothing"


def look_at_committed(pair: Pair) -> int:
    """Checks each chunk that the killed worker has committed. Returns their number."""
    cache, torch, count = pair.cache, pair.node.torch, 0
    for first in itertools.count(VICTIM_SEEDS, VICTIM_CHUNKS):
        seeds = range(first, first + VICTIM_CHUNKS)
        hit = pair.scheduler.lookup("l", next(pair.node.counter), [key(seed) for seed in seeds])
        if hit.chunks:
            blocks = range(hit.chunks * PER_CHUNK)
            report = pair.end(pair.submit_load(hit, blocks, pair.node.stream))
            assert report.done == hit.chunks, report
            same = torch.equal(cache.read(cache.index(blocks)), cache.patterns(seeds[: hit.chunks]))
            assert same, "a killed worker has committed a chunk that it had not written"
        pair.scheduler.end_session("l")
        count += hit.chunks
        if hit.chunks < VICTIM_CHUNKS:
            break
    return count


class Copies:
    """A thread that stores and loads at once while `wanted` is set."""

    def __init__(self, pair: Pair, stream: int) -> None:
        self.pair, self.stream = pair, stream
        self.wanted, self.ended = threading.Event(), threading.Event()
        self.errors: list[str] = []
        self.bytes = 0
        self.thread = threading.Thread(target=self.run)

    def __enter__(self) -> Copies:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()

    def run(self) -> None:
        try:
            self.go_on()
        except Exception as error:
            self.errors.append(f"{type(error).__name__}: {error}")

    def go_on(self) -> None:
        pair, half = self.pair, self.pair.cache.sizes.blocks // 2
        chunks = half // PER_CHUNK
        keys = [key(next(pair.node.counter)) for _ in range(chunks)]
        assert pair.end(pair.submit_store(keys, range(half), self.stream)).done == chunks
        while not self.ended.is_set():
            if not self.wanted.wait(0.01):
                continue
            # The engine does not store chunks again that it has, so the keys are new ones.
            fresh = [key(next(pair.node.counter)) for _ in range(chunks)]
            hit = pair.found(keys)
            jobs = [
                pair.submit_store(fresh, range(half), self.stream),
                pair.submit_load(hit, range(half, 2 * half), self.stream),
            ]
            for report in [pair.end(job) for job in jobs]:
                assert report.done == chunks, report
                self.bytes += report.bytes
            pair.scheduler.end_session("l")
            keys = fresh


def slowdown(node: Node, seconds: float) -> Found:
    """Measures the time of a matrix product, alone and beside copies in turn."""
    torch = node.torch
    cache = Cache(torch, node.device, "LBHNC", Sizes(layers=32, blocks=1024, heads=8, tokens=16, content=256))
    a, b = (torch.randn(8192, 8192, device=node.device, dtype=torch.bfloat16) for _ in range(2))
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    side = torch.cuda.Stream()
    torch.cuda.synchronize()

    def product() -> float:
        times = []
        for _ in range(3):
            begin.record()
            for _ in range(20):
                torch.matmul(a, b)
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 20)
        return statistics.median(times)

    alone, beside, gbs = [], [], []
    with node.pair(cache, fingerprint("slowdown")) as pair, Copies(pair, side.cuda_stream) as copies:
        # Meanwhile the clocks settle, and the arena is registered.
        copies.wanted.set()
        until = time.monotonic() + seconds
        warm = time.monotonic() + min(4.0, seconds / 3)
        while time.monotonic() < warm and not copies.errors:
            product()
        while not copies.errors and (len(alone) < 3 or time.monotonic() < until):
            copies.wanted.clear()
            # The copies in flight end within this time.
            time.sleep(0.1)
            alone.append(product())
            copies.wanted.set()
            time.sleep(0.02)
            before, began = copies.bytes, time.monotonic()
            beside.append(product())
            gbs.append((copies.bytes - before) / (time.monotonic() - began) / 1e9)
    assert not copies.errors, copies.errors
    assert sum(gbs) > 0, "nothing was copied beside the product"
    percent = 100 * (statistics.median(two / one for one, two in zip(alone, beside, strict=True)) - 1)
    return {
        "product_ms_alone": statistics.median(alone),
        "product_ms_beside": statistics.median(beside),
        "slower_percent": percent,
        "copied_gbs": statistics.median(gbs),
        "turns": len(alone),
        "goal_percent": GOAL_PERCENT,
        "met": percent < GOAL_PERCENT,
    }


PARTS: dict[str, tuple[Callable[[Node, float], Found], float, bool]] = {
    "rounds": (rounds, 0.35, False),
    "graph": (graph, 0.1, True),
    "slowdown": (slowdown, 0.2, True),
    "kill": (kill, 0.35, False),
}
"""For each part its function, its share of the time, and whether it needs a GPU."""


def run_parts(node: Node, names: list[str], seconds: float, found: Found, write: Callable[[Found], None]) -> bool:
    """Runs the parts. Returns whether all passed. Writes the results after each part, in case a later one ends the process."""
    well = True
    for name in names:
        run, share, needs_gpu = PARTS[name]
        began = time.monotonic()
        try:
            found[name] = {"skipped": "needs a GPU"} if needs_gpu and not node.on_gpu else run(node, seconds * share)
        except Exception as error:
            well = False
            found[name] = {"error": f"{type(error).__name__}: {error}"}
            traceback.print_exc()
        print(f"{name}: {found[name]}, {time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)
        write(found)
    return well


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="about how long all parts take together (default: 60)")
    parser.add_argument("--only", default=",".join(PARTS), help=f"parts to run (default: {','.join(PARTS)})")
    parser.add_argument("--copy", default="auto", help="batch, staged, zerocopy or auto (default)")
    parser.add_argument("--arena", default="4GiB", help="the engine's arena, in /dev/shm (default: 4GiB)")
    parser.add_argument("--seed", type=int, default=1, help="of what is random (default: 1)")
    parser.add_argument("--json", type=Path, help="write what was found there")
    parser.add_argument("--cpu", action="store_true", help="host memory instead of a GPU: what needs one is left out")
    parser.add_argument("--victim", help=argparse.SUPPRESS)
    args = parser.parse_args()
    names = args.only.split(",")
    if unknown := sorted(set(names) - set(PARTS)):
        parser.error(f"--only: expected some of {','.join(PARTS)}, got {','.join(unknown)}")
    try:
        import torch

        import kvring  # noqa: F401
    except ImportError as error:
        print(f"error: {error}: needs torch and the package kvring in {sys.executable}", file=sys.stderr)
        return 1
    if not args.cpu and not torch.cuda.is_available():
        print("error: torch finds no CUDA device; --cpu runs what needs none", file=sys.stderr)
        return 1
    random.seed(args.seed)
    node = Node(torch, "cpu" if args.cpu else "cuda", args.copy, args.arena)
    if args.victim:
        victim(node, args.victim)
    found: Found = {"device": "cpu" if args.cpu else torch.cuda.get_device_name(), "torch": torch.__version__}

    def write(found: Found) -> None:
        if args.json:
            args.json.write_text(json.dumps(found, indent=1) + "\n")

    with node.engine:
        well = run_parts(node, names, args.seconds, found, write)
    print(json.dumps(found, indent=1))
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
