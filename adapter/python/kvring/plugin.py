"""vLLM's plugin: it makes the name of `"kv_connector": "KvringConnector"` known in every process of vLLM's, also in the one that
only logs and serves metrics, where `MultiConnector` asks for the classes of its connectors by name.

vLLM loads the plugin (as the entry point `kvring` of `vllm.general_plugins`) whether or not kvring is configured, so this module
does not import the connector itself. Where `VLLM_PLUGINS` keeps the plugin out, `kv_connector_module_path` names the connector.
"""

from __future__ import annotations

import contextlib

from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory


def register() -> None:
    """Makes the connector's name known. May be called more than once."""
    with contextlib.suppress(ValueError):
        KVConnectorFactory.register_connector("KvringConnector", "kvring.vllm", "KvringConnector")
