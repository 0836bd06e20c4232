"""A connector of a few lines that is right: what the tests are tried on, to know that a failure is not theirs.

It works only where scheduler and worker share a process. Blocks are copied at the end of the step that fills them into a
dictionary by hash; a load copies them back, in `start_load_kv`. Nothing in it is fast, fenced or bounded.
"""

from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorMetadata

held: dict[bytes, list[torch.Tensor]] = {}
"""By hash: the pages of a block, one for each layer."""


def spoil() -> int:
    """Inverts the sign of everything that is held; the number of blocks."""
    for key, pages in held.items():
        held[key] = [-page for page in pages]
    return len(held)


class Meta(KVConnectorMetadata):
    def __init__(self) -> None:
        self.loads: list[tuple[str, list[tuple[bytes, int]]]] = []
        self.stores: list[tuple[bytes, int]] = []


class StandIn(KVConnectorBase_V1):
    """`load`: async or sync; `fail`: every load is reported as failed, and nothing is copied."""

    def __init__(self, vllm_config, role, kv_cache_config) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self.block = vllm_config.cache_config.block_size
        self.waits = self._kv_transfer_config.get_from_extra_config("load", "async") == "async"
        self.fails = bool(self._kv_transfer_config.get_from_extra_config("fail", False))
        self.requests: dict[str, Any] = {}
        self.local: dict[str, int] = {}
        self.loads: list[tuple[str, list[tuple[bytes, int]]]] = []
        self.saved: dict[str, int] = {}
        self.received: set[str] = set()
        self.invalid: set[int] = set()
        self.layers: list[torch.Tensor] = []

    @property
    def requires_kv_delivery(self) -> bool:
        return False

    # The scheduler's side.

    def get_num_new_matched_tokens(self, request, num_computed_tokens):
        self.requests[request.request_id] = request
        self.local[request.request_id] = num_computed_tokens
        found = 0
        while found < len(request.block_hashes) and bytes(request.block_hashes[found]) in held:
            found += 1
        tokens = min(found * self.block, request.num_tokens - (0 if self.waits else 1)) - num_computed_tokens
        return max(0, tokens), self.waits and tokens > 0

    def update_state_after_alloc(self, request, blocks, num_external_tokens):
        self.saved[request.request_id] = 0
        if num_external_tokens:
            ids = blocks.get_block_ids()[0]
            local = self.local[request.request_id]
            hashes = [bytes(value) for value in request.block_hashes]
            first = next((i for i in range(len(ids)) if i * self.block >= local), 0)
            last = -(-(local + num_external_tokens) // self.block)
            self.loads.append((request.request_id, list(zip(hashes[first:last], ids[first:last], strict=True))))

    def build_connector_meta(self, scheduler_output):
        meta = Meta()
        meta.loads, self.loads = self.loads, []
        for name, count in scheduler_output.num_scheduled_tokens.items():
            request = self.requests[name]
            ids = scheduler_output.kv_connector_block_state.get_block_ids(name)[0]
            full = min((request.num_computed_tokens + count) // self.block, len(request.block_hashes))
            for i in range(self.saved.get(name, 0), full):
                meta.stores.append((bytes(request.block_hashes[i]), ids[i]))
            self.saved[name] = max(full, self.saved.get(name, 0))
        return meta

    def request_finished(self, request, block_ids):
        self.requests.pop(request.request_id, None)
        self.saved.pop(request.request_id, None)
        self.local.pop(request.request_id, None)
        return False, None

    def reset_cache(self):
        held.clear()
        return True

    # The worker's side.

    def register_kv_caches(self, kv_caches):
        self.layers = list(kv_caches.values())

    def start_load_kv(self, forward_context, **kwargs):
        for name, blocks in self._get_connector_metadata().loads:
            if self.fails:
                self.invalid.update(block for _, block in blocks)
            else:
                for key, block in blocks:
                    for layer, page in zip(self.layers, held[key], strict=True):
                        layer[block].copy_(page)
            if self.waits:
                self.received.add(name)

    def wait_for_layer_load(self, layer_name):
        pass

    def save_kv_layer(self, layer_name, kv_layer, attn_metadata, **kwargs):
        pass

    def wait_for_save(self):
        bad = self.invalid
        for key, block in self._get_connector_metadata().stores:
            if key not in held and not bad:
                held[key] = [layer[block].clone() for layer in self.layers]

    def get_finished(self, finished_req_ids):
        received, self.received = self.received, set()
        return None, received or None

    def get_block_ids_with_load_errors(self):
        invalid, self.invalid = self.invalid, set()
        return invalid
