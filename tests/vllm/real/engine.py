"""The kvring engine of a test: the binary itself, run, killed, stopped and asked from outside."""

import itertools
import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

from waiting import wait_for

from real import actions

_numbers = itertools.count()


def binary() -> str:
    """The `kvring` to test: `KVRING_BINARY`, else the installed one."""
    return os.environ.get("KVRING_BINARY", "kvring")


class Engine:
    """One engine, under a name that no other test has. It need not run."""

    def __init__(self, directory: Path, arena: str = "128MiB") -> None:
        self.name = f"t{os.getpid()}-{next(_numbers)}"
        self.arena = arena
        self.log_path = directory / f"engine-{self.name}.log"
        self.process: subprocess.Popen | None = None

    def start(self, *more: str) -> None:
        """Starts it, and waits until it serves."""
        with self.log_path.open("a") as log:
            command = [binary(), "serve", "--name", self.name, "--arena", self.arena, *more]
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        wait_for(self.serves, "the engine serves")

    def serves(self) -> bool:
        if self.process is not None and self.process.poll() is not None:
            raise RuntimeError(f"the engine ended: {self.log_path.read_text()[-2000:]}")
        return self.state() == "serving"

    def state(self) -> str:
        return self.status().get("state", "absent")

    def status(self) -> dict[str, Any]:
        """`kvring status --json`, whatever state it is in; `{}` when there is no engine of this name."""
        asked = subprocess.run([binary(), "status", "--name", self.name, "--json"], capture_output=True, text=True)
        return json.loads(asked.stdout) if asked.stdout.startswith("{") else {}

    def counters(self) -> dict[str, int]:
        return self.status()["counters"]

    @property
    def pid(self) -> int:
        """Also of an engine that somebody else started (`kvring.autostart`)."""
        return self.process.pid if self.process is not None else self.status()["engine"]["pid"]

    def kill(self) -> None:
        actions.kill(self.pid)
        self.reap()

    def reap(self) -> None:
        """Waits for the process of an engine that a hook has killed."""
        if self.process is not None:
            self.process.wait()

    def pause(self) -> None:
        actions.stop(self.pid)

    def resume(self) -> None:
        actions.resume(self.pid)

    def lives_on(self, beats: int) -> None:
        """Waits until the engine's beat has moved so often: at least that many beat intervals have passed in it."""
        for _ in range(beats):
            # `kvring status` looks until the beat moves.
            wait_for(lambda: self.state() == "serving", "the engine's beat moves")

    def settle(self) -> dict[str, int]:
        """Waits until no slot is being written and no chunk lacks a shard; the counters."""
        seen: dict[str, int] = {}

        def is_quiet() -> bool:
            seen.update(self.counters())
            return not (seen["slots_writing"] or seen["chunks_forming"])

        wait_for(is_quiet, "the engine's stores come to rest")
        return seen

    def spoil(self) -> int:
        """Changes every byte that is stored; how many. The arena's superblock lies behind its slots."""
        return actions.flip(f"/dev/shm/kvring.{self.name}.arena", self.status()["engine"]["arena_bytes"])

    def close(self) -> None:
        """Ends it, and leaves nothing in /dev/shm."""
        status = self.status()
        pid = (status.get("engine") or {}).get("pid")
        if pid and actions.state(pid) not in ("", "Z"):
            os.kill(pid, signal.SIGCONT)
            os.kill(pid, signal.SIGTERM)
        if self.process is not None:
            self.process.wait()
        elif pid:
            wait_for(lambda: actions.state(pid) in ("", "Z"), "an engine that was started by vLLM ends")
        subprocess.run([binary(), "remove", "--name", self.name, "--force"], capture_output=True)
