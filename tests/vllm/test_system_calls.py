"""A lookup in vLLM's scheduler makes no system call: not to ask an engine, not to wake one, not to look at a clock."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from waiting import wait_for

import kvring

SCRIPT = """
import ctypes, gc, os, sys
import kvring
from harness.driver import Wanted
from harness.support import harness, run

made = harness(kvring.Engine(sys.argv[1]), num_blocks=600, max_model_len=2048, max_batched=2048)
prompt = [3 + n % 900 for n in range(2000)]
run(made, "cold", prompt, 1)
side = made.scheduler.connector.scheduler
# Without the harness's own watchers.
side.adapter = side.adapter._inner
print("stored", flush=True)
sys.stdin.readline()

# The kernel ends a thread at its first system call while this byte is 1 (syscall user dispatch).
PR_SET_SYSCALL_USER_DISPATCH, PR_SYS_DISPATCH_ON = 59, 1
forbidden = (ctypes.c_ubyte * 1)(0)
if ctypes.CDLL(None).prctl(PR_SET_SYSCALL_USER_DISPATCH, PR_SYS_DISPATCH_ON, 0, 0, forbidden):
    os._exit(77)
# No other Python thread asks for the interpreter, and nothing is collected.
sys.setswitchinterval(1e6)
gc.disable()
for index in range(40):
    made.add(Wanted(f"r{index}", prompt, 1))
found = []
requests = [made.ledger.requests[f"r{index}"] for index in range(40)]
for index, request in enumerate(requests):
    # The first ones take from malloc what they need.
    forbidden[0] = index >= 20
    answer = side.get_num_new_matched_tokens(request, 0)
    again = side.get_num_new_matched_tokens(request, 0)
    forbidden[0] = 0
    found.append((answer, again))
if sys.argv[2] == "control":
    forbidden[0] = 1
    os.getppid()
right = found == [((2000, True),) * 2] * 40
print(found[-1], right, file=sys.stderr, flush=True)
os._exit(0 if right else 1)
"""


@pytest.mark.parametrize("engine_is", ["asleep", "stopped", "dead", "control"])
def test_a_lookup_makes_none(engine: kvring.Engine, engine_is: str) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, engine.name, engine_is],
        cwd=Path(__file__).parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdin is not None and child.stdout is not None and engine.pid is not None
    pid = engine.pid
    wait_for(lambda: child.stdout.readline().strip() in ("stored", ""), "a prompt is stored")
    if engine_is == "stopped":
        os.kill(pid, signal.SIGSTOP)
    elif engine_is == "dead":
        engine.kill()
    _, said = child.communicate("\n")
    if engine_is == "stopped":
        os.kill(pid, signal.SIGCONT)
    if child.returncode == 77:
        pytest.skip("this kernel has no syscall user dispatch")
    assert child.returncode == (-signal.SIGSYS if engine_is == "control" else 0), said
