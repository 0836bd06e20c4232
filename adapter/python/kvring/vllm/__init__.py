"""vLLM's connector. In `vllm serve`:

    --kv-transfer-config '{"kv_connector": "KvringConnector", "kv_role": "kv_both", "kv_load_failure_policy": "recompute"}'

Options go into `kv_connector_extra_config`; `python -m kvring.vllm.config` lists them.
"""

from kvring.plugin import register

from .connector import KvringConnector

__all__ = ["KvringConnector"]

register()
