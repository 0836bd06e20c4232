"""`benches/gpu/torch_rounds.py`, as far as it runs without a GPU: on one there is no time to find out that it is broken."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benches" / "gpu" / "torch_rounds.py"


@pytest.mark.parametrize(("part", "done"), [("rounds", "rounds"), ("kill", "kills")])
def test_a_part_runs_in_host_memory(part: str, done: str, tmp_path: Path) -> None:
    found = tmp_path / "found.json"
    # Each goes on for a share of this time, and does its work once at least.
    command = [sys.executable, SCRIPT, "--cpu", "--only", part, "--seconds", "1", "--arena", "128MiB", "--json", found]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(found.read_text())[part][done] > 0


def test_parts_that_need_a_gpu_say_so(tmp_path: Path) -> None:
    command = [sys.executable, SCRIPT, "--cpu", "--only", "graph,slowdown", "--seconds", "0"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    found = json.loads(ended.stdout)
    assert ended.returncode == 0 and found["graph"] == found["slowdown"] == {"skipped": "needs a GPU"}, ended.stderr
    command = [sys.executable, SCRIPT, "--cpu", "--only", "graphs"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 2 and "expected some of rounds,graph,slowdown,kill, got graphs" in ended.stderr
