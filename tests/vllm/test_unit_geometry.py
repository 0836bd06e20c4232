"""Blocks, chunks and ranks: by hand-made block tables, and by comparing with a list of every token's block."""

import random
from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    MambaSpec,
    MLAAttentionSpec,
    RSWASpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)

from kvring import SKIP, LayoutError
from kvring.vllm.geometry import Geometry, Group


def full(tokens: int = 16, **more: object) -> FullAttentionSpec:
    return FullAttentionSpec(block_size=tokens, num_kv_heads=2, head_size=64, dtype=torch.float32, **more)


def window(of: int, tokens: int = 16) -> SlidingWindowSpec:
    return SlidingWindowSpec(block_size=tokens, num_kv_heads=2, head_size=64, dtype=torch.float32, sliding_window=of)


def blocks(table: Sequence[Sequence[int]]) -> list[list[KVCacheBlock]]:
    return [[KVCacheBlock(block_id=index) for index in ids] for ids in table]


def geometry(
    specs: list,
    *,
    chunk_blocks: int = 1,
    world_size: int = 1,
    replicas: int = 1,
    skip_layers: list | None = None,
    **parallel: object,
) -> Geometry:
    groups = [KVCacheGroupSpec([f"layer.{index}"], spec) for index, spec in enumerate(specs)]
    cache = KVCacheConfig(num_blocks=8, kv_cache_tensors=[], kv_cache_groups=groups, kv_tp_replicas=replicas)
    settings = {"world_size": world_size, "distributed_executor_backend": None, "data_parallel_size": 1} | parallel
    cache_config = SimpleNamespace(kv_cache_dtype_skip_layers=skip_layers or [])
    config = SimpleNamespace(parallel_config=SimpleNamespace(**settings), speculative_config=None, cache_config=cache_config)
    return Geometry.of(config, cache, chunk_blocks)  # type: ignore[arg-type]


def test_a_chunk_covers_the_same_tokens_in_every_group() -> None:
    it = geometry([full(16), window(128, 32)], chunk_blocks=2)
    assert it.chunk_tokens == 64
    assert it.groups == (Group("full_attention", 16, 4, None), Group("sliding_window", 32, 2, 128))
    assert it.hash_tokens == 16 and it.hashes_per_chunk == 4 and it.has_windows
    table = (list(range(100, 108)), [0, 0, 7, 8])
    assert it.to_store(blocks(table), 1) == [104, 105, 106, 107, 7, 8]
    assert it.to_store(blocks(table), 0) is None, "a block of it has left the window"
    assert it.to_store(blocks(table), 2) is None, "it is not allocated yet"
    assert it.chunk_bytes == 2 * 2 * 64 * 2 * 4 * 64, "two layers; K and V, two heads of 64 floats, for each of 64 tokens"


def test_loads_never_write_what_is_held_or_not_there() -> None:
    it = geometry([full(16), window(64, 16)], chunk_blocks=2)
    table = ([1, 2, 3, 4], [0, 0, 5, 6])
    assert it.to_load(table, 0, 2, 16, 64) == [SKIP, 2, SKIP, SKIP, 3, 4, 5, 6]
    assert it.to_load(table, 1, 2, 32, 63) == [3, 4, 5, 6], "the last token is computed again, its block is loaded"
    assert it.to_load(table, 1, 2, 32, 48) == [3, SKIP, 5, SKIP]


def test_against_every_token_one_by_one() -> None:
    rng = random.Random(1)
    for _ in range(300):
        sizes = rng.sample([8, 16, 32], rng.randint(1, 3))
        it = geometry([full(size) for size in sizes], chunk_blocks=rng.randint(1, 3))
        chunks = rng.randint(1, 4)
        ids = iter(rng.sample(range(1, 1000), 500))
        table = [[next(ids) if rng.random() < 0.9 else 0 for _ in range(it.chunk_tokens * chunks // size)] for size in sizes]
        start = rng.randrange(chunks) * it.chunk_tokens
        end = rng.randint(start + 1, chunks * it.chunk_tokens)
        got = {b for b in it.to_load(table, 0, chunks, start, end) if b != SKIP}
        expected = {ids[token // size] for ids, size in zip(table, sizes, strict=True) for token in range(start, end)} - {0}
        assert got == expected
        for chunk in range(chunks):
            span = range(chunk * it.chunk_tokens, (chunk + 1) * it.chunk_tokens)
            each = [list(dict.fromkeys(ids[token // size] for token in span)) for ids, size in zip(table, sizes, strict=True)]
            whole = all(0 not in ids[span[0] // size : span[-1] // size + 1] for ids, size in zip(table, sizes, strict=True))
            assert it.to_store(blocks(table), chunk) == (sum(each, []) if whole else None)


def test_ranks_with_the_same_bytes_store_once() -> None:
    mla = MLAAttentionSpec(block_size=16, num_kv_heads=1, head_size=576, dtype=torch.float32)
    it = geometry([mla], world_size=8, replicas=4)
    assert it.world == 2
    assert [it.shard_of(rank) for rank in range(8)] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert [rank for rank in range(8) if it.stores(rank)] == [0, 4]


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: geometry([window(32, 16)], chunk_blocks=4), "keeps a window of 32 tokens"),
        (lambda: geometry([full()], decode_context_parallel_size=2), "decode_context_parallel_size"),
        (lambda: geometry([full()], nnodes=2), "one node"),
        (lambda: geometry([full()], pipeline_parallel_size=2, skip_layers=["0"]), "kv-cache-dtype-skip-layers"),
        (lambda: geometry([full()], world_size=3, replicas=2), "kv_tp_replicas"),
        (lambda: geometry([]), "without"),
        (
            lambda: geometry([MambaSpec(block_size=16, shapes=((4, 4),), dtypes=(torch.float32,))]),
            "KV group 0: expected full, MLA or sliding-window attention, got mamba",
        ),
        (
            lambda: geometry([RSWASpec(block_size=16, num_kv_heads=2, head_size=64, dtype=torch.float32, rswa_window=64)]),
            "got full_attention (RSWASpec)",
        ),
        (lambda: geometry([full(), full(non_causal=True)]), "KV group 1: expected causal attention"),
        (
            lambda: geometry([UniformTypeKVCacheSpecs(16, {"a": full(), "b": full(non_causal=True)})]),
            "KV group 0: expected causal attention",
        ),
    ],
)
def test_what_is_not_supported_is_refused_with_the_reason(make, why: str) -> None:
    with pytest.raises(LayoutError) as error:
        make()
    assert why in str(error.value)
