"""Real vLLM configurations for models that do not exist.

The numbers are tiny (blocks of 4 tokens, 8 bytes a token and layer) so that a scenario preempts, fills and wraps around
within a few dozen steps. The KV cache configuration comes from vLLM's own code, so groups, strides and aliasing are those
of a real engine.
"""

import copy
import json
import logging
import os
import tempfile
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import torch
from make_model import CONFIGURATIONS
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.core.kv_cache_utils import (
    generate_scheduler_kv_cache_config,
    get_kv_cache_configs,
    kv_cache_groups_tp_replicas,
    resolve_cache_hit_alignment_tokens,
    resolve_kv_cache_block_sizes,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheSpec, SlidingWindowSpec

VOCAB = 997

# vLLM logs every failed load as an error: in the harness they are wanted.
logging.getLogger("vllm").setLevel(logging.CRITICAL)


@dataclass
class Setup:
    """The options of an engine."""

    connector: str
    connector_module: str
    extra: dict[str, Any] = field(default_factory=dict)
    block_size: int = 4
    num_blocks: int = 30
    max_model_len: int = 96
    layers: int = 2
    window: int | None = None
    """Tokens of the sliding window of a KV group; None: there is full attention only."""
    full: bool = True
    """Is there a KV group of full attention?"""
    tp: int = 1
    replicas: int = 1
    layout: str = "LBHNC"
    prefix_caching: bool = True
    policy: str = "fcfs"
    max_batched: int = 32
    max_seqs: int = 4
    long_prefill: int = 0
    failure_policy: str = "recompute"
    v2_runner: bool = False
    async_scheduling: bool = False
    nonce: str = ""
    """Part of the model's configuration: each scenario has another model, so none finds another one's KV."""


@cache
def _model_dir() -> str:
    """A model directory with a configuration, and weights that nobody loads: they say which model it is."""
    path = Path(tempfile.mkdtemp(prefix="kvring-harness-model-"))
    config = CONFIGURATIONS["llama"] | {"max_position_embeddings": 1 << 20}
    (path / "config.json").write_text(json.dumps(config))
    (path / "model.safetensors").write_bytes(b"none")
    return str(path)


def vllm_config(setup: Setup) -> VllmConfig:
    """As `vllm serve` would make it, then shrunk: CPU vLLM insists on blocks of 32, the scheduler does not care."""
    config = EngineArgs(
        model=_model_dir(),
        skip_tokenizer_init=True,
        enforce_eager=True,
        dtype="float32",
        block_size=32,
        max_model_len=setup.max_model_len,
        num_gpu_blocks_override=setup.num_blocks,
        kv_cache_memory_bytes=1 << 28,
        max_num_batched_tokens=max(setup.max_batched, setup.max_seqs),
        max_num_seqs=setup.max_seqs,
        enable_prefix_caching=setup.prefix_caching,
        scheduling_policy=setup.policy,  # type: ignore[arg-type]
        long_prefill_token_threshold=setup.long_prefill,
        disable_hybrid_kv_cache_manager=False,
        kv_transfer_config={  # type: ignore[arg-type]
            "kv_connector": setup.connector,
            "kv_connector_module_path": setup.connector_module,
            "kv_role": "kv_both",
            "kv_load_failure_policy": setup.failure_policy,
            "kv_connector_extra_config": dict(setup.extra),
        },
    ).create_engine_config()
    config.model_config.hf_config.kvring_harness = setup.nonce
    config.cache_config.block_size = setup.block_size
    config.cache_config.kv_cache_layout = setup.layout
    config.scheduler_config.async_scheduling = setup.async_scheduling
    config.parallel_config.tensor_parallel_size = setup.tp
    config.parallel_config.world_size = setup.tp
    return config


def layer_specs(setup: Setup) -> dict[str, KVCacheSpec]:
    """8 bytes a token and layer: one head, K and V of one float each."""
    common: dict[str, Any] = {
        "block_size": setup.block_size,
        "num_kv_heads": 1,
        "head_size": 1,
        "dtype": torch.float32,
        "max_tp_shards": setup.tp // setup.replicas,
    }
    specs: dict[str, KVCacheSpec] = {}
    for index in range(setup.layers):
        if setup.full:
            specs[f"model.layers.{2 * index}.self_attn.attn"] = FullAttentionSpec(**common)
        if setup.window is not None:
            name = f"model.layers.{2 * index + 1}.self_attn.attn"
            specs[name] = SlidingWindowSpec(sliding_window=setup.window, **common)
    return specs


@dataclass
class Engine:
    """The configurations of one engine: the scheduler's, and one for each rank."""

    setup: Setup
    scheduler: VllmConfig
    scheduler_kv: KVCacheConfig
    ranks: list[VllmConfig]
    ranks_kv: list[KVCacheConfig]
    block_size: int
    hash_block_size: int


def engine(setup: Setup) -> Engine:
    """As `EngineCore._initialize_kv_caches` makes them, without an executor."""
    config = vllm_config(setup)
    specs = layer_specs(setup)
    kv_configs = get_kv_cache_configs(config, [dict(specs) for _ in range(setup.tp)], [1 << 28] * setup.tp)
    scheduler_kv = generate_scheduler_kv_cache_config(kv_configs)
    config.cache_config.num_gpu_blocks = scheduler_kv.num_blocks
    block_size, hash_block_size = resolve_kv_cache_block_sizes(scheduler_kv, config)
    alignment = resolve_cache_hit_alignment_tokens(scheduler_kv, config, block_size, hash_block_size)
    for kv_config in (*kv_configs, scheduler_kv):
        kv_config.kv_cache_layout = config.cache_config.kv_cache_layout
        kv_config.hash_block_size = hash_block_size
        kv_config.cache_hit_alignment_tokens = alignment
        kv_config.kv_tp_replicas = kv_cache_groups_tp_replicas(kv_config.kv_cache_groups, setup.tp)
    ranks = []
    for rank in range(setup.tp):
        own = copy.deepcopy(config)
        own.parallel_config.rank = rank
        ranks.append(own)
    return Engine(setup, config, scheduler_kv, ranks, kv_configs, block_size, hash_block_size)
