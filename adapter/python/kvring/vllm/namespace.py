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
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kvring import LayoutError
from kvring._logs import get_logger

from . import identity
from .content import Unknown
from .geometry import Geometry
from .identity import plain

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

logger = get_logger("vllm.kvring.namespace")

FORMAT = 4
"""Of what a fingerprint is made of, and of what a shard holds."""


def describe(
    vllm_config: VllmConfig,
    kv_cache_config: KVCacheConfig,
    geometry: Geometry,
    weights_version: str | None = None,
    *,
    tell: bool = True,
) -> dict[str, Any]:
    """The namespace in words: plain values, the same in every process that may share KV. `tell`: what keeps others from sharing
    it is said in the log."""
    import torch
    import vllm

    warn = logger.warning if tell else _say_nothing
    unknown: dict[str, None] = {}

    def known(what: Callable[..., Any], *arguments: Any) -> Any:
        """What this says. Where it cannot, whatever the reason is, the namespace is this vLLM's own: its start goes on."""
        try:
            return what(*arguments)
        except Unknown as error:
            unknown[str(error)] = None
        except Exception as error:
            unknown[f"{type(error).__name__}: {error}"] = None
        return None

    model, cache, parallel = vllm_config.model_config, vllm_config.cache_config, vllm_config.parallel_config
    load, speculative, lora = vllm_config.load_config, vllm_config.speculative_config, vllm_config.lora_config
    if str(cache.prefix_caching_hash_algo).startswith("xxhash") and "PYTHONHASHSEED" not in os.environ:
        # `init_none_hash`: then each process begins its keys with a number of its own.
        warn(
            f"with --prefix-caching-hash-algo {cache.prefix_caching_hash_algo} and no PYTHONHASHSEED nothing that kvring stores "
            "for this vLLM can be found by another one, or after its end; set PYTHONHASHSEED, or take sha256"
        )
    description = {
        "format": FORMAT,
        "vllm": vllm.__version__,
        # Which kernels there are for a backend that vLLM chooses by itself, and what it chooses.
        "torch": torch.__version__,
        "flashinfer": _version("flashinfer-python"),
        # What a configuration leaves out, and how images are prepared.
        "transformers": _version("transformers"),
        "platform": known(_platform, vllm_config),
        # The configuration itself is one of these files. Not what has become of it in memory: some models write into it while
        # they are built, in a worker's process and not in the scheduler's.
        "weights": known(identity.weights, vllm_config, weights_version),
        "weights_version": weights_version,
        "media": known(identity.media, vllm_config),
        "length": identity.length(model),
        "config_format": str(model.config_format),
        "hf_overrides": known(plain, model.hf_overrides) if isinstance(model.hf_overrides, dict) else None,
        "generation": known(plain, model.override_generation_config) if identity.is_llama4(model) else None,
        "implementation": [str(model.model_impl), known(plain, model.model_class_overrides)],
        # Which of the files are read, and how.
        "load_format": str(load.load_format),
        "load_options": known(plain, load.model_loader_extra_config)
        if isinstance(load.model_loader_extra_config, dict)
        else None,
        "ignore_patterns": known(plain, load.ignore_patterns),
        "quantization": [str(model.quantization), known(plain, model.quantization_config)],
        "dtype": str(model.dtype),
        # Its layers may take other kernels, also for requests without an adapter. (What an adapter makes of it salts the keys.)
        "lora": lora is not None,
        # As the layers have it: `cache_dtype` is changed by some models while they are built. It alone knows which fp8 it is.
        "kv_dtype": [_kv_dtype(group.kv_cache_spec) for group in kv_cache_config.kv_cache_groups],
        "e5m2": "e5m2" in str(cache.cache_dtype),
        "skipped_layers": known(plain, getattr(cache, "kv_cache_dtype_skip_layers", None)),
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
    if unknown:
        warn(f"what this vLLM stores is kept for itself alone, until it ends: {'; '.join(unknown)}")
        description["instance"] = identity.instance(vllm_config)
    return description


def fingerprint(description: dict[str, Any]) -> bytes:
    """The namespace's 32-byte name."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).digest()


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
        raise Unknown(f"cannot tell which GPUs these are ({error})") from error


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


def _say_nothing(_: str) -> None:
    """Another process of this vLLM's says it."""
