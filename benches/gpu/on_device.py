#!/usr/bin/env python3
"""Runs the steps that `benches/gpu/run` has bundled, on a machine with a GPU: the most important first, each with a time limit.

A step that fails does not stop the others. The exit code is 0 if every step that could run has passed; the output says
which steps could not be run. Results go to $OUT, else to RESULTS/DEVICE-DATE.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.util
import json
import os
import platform
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TAIL = 3000
"""Characters of a step's output in the summary; log.txt has all of it."""


@dataclass
class Step:
    """A command to run, and its outcome."""

    name: str
    command: list[str]
    limit_s: float
    env: dict[str, str] = field(default_factory=dict)
    output: Path | None = None
    """The file to which its standard output goes, if that is JSON. Otherwise the output is a part of the log."""
    missing: str = ""
    """The reason why it cannot be run; empty if it can."""
    outcome: str = ""
    seconds: float = 0.0
    tail: str = ""


class Run:
    def __init__(self, out: Path, budget_s: float) -> None:
        self.out, self.until = out, time.monotonic() + budget_s
        self.log = (out / "log.txt").open("w")

    def say(self, text: str) -> None:
        print(text, flush=True)
        self.log.write(text + "\n")
        self.log.flush()

    def step(self, step: Step) -> None:
        if step.missing:
            step.outcome = "not run"
            self.say(f"== {step.name}: NOT RUN: {step.missing}")
            return
        limit_s = min(step.limit_s, self.until - time.monotonic())
        if limit_s < 5:
            step.outcome = "failed: no time was left"
            self.say(f"== {step.name}: NOT RUN: no time is left")
            return
        self.say(f"== {step.name}: {' '.join(step.command)}")
        began = time.monotonic()
        outcome, text = execute(step, limit_s)
        step.seconds = round(time.monotonic() - began, 1)
        step.outcome, step.tail = outcome, text[-TAIL:]
        self.log.write(text)
        self.say(f"   {step.name}: {outcome} after {step.seconds} s")
        if outcome != "passed":
            print(step.tail, flush=True)


def execute(step: Step, limit_s: float) -> tuple[str, str]:
    """Runs a step. Returns its outcome and its output."""
    env = {**os.environ, **step.env}
    with contextlib.ExitStack() as stack:
        output: Any = subprocess.PIPE
        if step.output:
            output = stack.enter_context(step.output.open("w"))
        try:
            process = subprocess.Popen(
                step.command,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.PIPE if step.output else subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,
            )
        except OSError as error:
            return "failed", f"{error}\n"
        try:
            said, errors = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            # An engine that the step has started ends with it, and removes its segments.
            process.kill()
            try:
                said, errors = process.communicate(timeout=10)
            except subprocess.TimeoutExpired:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                said, errors = process.communicate()
            return f"failed: not over after {limit_s:.0f} s", (said or "") + (errors or "")
    text = (said or "") + (errors or "")
    return ("passed" if process.returncode == 0 else f"failed: exit code {process.returncode}"), text


def first_line(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    lines = done.stdout.splitlines()
    return lines[0].strip() if done.returncode == 0 and lines else ""


def machine(fake: bool) -> dict[str, Any]:
    """Describes the machine."""
    query = [
        "name",
        "driver_version",
        "memory.total",
        "pcie.link.gen.max",
        "pcie.link.width.max",
        "clocks.max.sm",
        "mig.mode.current",
    ]
    line = "" if fake else first_line(["nvidia-smi", f"--query-gpu={','.join(query)}", "--format=csv,noheader"])
    smi = dict(zip(query, (part.strip() for part in line.split(",")), strict=False)) if line else {}
    shared = shutil.disk_usage("/dev/shm")
    cpus = re.findall(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return {
        "gpu": "the fake driver" if fake else smi.get("name", "none that nvidia-smi shows"),
        "nvidia_smi": smi,
        "cpu": cpus[0] if cpus else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "shm_gib": round(shared.total / 2**30, 1),
        "locked_memory": resource.getrlimit(resource.RLIMIT_MEMLOCK)[1],
    }


def steps(out: Path, fake: Path | None) -> list[Step]:
    """All steps, the most important first. Their limits add up to 8 minutes."""
    kvring, test = str(HERE / "kvring"), str(HERE / "device-test")
    env = {"LD_LIBRARY_PATH": f"{fake}:{os.environ.get('LD_LIBRARY_PATH', '')}".rstrip(":")} if fake else {}
    python = {"PYTHONPATH": str(HERE / "python"), "KVRING_BINARY": kvring, "PYTHONDONTWRITEBYTECODE": "1"}

    def rounds(count: int) -> dict[str, str]:
        return {**env, "KVRING_REAL_CUDA": "1", "KVRING_ROUNDS": str(count)}

    bench = [kvring, "bench", "gpu", "--json"]
    small = ["--working-set", "128KiB", "--chunks", "64KiB", "--fragments", "2KiB,64KiB"]
    bench += ["--seconds", "0", *small] if fake else ["--seconds", "110"]
    torch = [sys.executable, str(HERE / "torch_rounds.py"), "--json", str(out / "torch.json")]
    torch += ["--cpu", "--seconds", "5"] if fake else ["--seconds", "70"]
    # Half of the free space, because a container may have little.
    arena = min(4 << 30, shutil.disk_usage("/dev/shm").free // 2 >> 20 << 20)
    torch += ["--arena", str(arena)]
    without_torch = "" if importlib.util.find_spec("torch") else "this python3 has no torch"
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    without_sanitizer = "" if os.access(sanitizer, os.X_OK) else "there is no compute-sanitizer: memory errors are NOT looked for"
    sanitized = [sanitizer, "--tool", "memcheck", "--error-exitcode", "99", test, "--nocapture", "--test-threads", "1"]
    return [
        Step("tests", [test, "--nocapture"], 80, rounds(4 if fake else 600)),
        Step("bench", bench, 170, env, out / "bench.json"),
        Step("torch", torch, 130, python, missing=without_torch),
        Step("memcheck", sanitized, 80, rounds(12), missing="needs a GPU" if fake else without_sanitizer),
    ]


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def summary(about: dict[str, Any], done: list[Step], bench: Any, torch: Any) -> str:
    """The summary that people read."""
    lines = [f"{about['gpu']}, {about['cpu']}, {about['cores']} cores, commit {about['commit']}, {about['date']}"]
    if about["fake"]:
        lines.append("the FAKE driver: the numbers mean nothing")
    for step in done:
        why = f": {step.missing}" if step.missing else ""
        lines.append(f"{step.name:10} {step.outcome}{why} ({step.seconds} s)")
    if bench and "rows" in bench:
        lines.append(f"bench: goals met {bench['goals']['met']}, missed {bench['goals']['missed']}")
        for row in bench["rows"]:
            met = {None: "", True: "met", False: "NOT MET"}[row["met"]]
            sizes = f"{row['fragment_bytes'] >> 10} KiB in {row['chunk_bytes'] >> 10} KiB"
            speed = f"{row['gbs']} of {row['ceiling_gbs']} GB/s, ratio {row['ratio']}, submit {row['submit_us']} us"
            lines.append(f"  {row['direction']:5} {row['backend']:8} {sizes:18} {speed} {met}".rstrip())
        lines += [
            f"  gather {row['fragment_bytes'] >> 10} KiB, {row['grid']} blocks: {row['gbs']} GB/s" for row in bench["gather"]
        ]
        lines.append(f"  registering: {bench['registration']['seconds_per_gb']} s/GB")
        for row in bench["latency"]:
            lines.append(
                f"  tiny load, {row['backend']}, {row['fragment_bytes'] >> 10} KiB: {row['us']} us, plain {row['limit_us']}"
            )
    elif bench:
        lines.append(f"bench: {bench}")
    if torch:
        lines += [f"torch, {name}: {found}" for name, found in torch.items()]
    return "\n".join(lines) + "\n"


def place(results: Path, gpu: str, date: datetime.datetime) -> Path:
    chosen = os.environ.get("OUT")
    name = re.sub(r"[^A-Za-z0-9]+", "-", gpu).strip("-").lower()
    out = Path(chosen) if chosen else results / f"{name}-{date:%Y-%m-%d-%H%M}"
    out.mkdir(parents=True, exist_ok=True)
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("results"), help="where results go if $OUT is not set")
    parser.add_argument("--budget", type=float, default=480, help="seconds that all of it may take (default: 480)")
    parser.add_argument("--fake", type=Path, help="the folder of the fake driver: tries this script without a GPU")
    args = parser.parse_args()
    with contextlib.suppress(OSError, ValueError):
        # Registered memory counts as locked.
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    date = datetime.datetime.now(datetime.timezone.utc)
    about = machine(args.fake is not None)
    commit = HERE / "commit"
    about["commit"] = commit.read_text().strip() if commit.exists() else "unknown"
    about["date"] = f"{date:%Y-%m-%d %H:%M} UTC"
    about["fake"] = args.fake is not None
    out = place(args.results, about["gpu"], date)
    run = Run(out, args.budget)
    run.say(json.dumps(about, indent=1))
    done = steps(out, args.fake)
    for step in done:
        run.step(step)
    bench, torch = read_json(out / "bench.json"), read_json(out / "torch.json")
    text = summary(about, done, bench, torch)
    (out / "summary.txt").write_text(text)
    described = [{key: value for key, value in asdict(step).items() if key not in ("env", "output")} for step in done]
    found = {"machine": about, "steps": described, "bench": bench, "torch": torch}
    (out / "summary.json").write_text(json.dumps(found, indent=1) + "\n")
    run.say(text + f"results: {out}")
    return 1 if any(step.outcome.startswith("failed") for step in done) else 0


if __name__ == "__main__":
    sys.exit(main())
