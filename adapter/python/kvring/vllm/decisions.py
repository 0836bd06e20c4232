"""Checks for decisions of vLLM that a connector must not overrule: models and options that cannot work with kvring are refused
when vLLM starts, with the reason."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvring import ConfigError, LayoutError

from .config import Config
from .geometry import Geometry

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def check(config: Config, vllm_config: VllmConfig, geometry: Geometry, *, loads: bool) -> None:
    """Raises `LayoutError` for a model that cannot be served from a cache, `ConfigError` for an option that cannot work here.
    `loads`: may this vLLM load from the cache?"""
    _check_prefix_caching(vllm_config)
    if loads:
        _check_routed_experts(vllm_config)
        _check_synchronous_loads(config, vllm_config, geometry)


def _check_prefix_caching(vllm_config: VllmConfig) -> None:
    """After a load a prompt is computed from its middle on, as after a hit in vLLM's own prefix cache. Where a user has switched
    that cache off, kvring can still be used; where vLLM has done so, the model cannot be computed like that. vLLM does not say
    which of the two it was, so this checks each of vLLM's own reasons. (`geometry` checks those that lie in the layers.)"""
    import vllm.envs as envs
    from vllm.platforms import current_platform

    model, is_off = vllm_config.model_config, not vllm_config.cache_config.enable_prefix_caching
    why = None
    if not model.is_prefix_caching_supported:
        pooler = model.pooler_config
        what = f"{pooler.seq_pooling_type}/{pooler.tok_pooling_type} pooling over " if pooler is not None else ""
        why = f"{what}{model.attn_type} attention needs the whole prompt to be computed at once"
    elif is_off and current_platform.is_cpu() and model.use_mla:
        why = "the CPU backend's MLA computes wrong values for a prompt of which it is given a part"
    elif is_off and envs.VLLM_BATCH_INVARIANT:
        why = "with VLLM_BATCH_INVARIANT this attention backend's values would depend on what has been cached"
    if why is not None:
        raise LayoutError(
            f"kvring cannot be used with {model.model}: vLLM itself does without its prefix cache here, since {why}; start vLLM "
            "without kvring"
        )


def _check_routed_experts(vllm_config: VllmConfig) -> None:
    """vLLM knows the routed experts only of tokens that it has computed itself, and its workers end where those of a hit are
    missing."""
    if vllm_config.aux_output_config.enabled:
        raise ConfigError(
            "kvring cannot be used with --enable-return-routed-experts: vLLM knows the routed experts of tokens that it has "
            "computed itself only, not of those that are loaded"
        )


def _check_synchronous_loads(config: Config, vllm_config: VllmConfig, geometry: Geometry) -> None:
    """After a synchronous load has failed, vLLM must take back what its step has computed before the next step begins."""
    if config.load != "sync":
        return
    why = None
    if len(geometry.groups) > 1:
        why = f"vLLM cannot be told which blocks were not loaded where a model has {len(geometry.groups)} KV groups"
    elif geometry.has_windows:
        why = "where a model has a sliding window vLLM cannot go on from the first block that was not loaded"
    elif vllm_config.max_concurrent_batches > 1:
        why = (
            "vLLM schedules the next step before it knows that a load has failed (asynchronous scheduling, which "
            "--no-async-scheduling switches off, or pipeline parallelism)"
        )
    if why is not None:
        raise ConfigError(f'kvring.load: expected "async", got "sync": {why}')
