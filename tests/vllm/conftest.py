"""Tests of the vLLM connector. They need vLLM; without it they are skipped, and `tests/run` says so."""

import importlib.util
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

collect_ignore: list[str] = []
if importlib.util.find_spec("vllm") is None:
    collect_ignore += ["test_harness_self.py", "test_harness_kvring.py"]
