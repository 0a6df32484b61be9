"""Tells vLLM the connector's name, from the ``vllm.general_plugins`` entry point: installing the package is enough."""

from __future__ import annotations

CONNECTOR = "CacheBlendConnector"
MODULE = "cacheblend_rag.vllm.connector"

CONNECTOR_CONFIG = {"kv_connector": CONNECTOR, "kv_connector_module_path": MODULE, "kv_role": "kv_both"}
"""``kv_transfer_config`` without our settings. With the module's path vLLM finds the connector also where the package
is on the path without being installed."""


def register() -> None:
    """Register the connector; vLLM calls this in each of its processes."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    if CONNECTOR not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(CONNECTOR, MODULE, CONNECTOR)
