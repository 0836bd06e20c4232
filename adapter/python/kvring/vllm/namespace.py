"""Who may share KV with whom: everything that a chunk's key does not cover.

A key (from `request.block_hashes`) covers the tokens, multimodal inputs, prompt embeddings, `cache_salt` and the LoRA's name.
Everything else that decides the bytes of a page is in the namespace's *fingerprint*; two vLLMs that differ in any of it never see
each other's chunks. What changes while vLLM runs (a LoRA's content, weights that were replaced) goes into the key as a salt.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .geometry import Geometry

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.lora.request import LoRARequest
    from vllm.v1.kv_cache_interface import KVCacheConfig

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
        "weights": weights_identity(str(model.model), getattr(model.hf_config, "_commit_hash", None)),
        "hf_config": model.hf_config.to_json_string(use_diff=False),
        "load_format": str(vllm_config.load_config.load_format),
        "seed": model.seed if str(vllm_config.load_config.load_format) == "dummy" else None,
        "quantization": str(model.quantization),
        "dtype": str(model.dtype),
        "cache_dtype": str(cache.cache_dtype),
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


def weights_identity(model: str, commit: str | None) -> list[Any]:
    """Which weights these are: the files themselves where they are local (names, sizes, times of change), else the commit."""
    files = _files(Path(model))
    return ["files", files] if files else ["commit", commit]


def lora_salt(lora: LoRARequest | None) -> bytes | None:
    """What tells a LoRA's content from another's of the same name: its files. Read anew for each request, as vLLM may load it
    anew."""
    if lora is None:
        return None
    identity = ["lora", lora.lora_name, lora.lora_path, _files(Path(lora.lora_path)) if lora.lora_path else []]
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


def _files(path: Path) -> list[list[Any]]:
    found = []
    try:
        entries = list(os.scandir(path)) if path.is_dir() else [path] if path.is_file() else []
        for entry in entries:
            if entry.name.endswith(_WEIGHTS):
                stat = os.stat(entry)
                found.append([entry.name, stat.st_size, stat.st_mtime_ns])
    except OSError:
        return []
    return sorted(found)
