"""How vLLM's blocks make chunks, and which rank holds which part of one. The same on the scheduler's side and on the workers'.

A chunk covers `chunk_tokens` tokens in *every* KV group. Its block ids are those of group 0, then those of group 1, and so
on; each rank's *shard* holds the pages of those blocks. So one key, one lease and one round cover a hybrid model as well.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager, SlidingWindowManager
from vllm.v1.kv_cache_interface import (
    KVCacheGroupSpec,
    get_kv_cache_spec_kind,
    get_kv_cache_spec_sliding_window,
    iter_layer_specs,
)
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from kvring import SKIP, LayoutError

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.kv_cache_utils import KVCacheBlock
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec

NULL_BLOCK = 0
"""vLLM's block in place of those that a sliding window no longer looks at. It is nobody's, and never read or written."""

_MANAGERS = {FullAttentionManager, SlidingWindowManager}
"""The managers of vLLM that keep a full block unchanged until it leaves the window, if there is one."""

_WITHOUT_DRAFT_KV = {None, "ngram", "ngram_gpu", "suffix"}

BlockTable = Sequence[Sequence[int]]
"""One request's block ids, for each group."""

Block = TypeVar("Block")
"""A block's id, or vLLM's own object for it."""


@dataclass(frozen=True, slots=True)
class Group:
    """Layers that share a block table."""

    kind: str
    tokens: int
    """Tokens of a block."""
    blocks: int
    """Blocks of a chunk."""
    window: int | None
    """How many tokens its attention looks back; `None`: all."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """Blocks, chunks, ranks."""

    groups: tuple[Group, ...]
    chunk_tokens: int
    hash_tokens: int
    """Tokens that one of `request.block_hashes` covers."""
    ranks: int
    """vLLM's workers: each reports every job."""
    replicas: int
    """Consecutive ranks that hold the same bytes (MLA): the first of them stores."""
    chunk_bytes: int
    """Bytes of a chunk's part on the first rank: used for limits."""

    @classmethod
    def of(cls, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, chunk_blocks: int) -> Geometry:
        """The geometry of a vLLM. Raises `LayoutError`, with the reason, for a model or an option that is not supported."""
        _check_parallel(vllm_config)
        _check_speculation(vllm_config, kv_cache_config)
        specs = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
        if not specs:
            raise LayoutError("expected a model with a KV cache, got one without: kvring has nothing to keep")
        for index, group in enumerate(kv_cache_config.kv_cache_groups):
            _check_group(index, group)
        chunk_tokens = math.lcm(*(spec.block_size for spec in specs)) * chunk_blocks
        groups = tuple(
            Group(
                kind=get_kv_cache_spec_kind(spec).value,
                tokens=spec.block_size,
                blocks=chunk_tokens // spec.block_size,
                window=get_kv_cache_spec_sliding_window(spec),
            )
            for spec in specs
        )
        for index, group in enumerate(groups):
            if group.window is not None and group.window < chunk_tokens:
                raise LayoutError(
                    f"kvring.chunk_blocks: KV group {index} keeps a window of {group.window} tokens, so no whole chunk of "
                    f"{chunk_tokens} tokens ever lies in it; expected chunks of at most {group.window} tokens"
                )
        hash_tokens = kv_cache_config.hash_block_size or math.gcd(*(spec.block_size for spec in specs))
        if chunk_tokens % hash_tokens:
            raise LayoutError(
                f"a chunk of {chunk_tokens} tokens is no multiple of the {hash_tokens} tokens of a prefix-cache hash"
            )
        ranks, replicas = vllm_config.parallel_config.world_size, kv_cache_config.kv_tp_replicas
        if replicas < 1 or ranks % replicas:
            raise LayoutError(f"expected a divisor of the {ranks} ranks as kv_tp_replicas, got {replicas}")
        block_bytes = [_block_bytes(group) for group in kv_cache_config.kv_cache_groups]
        chunk_bytes = sum(group.blocks * size for group, size in zip(groups, block_bytes, strict=True))
        return cls(groups, chunk_tokens, hash_tokens, ranks, replicas, chunk_bytes)

    @property
    def world(self) -> int:
        """Shards of a chunk."""
        return self.ranks // self.replicas

    @property
    def hashes_per_chunk(self) -> int:
        """How many of `request.block_hashes` one chunk has; the last of them is its key."""
        return self.chunk_tokens // self.hash_tokens

    @property
    def has_windows(self) -> bool:
        """Can a running request lose blocks?"""
        return any(group.window is not None for group in self.groups)

    @property
    def knows_bad_blocks(self) -> bool:
        """Can vLLM go on from the first block that a load has not brought? Not with several groups, whose blocks it cannot tell
        apart, and not with a window, because the blocks in front of that one are missing as well. Then vLLM computes the whole
        request again."""
        return len(self.groups) == 1 and not self.has_windows

    def shard_of(self, rank: int) -> int:
        """The part of a chunk that this rank holds."""
        return rank // self.replicas

    def stores(self, rank: int) -> bool:
        """Does this rank store its part? If not, another rank that holds the same bytes does."""
        return rank % self.replicas == 0

    def of_chunk(self, table: Sequence[Sequence[Block]], chunk: int) -> list[Block]:
        """A chunk's blocks, those of group 0 first, as far as the table has them."""
        blocks: list[Block] = []
        for group, of_group in zip(self.groups, table, strict=True):
            blocks += of_group[chunk * group.blocks : (chunk + 1) * group.blocks]
        return blocks

    def to_store(self, table: Sequence[Sequence[KVCacheBlock]], chunk: int) -> list[int] | None:
        """A chunk's block ids; `None` where one of its blocks is not in the table yet, or has left it."""
        ids = [block.block_id for block in self.of_chunk(table, chunk)]
        whole = len(ids) == sum(group.blocks for group in self.groups)
        return ids if whole and NULL_BLOCK not in ids else None

    def to_load(self, table: BlockTable, first: int, last: int, start: int, end: int) -> list[int]:
        """The block ids that a load of tokens `start` to `end` writes, for chunks `first` to `last` (exclusive), one after the
        other. `SKIP` stands for blocks below `start`, which vLLM has itself and may share, so that they are never written, and
        for those that the table does not have. Thousands of blocks are usual, so with one group there is no loop over them."""
        by_group = [
            self._group_to_load(group, ids, first, last, start, end) for group, ids in zip(self.groups, table, strict=True)
        ]
        if len(by_group) == 1:
            return by_group[0]
        sizes = [group.blocks for group in self.groups]
        return [
            block
            for chunk in range(last - first)
            for ids, size in zip(by_group, sizes, strict=True)
            for block in ids[chunk * size : (chunk + 1) * size]
        ]

    @staticmethod
    def _group_to_load(group: Group, ids: Sequence[int], first: int, last: int, start: int, end: int) -> list[int]:
        begin, stop = first * group.blocks, last * group.blocks
        lowest = max(begin, -(-start // group.tokens))
        highest = max(lowest, min(stop, -(-end // group.tokens), len(ids)))
        wanted = list(ids[lowest:highest])
        if NULL_BLOCK in wanted:
            wanted = [SKIP if block == NULL_BLOCK else block for block in wanted]
        return [SKIP] * (lowest - begin) + wanted + [SKIP] * (stop - highest)


def _block_bytes(group: KVCacheGroupSpec) -> int:
    layers = list(iter_layer_specs(group.kv_cache_spec))
    # A spec that all layers of the group share is listed only once.
    return sum(layer.page_size_bytes for layer in layers) * (len(group.layer_names) if len(layers) == 1 else 1)


def _check_parallel(vllm_config: VllmConfig) -> None:
    parallel = vllm_config.parallel_config
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            raise LayoutError(f"kvring does not support {name} > 1 yet: a block's tokens are spread over ranks")
    if getattr(parallel, "nnodes", 1) > 1:
        raise LayoutError("kvring keeps the KV cache of one node: expected all ranks of one vLLM on it, got nnodes > 1")
    skips = getattr(vllm_config.cache_config, "kv_cache_dtype_skip_layers", None)
    if skips and getattr(parallel, "pipeline_parallel_size", 1) > 1:
        # The scheduler's side knows the format of the first stage's first layer only; each other stage knows its own.
        raise LayoutError(
            "kvring does not support --kv-cache-dtype-skip-layers with pipeline parallelism yet: each stage would take its first "
            "layer's format for that of all, and none would find what another one has stored"
        )
    if parallel.distributed_executor_backend == "external_launcher" and parallel.data_parallel_size > 1:
        raise LayoutError("kvring does not support the external launcher with data parallelism: ranks are not numbered by it")


def _check_speculation(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> None:
    speculative = vllm_config.speculative_config
    method = None if speculative is None else str(speculative.method)
    if method not in _WITHOUT_DRAFT_KV or any(group.is_eagle_group for group in kv_cache_config.kv_cache_groups):
        raise LayoutError(
            f"kvring does not support draft models with a KV cache of their own (EAGLE, MTP, …) yet, got {method}: they rewrite "
            "the KV of tokens that have been accepted; n-gram and suffix speculation are fine"
        )


def _check_group(index: int, group: KVCacheGroupSpec) -> None:
    spec = group.kv_cache_spec
    layers = iter_layer_specs(spec)
    # A layer is judged by its manager, not by its kind: an attention that drops or rewrites blocks has a manager of its own.
    unsupported = [one for one in layers if KVCacheSpecRegistry.get_manager_class(one, group.role) not in _MANAGERS]
    if unsupported or not getattr(spec, "prefix_cacheable", True):
        what = sorted({f"{get_kv_cache_spec_kind(one).value} ({type(one).__name__})" for one in unsupported or layers})
        raise LayoutError(
            f"KV group {index}: expected full, MLA or sliding-window attention, got {', '.join(what)}, whose state is not a "
            "function of whole blocks of the prefix"
        )
    if any(getattr(one, "non_causal", False) for one in layers):
        raise LayoutError(
            f"KV group {index}: expected causal attention, got layers that look ahead (non_causal, as in a prefix LM): their KV "
            "depends on tokens behind the block, so vLLM has switched its prefix cache off, and kvring cannot be used either"
        )
