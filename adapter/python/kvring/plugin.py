"""vLLM's plugin: `"kv_connector": "KvringConnector"` is known by its name in every process of vLLM's, also in the one that only
logs and serves metrics, where `MultiConnector` asks for the classes of its connectors by name.

vLLM loads it (as the entry point `kvring` of `vllm.general_plugins`) whether or not kvring is configured: so the connector itself
is not imported here. Where `VLLM_PLUGINS` keeps it out, `kv_connector_module_path` brings it along.
"""

from __future__ import annotations

import contextlib

from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory


def register() -> None:
    """Once or more often."""
    with contextlib.suppress(ValueError):
        KVConnectorFactory.register_connector("KvringConnector", "kvring.vllm", "KvringConnector")
