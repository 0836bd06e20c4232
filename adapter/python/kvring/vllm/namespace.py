"""Who may share KV with whom: everything that a chunk's key does not cover.

A key (from `request.block_hashes`) covers the tokens, multimodal inputs, prompt embeddings, `cache_salt` and the LoRA's name.
Everything else that decides the bytes of a page is in the namespace's *fingerprint*; two vLLMs that differ in any of it never see
each other's chunks. What changes while vLLM runs (a LoRA's content, weights that were replaced) goes into the key as a salt.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvring import LayoutError
from kvring._logs import get_logger

from .geometry import Geometry

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.lora.request import LoRARequest
    from vllm.v1.kv_cache_interface import KVCacheConfig

logger = get_logger("vllm.kvring.namespace")

FORMAT = 2
"""Of what a fingerprint is made of, and of what a shard holds."""

SALT_BYTES = 16
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".json")


def describe(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, geometry: Geometry) -> dict[str, Any]:
    """The namespace in words: plain values, the same in every process that may share KV."""
    import torch
    import vllm

    model, cache, parallel = vllm_config.model_config, vllm_config.cache_config, vllm_config.parallel_config
    speculative = vllm_config.speculative_config
    return {
        "format": FORMAT,
        "vllm": vllm.__version__,
        # Which kernels there are for a backend that vLLM chooses by itself, and what it chooses.
        "torch": torch.__version__,
        "flashinfer": _version("flashinfer-python"),
        "platform": _platform(vllm_config),
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
        # As the layers have it: `cache_dtype` is changed by some models while they are built. It alone knows which fp8 it is.
        "kv_dtype": [_kv_dtype(group.kv_cache_spec) for group in kv_cache_config.kv_cache_groups],
        "e5m2": "e5m2" in str(cache.cache_dtype),
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


def _platform(vllm_config: VllmConfig) -> list[str]:
    """What computes: the CPU's instruction set, or the kinds of the GPUs, rank by rank. Two kinds of GPU round differently, take
    different kernels, and may have different KV formats.

    Asked of NVML, which knows the GPUs without CUDA: the scheduler's process must not begin to use one. (Where there is no NVML
    vLLM itself has asked CUDA in all of its processes by now.)"""
    import torch
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        return [current_platform.device_name, torch.backends.cpu.get_cpu_capability()]
    try:
        return [current_platform.device_name, *gpu_names(vllm_config)]
    except Exception as error:
        logger.warning("cannot tell which GPUs these are (%s): their KV is kept for this vLLM alone, until it ends", error)
        return [current_platform.device_name, vllm_config.instance_id]


def gpu_names(vllm_config: VllmConfig) -> list[str]:
    """The kind of each rank's GPU, as `vllm.v1.worker.gpu_worker.Worker.init_device` numbers them."""
    from vllm.platforms import current_platform

    parallel = vllm_config.parallel_config
    first = 0
    if parallel.distributed_executor_backend not in ("ray", "external_launcher") and parallel.data_parallel_backend != "ray":
        local = parallel.data_parallel_rank_local
        first = (parallel.data_parallel_index if local is None else local) * parallel.world_size
    assigned = parallel.assigned_physical_gpu_ids
    ranks = range(first, first + parallel.world_size)
    if assigned is None:
        return [str(current_platform.get_device_name(rank)) for rank in ranks]
    # The mapping is in force in the workers only, so the physical numbers are looked up here.
    from vllm.platforms.cuda import with_nvml_context

    name = with_nvml_context(current_platform._get_physical_device_name)
    return [str(name(assigned[rank])) for rank in ranks]


def check_gpu(vllm_config: VllmConfig, rank: int, device: int) -> None:
    """Raises `LayoutError` where NVML says of this rank's GPU what CUDA does not: in a node with several kinds of GPU they count
    in different orders unless told otherwise, and who may share KV would be anybody's guess."""
    import torch

    try:
        said = gpu_names(vllm_config)[rank]
    except Exception:
        # Nothing has been said of it: see `_platform`.
        return
    name = torch.cuda.get_device_name(device)
    if not (name.startswith(said) or said.startswith(name)):
        raise LayoutError(
            f"expected GPU {device} to be the {said!r} that NVML names, got {name!r} from CUDA: set CUDA_DEVICE_ORDER=PCI_BUS_ID"
        )


def _kv_dtype(spec: Any) -> list[str]:
    """Of a group's layers, or of the first of them, which is all that the scheduler's side is told."""
    layer = next(iter(spec.kv_cache_specs.values())) if hasattr(spec, "kv_cache_specs") else spec
    quantized = getattr(layer, "kv_quant_mode", None)
    return [str(getattr(layer, "dtype", None)), getattr(quantized, "name", ""), str(getattr(layer, "cache_dtype_str", None))]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


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
