"""The tests' end of a vLLM process: starts it, sends steps, reads answers, and reads its log."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from waiting import wait_for

from real import tap
from real.actions import state
from real.prompts import BLOCK

HERE = Path(__file__).resolve().parent.parent

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TORCHDYNAMO_DISABLE": "1",  # saves a C++ compilation at the first call
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # so that tests may call functions in vLLM's workers
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "INFO",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",  # two tests at a time on two cores, and one order of additions
    "PYTHONHASHSEED": "0",
}

DEFAULTS: dict[str, Any] = {
    "skip_tokenizer_init": True,
    "enforce_eager": True,
    "dtype": "float32",
    "block_size": BLOCK,
    "num_gpu_blocks_override": 512,
    "kv_cache_memory_bytes": 1 << 28,
    "max_model_len": 8192,
    "max_num_batched_tokens": 2048,  # so that 4096 tokens are several chunks
    "enable_prefix_caching": False,
}


FIRST = {"generate": "prompts", "session": "pieces", "add": "prompts", "step": "times", "abort": "names", "act": "action"}
"""The name of a step's first argument, where it may be left out."""


class VllmDied(Exception):
    """The process ended: with the end of its log."""


class StepFailed(Exception):
    """A step raised in vLLM's process."""


class Zygote:
    """The process that has imported vLLM and forks; one for a session."""

    def __init__(self, python: str = sys.executable) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.link = ours
        self.log = tempfile.TemporaryFile("w+")
        path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
        self.process = subprocess.Popen(
            [python, "-m", "real.zygote"],
            stdin=theirs,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **ENVIRONMENT, "PYTHONPATH": path},
        )
        theirs.close()

    def fork(self, environment: dict[str, str], steps: int, answers: int, log: int) -> int:
        """A child; its process id. Waits for the import at the first call."""
        socket.send_fds(self.link, [json.dumps(environment).encode()], [steps, answers, log])
        pid = self.link.recv(64)
        if not pid:
            self.log.seek(0)
            raise VllmDied(f"the zygote ended:\n{self.log.read()[-4000:]}")
        return int(pid)

    def close(self) -> None:
        self.link.close()
        self.process.wait()
        self.log.close()


class Connector:
    """Which connector, and how it is configured."""

    def __init__(
        self, name: str, module: str, extra: dict[str, Any], policy: str = "recompute", tap: dict[str, Any] | None = None
    ) -> None:
        self.name, self.module, self.extra, self.policy = name, module, extra, policy
        self.tap = tap or {}
        """More options of the tap: `only` these methods, a `plain_clock`."""

    def config(self) -> dict[str, Any]:
        return {
            "kv_connector": self.name,
            "kv_connector_module_path": "real.tap",
            "kv_role": "kv_both",
            "kv_load_failure_policy": self.policy,
            "kv_connector_extra_config": self.extra,
        }


class Vllm:
    """One `LLM` in a process of its own. `start` returns at once, so several can start side by side."""

    def __init__(
        self,
        zygote: Zygote,
        model: str,
        connector: Connector | None = None,
        *,
        environment: dict[str, str] | None = None,
        broken: tuple[str, ...] = (),
        **llm: Any,
    ) -> None:
        self.model = model
        self.scratch = tempfile.TemporaryDirectory(prefix="kvring-vllm-")
        self.log_path = Path(self.scratch.name) / "log"
        settings = {**DEFAULTS, "model": model, **llm}
        child = {**ENVIRONMENT, **(environment or {})}
        if connector is not None:
            settings["kv_transfer_config"] = connector.config()
            child[tap.VARIABLE] = json.dumps(
                {"module": connector.module, "broken": list(broken), "directory": self.scratch.name, **connector.tap}
            )
        steps_theirs, steps_ours = os.pipe()
        answers_ours, answers_theirs = os.pipe()
        log = os.open(self.log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.pid = zygote.fork(child, steps_theirs, answers_theirs, log)
        for descriptor in (steps_theirs, answers_theirs, log):
            os.close(descriptor)
        self.steps = os.fdopen(steps_ours, "w")
        self.answers = answers_ours
        self.rest = b""
        self.mark = 0
        self.waiting = True
        self.closed = False
        self.send({"llm": settings})

    def send(self, asked: dict[str, Any]) -> None:
        try:
            self.steps.write(json.dumps(asked) + "\n")
            self.steps.flush()
        except BrokenPipeError:
            raise VllmDied(self.tail()) from None

    def receive(self) -> Any:
        while b"\n" not in self.rest:
            piece = os.read(self.answers, 1 << 16)
            if not piece:
                raise VllmDied(f"vLLM ended:\n{self.tail()}")
            self.rest += piece
        line, self.rest = self.rest.split(b"\n", 1)
        answer = json.loads(line)
        if "error" in answer:
            raise StepFailed(f"{answer['error']}\n{self.tail()}")
        return answer["ok"]

    def ready(self) -> "Vllm":
        """Waits until the `LLM` is made; from here on its log counts."""
        if self.waiting:
            try:
                self.receive()
            except (StepFailed, VllmDied):
                self.kill()
                raise
            self.waiting = False
            # vLLM itself logs a traceback while it starts without a tokenizer.
            self.mark = len(self.log())
        return self

    def __getattr__(self, step: str) -> Any:
        # Every other name is a step: see `serve.Driver`.
        if step.startswith("_"):
            raise AttributeError(step)

        def call(*positional, **named):
            if positional:
                named[FIRST[step]] = positional[0]
            self.ready()
            self.send({"do": step, **named})
            return self.receive()

        return call

    def all_calls(self) -> dict[str, list[float]]:
        """The calls of the connector in all processes of this vLLM: count, longest, sum."""
        merged: dict[str, list[float]] = {}
        for seen in [self.calls()["calls"], *(json.loads(p.read_text()) for p in self.call_files())]:
            for method, (count, longest, total) in seen.items():
                entry = merged.setdefault(method, [0, 0.0, 0.0])
                merged[method] = [entry[0] + count, max(entry[1], longest), entry[2] + total]
        return merged

    def call_files(self) -> list[Path]:
        own = f"calls-{self.pid}.json"
        return [path for path in Path(self.scratch.name).glob("calls-*.json") if path.name != own]

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def log_since_ready(self) -> str:
        return self.log()[self.mark :]

    def tail(self) -> str:
        """The end of the log; once it runs, without how it started."""
        return self.log_since_ready()[-6000:] if self.log_path.exists() else ""

    def close(self, gently: bool = True) -> None:
        """Ends it."""
        if self.closed:
            return
        self.closed = True
        with contextlib.suppress(BrokenPipeError):  # it has died before it read the last step
            self.steps.close()
        if gently:
            wait_for(lambda: state(self.pid) in ("", "Z"), "vLLM ends")
        try:
            os.killpg(self.pid, signal.SIGKILL)  # its workers as well
        except ProcessLookupError:
            pass
        os.close(self.answers)
        self.clean_up_after_vllm()
        self.scratch.cleanup()

    def clean_up_after_vllm(self) -> None:
        """With several ranks vLLM leaves their shared memory in /dev/shm, also when it ends gently, and always a file in /tmp."""
        for name in set(re.findall(r"vllm_dist_[0-9a-f]+", self.log())):
            for left in (*Path("/dev/shm").glob(f"{name}*"), Path(tempfile.gettempdir()) / name):
                left.unlink(missing_ok=True)

    def kill(self) -> None:
        self.close(gently=False)

    def __enter__(self) -> "Vllm":
        return self.ready()

    def __exit__(self, *_) -> None:
        self.close()
