"""The paged KV memory of one rank, laid out by vLLM's own code."""

import numpy as np
import torch
from vllm.config.cache import _layout_from_name
from vllm.v1.kv_cache_interface import KVCacheConfig, create_kv_cache_views

from .model import POISON


def allocate(size: int) -> torch.Tensor:
    """The memory of a cache. Tests with a GPU's memory replace this function, and `given`."""
    return torch.empty(size, dtype=torch.int8)


def given(views: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The layers' caches as the connector gets them."""
    return dict(views)


class KvMemory:
    """One allocation, a view for each layer, and the same pages as 8-byte words for the fake model."""

    def __init__(self, config: KVCacheConfig) -> None:
        self.config = config
        size = max(tensor.size for tensor in config.kv_cache_tensors)
        self.raw = allocate(size)
        self.raw.fill_(POISON - 256)
        assert config.kv_cache_layout is not None
        layout = _layout_from_name(config.kv_cache_layout)
        self.views: dict[str, torch.Tensor] = {}
        self.words: dict[str, np.ndarray] = {}
        self.group_of: dict[str, int] = {}
        for index, group in enumerate(config.kv_cache_groups):
            for name in group.layer_names:
                self.group_of[name] = index
        for tensor in config.kv_cache_tensors:
            spec = config.kv_cache_groups[self.group_of[tensor.layers[0]]].kv_cache_spec
            views = create_kv_cache_views(self.raw, spec, config.num_blocks, layout, tensor)
            for name, view in zip(tensor.layers, views):
                self.views[name] = view
                self.words[name] = view.view(torch.int64).numpy()[:, 0, :, 0].view(np.uint64)
        self.layers = sorted(self.views, key=lambda name: int(name.split(".")[2]))
        self.layers_of_group = [
            [name for name in self.layers if self.group_of[name] == group] for group in range(len(config.kv_cache_groups))
        ]

    def poison(self, block: int) -> None:
        """The old content is gone. Groups alias the same bytes, so one block id is one place."""
        for words in self.words.values():
            words[block] = np.uint64(int.from_bytes(bytes([POISON]) * 8, "little"))
