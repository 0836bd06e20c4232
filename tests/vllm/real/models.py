"""Tiny models with real seeded weights, made once and kept."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
CACHE = Path(os.environ.get("KVRING_TEST_CACHE", HERE.parent.parent / ".cache" / "vllm"))

WINDOW = 64
"""Tokens of the sliding window of the Gemma-3: two blocks, so that short prompts leave it."""


def model(arch: str = "llama", seed: int = 0) -> str:
    """The directory of a model; `arch` is `llama` or `swa` (a Gemma-3: sliding and full attention in turn)."""
    path = CACHE / "models" / f"{arch}-{seed}"
    if not (path / "done").exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        window = ["--window", str(WINDOW), "--layers", "4"] if arch == "swa" else []
        command = [sys.executable, HERE / "make_model.py", path, "--arch", arch, "--seed", str(seed), *window]
        subprocess.run(command, check=True, capture_output=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
        (path / "done").touch()
    return str(path)
