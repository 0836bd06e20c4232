"""vLLM's answers without any connector: each prompt is asked once, and its answer kept for the session."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from real.vllm import Vllm, Zygote


class Baseline:
    """Answers of plain vLLMs: one process for each model, one prompt at a time, no prefix cache, ample blocks."""

    def __init__(self, zygote: Zygote, directory: Path) -> None:
        self.zygote = zygote
        self.directory = directory
        self.directory.mkdir(parents=True, exist_ok=True)
        self.processes: dict[str, Vllm] = {}

    def answers(self, model: str, prompts: Sequence[list[int]], **params: Any) -> list[dict[str, Any]]:
        """The answer to each prompt, as `Driver.generate` gives it."""
        keys = [hashlib.sha256(json.dumps([model, prompt, params]).encode()).hexdigest() for prompt in prompts]
        missing = [(key, prompt) for key, prompt in zip(keys, prompts, strict=True) if not self.path(key).exists()]
        if missing:
            found = self.process(model).generate([prompt for _, prompt in missing], **params)
            for (key, _), answer in zip(missing, found, strict=True):
                self.path(key).write_text(json.dumps(answer))
        return [json.loads(self.path(key).read_text()) for key in keys]

    def path(self, key: str) -> Path:
        return self.directory / f"{key[:32]}.json"

    def process(self, model: str) -> Vllm:
        if model not in self.processes:
            self.processes[model] = Vllm(self.zygote, model)
        return self.processes[model]

    def close(self) -> None:
        for process in self.processes.values():
            process.close()
