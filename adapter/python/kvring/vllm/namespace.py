"""Who may share KV with whom: everything that a chunk's key does not cover.

A key (from `request.block_hashes`) covers the tokens, multimodal inputs, prompt embeddings, `cache_salt` and the LoRA's name.
Everything else that decides the bytes of a page is in the namespace's *fingerprint*; two vLLMs that differ in any of it never see
each other's chunks. What changes while vLLM runs (a LoRA's content, weights that were replaced) goes into the key as a salt.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .geometry import Geometry

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.lora.request import LoRARequest
    from vllm.v1.kv_cache_interface import KVCacheConfig

logger = logging.getLogger("vllm.kvring.namespace")

FORMAT = 1
"""Of what a fingerprint is made of, and of what a shard holds."""

SALT_BYTES = 16
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".json")


def describe(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, geometry: Geometry) -> dict[str, Any]:
    """The namespace in words: plain values, the same in every process that may share KV."""
    import torch
    import vllm
    from vllm.platforms import current_platform

    model, cache, parallel = vllm_config.model_config, vllm_config.cache_config, vllm_config.parallel_config
    speculative = vllm_config.speculative_config
    isa = torch.backends.cpu.get_cpu_capability() if current_platform.is_cpu() else ""
    return {
        "format": FORMAT,
        "vllm": vllm.__version__,
        "platform": f"{current_platform.device_name}/{isa}",
        "model": str(model.model),
        "revision": str(model.revision),
        "weights": weights_identity(str(model.model), getattr(model.hf_config, "_commit_hash", None), vllm_config.instance_id),
        # The configuration itself is one of the weights' files. Not what has become of it in memory: some models write into it
        # while they are built, in a worker's process and not in the scheduler's.
        "code_revision": str(model.code_revision),
        "hf_overrides": _plain(model.hf_overrides),
        "generation": _plain(model.override_generation_config),
        # Some kinds of rotary embedding differ by it, for all positions.
        "max_model_len": model.max_model_len,
        "load_format": str(vllm_config.load_config.load_format),
        "seed": model.seed if str(vllm_config.load_config.load_format) == "dummy" else None,
        "quantization": str(model.quantization),
        "dtype": str(model.dtype),
        "cache_dtype": str(cache.cache_dtype),
        "skipped_layers": _plain(getattr(cache, "kv_cache_dtype_skip_layers", None)),
        "attention_backend": str(vllm_config.attention_config.backend),
        "layout": str(kv_cache_config.kv_cache_layout),
        "hash_algorithm": str(cache.prefix_caching_hash_algo),
        "chunk_tokens": geometry.chunk_tokens,
        "groups": [[group.kind, group.tokens, group.window] for group in geometry.groups],
        "tensor_parallel": parallel.tensor_parallel_size,
        "pipeline_parallel": parallel.pipeline_parallel_size,
        "expert_parallel": bool(parallel.enable_expert_parallel),
        "replicas": geometry.replicas,
        "speculative": str(speculative.method) if speculative is not None else None,
    }


def fingerprint(description: dict[str, Any]) -> bytes:
    """The namespace's 32-byte name."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).digest()


def weights_identity(model: str, commit: str | None, instance: str) -> list[Any]:
    """Which weights these are: the files themselves where they are local (names, sizes, times of change), else the commit. What
    can be told by neither (a bucket, a streamed model) is shared with nobody else than this vLLM's own processes."""
    files = _files(Path(model))
    if files:
        return ["files", files]
    if commit:
        return ["commit", commit]
    logger.warning("cannot tell which weights %s has: its KV is kept for this vLLM alone, until it ends", model)
    return ["instance", instance]


class LoraSalts:
    """What tells a LoRA's content from another's of the same name: its files."""

    def __init__(self) -> None:
        self._files: dict[tuple[str, int, str], list[Any]] = {}
        self._nowhere = os.urandom(SALT_BYTES)

    def of(self, lora: LoRARequest | None) -> bytes | None:
        """For a request. vLLM keeps an adapter that it has loaded while its files change, and loads it anew when it likes: from
        then on nobody knows which content a request had, and what it computes is found by nobody."""
        if lora is None:
            return None
        name = (lora.lora_name, lora.lora_int_id, lora.lora_path)
        files: list[Any] = _files(Path(lora.lora_path)) if lora.lora_path else []
        if self._files.setdefault(name, files) != files or lora.load_inplace:
            return os.urandom(SALT_BYTES)
        # What is not here as files may change behind the name: it is known to this process alone.
        identity = ["lora", lora.lora_name, files or [lora.lora_path, self._nowhere.hex()]]
        return hashlib.sha256(json.dumps(identity).encode()).digest()[:SALT_BYTES]


def salted(key: bytes, salt: bytes | None) -> bytes:
    """The key that is looked up and stored: keys are digests, so a fixed difference keeps them apart from all others."""
    if salt is None:
        return key[:SALT_BYTES]
    return (int.from_bytes(key[:SALT_BYTES], "little") ^ int.from_bytes(salt, "little")).to_bytes(SALT_BYTES, "little")


def joined(first: bytes | None, second: bytes | None) -> bytes | None:
    """Both salts in one."""
    if first is None or second is None:
        return first or second
    return hashlib.sha256(first + second).digest()[:SALT_BYTES]


def _plain(value: Any) -> str:
    """In words that are the same in every process."""
    if callable(value):
        return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__qualname__)}"
    return json.dumps(value, sort_keys=True, default=str)


def _files(path: Path) -> list[list[Any]]:
    found = []
    try:
        for directory, _, names in os.walk(path) if path.is_dir() else [(str(path.parent), [], [path.name])]:
            for name in names:
                if name.endswith(_WEIGHTS):
                    file = Path(directory, name)
                    stat = file.stat()
                    found.append([str(file.relative_to(path)), stat.st_size, stat.st_mtime_ns])
    except OSError:
        return []
    return sorted(found)
