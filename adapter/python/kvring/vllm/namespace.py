"""The namespace: everything that decides which vLLMs may share KV, and that a chunk's key does not cover.

A key (from `request.block_hashes`) covers the tokens, multimodal inputs, prompt embeddings, `cache_salt` and the LoRA's name.
Everything else that decides the bytes of a page is in the namespace's *fingerprint*; two vLLMs that differ in any of it never see
each other's chunks. What changes while vLLM runs (a LoRA's content, weights that were replaced) goes into the key as a salt.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm.v1.kv_cache_interface import get_kv_cache_spec_kind as kind
from vllm.v1.kv_cache_interface import get_kv_cache_spec_sliding_window as window
from vllm.v1.kv_cache_interface import iter_layer_specs

from kvring import LayoutError
from kvring._logs import get_logger

from . import identity
from .content import Unknown
from .geometry import Geometry
from .identity import plain

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec, KVCacheSpec

logger = get_logger("vllm.kvring.namespace")

FORMAT = 4
"""The version of a fingerprint's ingredients and of a shard's content."""

_PACKAGES = (
    "flashinfer-python", "transformers", "mistral_common", "compressed-tensors", "torchao", "bitsandbytes",
)  # fmt: skip
"""Packages whose versions may decide the bytes of KV."""
_SAME_FILES = {"fastsafetensors": "safetensors", "instanttensor": "safetensors"}
"""Load formats that read the same files as another one (`DefaultModelLoader._prepare_weights`)."""
_NOT_OF_LOADING = ("enable_multithread_load", "num_threads", "enable_weights_track", "concurrency", "memory_limit")

_NOT_OF_KERNELS = frozenset({"enable_cutedsl_warmup", "enable_jit_warmup", "sparse_mla_prefill_workspace_factor"})
"""Options for work before the first request, and for the size of a workspace, which vLLM sets by a model's longest context."""

_DECIDES_NOTHING = re.compile(
    "PORT|HOST|_IPS?$|_PATH|_DIR$|URL|TIMEOUT|_LOG_|LOGGING|DEBUG|TRACE|_SCOPES|VLLM_DP_|RAY|VLLM_ALLOW_|USAGE|NIXL|P2P|MOONCAKE"
    "|_EC_|_NIC_|ELASTIC|PLUGINS|RESOLVER|TOOL|REGEX|XGRAMMAR|GPT_OSS|BUILD|DOCKER|IMAGE_TAG|PRECOMPILED|PROCESS_NAME|OMP_THREADS"
    "|RESERVED_CPU|COMPILE_CACHE|MEMORY_PROFILER|RUST|MLA_DISABLE"
)
"""Environment variables in which equal deployments differ, and those of vLLM's front end. Some models set the last one while
they are built, in a worker's process; the kind of a KV group tells its value."""
_WRITTEN_BY_WORKERS = frozenset({"VLLM_ALLREDUCE_USE_SYMM_MEM", "VLLM_ROCM_USE_SKINNY_GEMM", "VLLM_USE_AOT_COMPILE"})
"""vLLM's workers set these with `VLLM_BATCH_INVARIANT`, always to the same values (`override_envs_for_invariance`)."""


def describe(
    vllm_config: VllmConfig,
    kv_cache_config: KVCacheConfig,
    geometry: Geometry,
    weights_version: str | None = None,
    *,
    tell: bool = True,
) -> dict[str, Any]:
    """The namespace in words: plain values, the same in every process that may share KV. With `tell`, the log says what keeps
    other vLLMs from sharing it."""
    import torch
    import vllm

    warn = logger.warning if tell else _say_nothing
    unknown: dict[str, None] = {}

    def known(what: Callable[..., Any], *arguments: Any) -> Any:
        """The value of `what(*arguments)`. Where that raises, for whatever reason, vLLM's start goes on, and the namespace is
        this vLLM's own."""
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
        # Then each process begins its keys with a random number of its own (`init_none_hash`).
        warn(
            f"with --prefix-caching-hash-algo {cache.prefix_caching_hash_algo} and no PYTHONHASHSEED nothing that kvring stores "
            "for this vLLM can be found by another one, or after its end; set PYTHONHASHSEED, or take sha256"
        )
    layers = [_first_layer(group) for group in kv_cache_config.kv_cache_groups]
    description = {
        "format": FORMAT,
        "vllm": vllm.__version__,
        # It decides which kernels a backend of vLLM's has, and which of them vLLM chooses.
        "torch": torch.__version__,
        # They decide the values that a configuration leaves out, how images are prepared, how quantized weights are used.
        "packages": {package: _version(package) for package in _PACKAGES},
        "plugins": known(_plugins),
        "environment": known(_environment),
        "platform": known(_platform, vllm_config),
        # The model's configuration counts as one of these files, not as it is in memory: some models write into it while
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
        "load_format": _SAME_FILES.get(str(load.load_format), str(load.load_format)),
        "load_options": known(_load_options, load.model_loader_extra_config),
        "ignore_patterns": known(plain, load.ignore_patterns),
        "quantization": [str(model.quantization), known(plain, model.quantization_config)],
        "dtype": str(model.dtype),
        # With LoRA, layers may take other kernels, also for requests without an adapter. (An adapter's content salts keys.)
        "lora": lora is not None,
        # From the layers, because some models change `cache_dtype` while they are built. Only that tells which fp8 it is.
        "kv_dtype": [_kv_dtype(layer) for layer in layers],
        "kv_variant": [variant for variant in ("e5m2", "4over6") if variant in str(cache.cache_dtype)],
        "skipped_layers": known(plain, getattr(cache, "kv_cache_dtype_skip_layers", None)),
        "attention": known(_options, vllm_config.attention_config, _written_by_a_model(model)),
        "kernels": known(_options, vllm_config.kernel_config),
        "layout": str(kv_cache_config.kv_cache_layout),
        "hash_algorithm": str(cache.prefix_caching_hash_algo),
        "chunk_tokens": geometry.chunk_tokens,
        "groups": [
            # With a pipeline each stage has a first layer of its own.
            [
                kind(layer).value,
                group.tokens,
                window(layer),
                layer.page_size_bytes if parallel.pipeline_parallel_size == 1 else None,
            ]
            for layer, group in zip(layers, geometry.groups, strict=True)
        ],
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
    """The hardware that computes: the CPU's instruction set, or each rank's kind of GPU. Two kinds of GPU round differently, use
    different kernels, and may have different KV formats.

    NVML names the GPUs without CUDA, which the scheduler's process must not begin to use. (Where there is no NVML, vLLM itself
    has asked CUDA in all of its processes by now.)"""
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
    """Raises `LayoutError` where NVML and CUDA name different kinds of GPU for this rank. In a node with several kinds they
    number the GPUs in different orders unless told otherwise, and the namespace would name the wrong ones."""
    import torch

    try:
        said = gpu_names(vllm_config)[rank]
    except Exception:
        # Then the namespace does not name the GPUs either: see `_platform`.
        return
    name = torch.cuda.get_device_name(device)
    if not (name.startswith(said) or said.startswith(name)):
        raise LayoutError(
            f"expected GPU {device} to be the {said!r} that NVML names, got {name!r} from CUDA: set CUDA_DEVICE_ORDER=PCI_BUS_ID"
        )


def _first_layer(group: KVCacheGroupSpec) -> KVCacheSpec:
    """A group's first layer: the scheduler's side is told of no other."""
    return next(iter(iter_layer_specs(group.kv_cache_spec)))


def _kv_dtype(layer: KVCacheSpec) -> list[str]:
    quantized = getattr(layer, "kv_quant_mode", None)
    return [str(getattr(layer, "dtype", None)), getattr(quantized, "name", ""), str(getattr(layer, "cache_dtype_str", None))]


def _options(config: Any, left_out: frozenset[str] = frozenset()) -> dict[str, str]:
    """All options of one of vLLM's configurations, also those that only a later vLLM has."""
    names = [field.name for field in dataclasses.fields(config) if field.name not in left_out | _NOT_OF_KERNELS]
    return {name: plain(getattr(config, name)) for name in names}


def _written_by_a_model(model: ModelConfig) -> frozenset[str]:
    """Options of attention that a model sets while it is built, in a worker's process and not in the scheduler's."""
    return frozenset({"sparse_mla_force_mqa"} if any("HYV4" in name for name in model.architectures) else ())


def _load_options(extra: Any) -> str | None:
    """The loader's options that decide which files are read, and how; not those for how many are read at once."""
    if not isinstance(extra, dict):
        return None
    return plain({name: value for name, value in extra.items() if name not in _NOT_OF_LOADING})


def _environment() -> dict[str, Any]:
    """The environment variables of vLLM that are set and may decide the bytes of KV."""
    from vllm import envs

    left_out = _WRITTEN_BY_WORKERS if envs.VLLM_BATCH_INVARIANT else frozenset()
    return {
        name: value
        for name, value in envs.compile_factors().items()
        if name.startswith("VLLM_") and name in os.environ and name not in left_out and not _DECIDES_NOTHING.search(name)
    }


def _plugins() -> list[list[str]]:
    """The plugins of vLLM, which may replace its code."""
    from vllm import envs

    plugins = [
        plugin
        for group in ("vllm.general_plugins", "vllm.platform_plugins")
        for plugin in importlib.metadata.entry_points(group=group)
        if envs.VLLM_PLUGINS is None or plugin.name in envs.VLLM_PLUGINS
    ]
    # Without vLLM's own plugins, which its version covers, and without kvring's, which `FORMAT` covers.
    theirs = [plugin for plugin in plugins if plugin.module.partition(".")[0] not in ("vllm", "kvring")]
    return sorted(
        [plugin.name, plugin.value, *((plugin.dist.name, plugin.dist.version) if plugin.dist is not None else ())]
        for plugin in theirs
    )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _say_nothing(_: str) -> None:
    """Logs nothing: another process of this vLLM logs it."""
