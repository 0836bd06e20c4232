"""Beside another connector, in vLLM's `MultiConnector`: the questions that vLLM asks the class, before there is a connector."""

import sys
from typing import Any

import pytest
from harness.config import Setup, vllm_config
from vllm.config import VllmConfig
from vllm.config.kv_transfer import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.utils import get_kv_connector_cache_layout
from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import MultiConnector
from vllm.platforms import current_platform
from vllm.plugins import load_plugins_by_group

from kvring.vllm.connector import _MULTI_CONNECTOR, KvringConnector

KVRING = {"kv_connector": "KvringConnector", "kv_role": "kv_both"}


@pytest.fixture(scope="module")
def plain() -> VllmConfig:
    """A real configuration, of a model that has nothing special."""
    return vllm_config(Setup(connector="KvringConnector", connector_module="kvring.vllm"))


def test_the_name_is_known_wherever_vllm_loads_its_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that only logs has never made a connector, and is sent its statistics by name."""
    monkeypatch.delitem(KVConnectorFactory._registry, "KvringConnector", raising=False)
    for _ in range(2):
        # vLLM may load plugins twice in a process.
        load_plugins_by_group("vllm.general_plugins")["kvring"]()
    assert KVConnectorFactory.get_connector_class_by_name("KvringConnector") is KvringConnector
    stats = MultiConnector.build_kv_connector_stats({"KvringConnector": {"lookups": 1}})
    assert stats is not None and stats.data["KvringConnector"].data == {"lookups": 1}


def layout(config: VllmConfig, monkeypatch: pytest.MonkeyPatch, transfer: dict[str, Any]) -> str | None:
    """The layout that the connector asks for."""
    monkeypatch.setattr(config, "kv_transfer_config", KVTransferConfig(**transfer))
    monkeypatch.setattr(current_platform, "is_cuda", lambda: True)
    # This process may have used it before, in another test.
    monkeypatch.delitem(sys.modules, _MULTI_CONNECTOR, raising=False)
    return get_kv_connector_cache_layout(config)


def test_the_layout_is_asked_for_where_no_block_may_have_to_be_split(plain: VllmConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain.cache_config, "block_size", 16)
    assert layout(plain, monkeypatch, KVRING) == "BLHNC"
    assert layout(plain, monkeypatch, KVRING | {"kv_connector_extra_config": {"kvring.layout": "none"}}) is None
    monkeypatch.setattr(plain.cache_config, "block_size", 128)
    monkeypatch.setattr(plain.cache_config, "user_specified_block_size", True)
    assert layout(plain, monkeypatch, KVRING) is None, "blocks of this size may have to be split"
    insists = KVRING | {"kv_connector_extra_config": {"kvring.layout": "block-outermost"}}
    assert layout(plain, monkeypatch, insists) == "BLHNC"
    monkeypatch.setattr(plain.cache_config, "block_size", 16)
    monkeypatch.setattr(type(plain.model_config), "is_hybrid", property(lambda self: True))
    assert layout(plain, monkeypatch, KVRING) is None, "a hybrid's blocks may have to be split"


@pytest.mark.parametrize("order", [1, -1], ids=["first", "last"])
def test_beside_a_connector_with_a_wish_nothing_is_asked_for(
    plain: VllmConfig, monkeypatch: pytest.MonkeyPatch, order: int
) -> None:
    monkeypatch.setattr(plain.cache_config, "block_size", 16)
    other = {"kv_connector": "OffloadingConnector", "kv_role": "kv_both"}
    both = {"connectors": [KVRING, other][::order]}
    multi = {"kv_connector": "MultiConnector", "kv_role": "kv_both", "kv_connector_extra_config": both}
    assert layout(plain, monkeypatch, multi) == "LBHNC"
