"""Tells vLLM the connector's name, from the ``vllm.general_plugins`` entry point: installing the package is enough."""

from __future__ import annotations

CONNECTOR = "CacheBlendConnector"


def register() -> None:
    """Register the connector; vLLM calls this in each of its processes."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    if CONNECTOR not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(CONNECTOR, "cacheblend_rag.vllm.connector", CONNECTOR)
