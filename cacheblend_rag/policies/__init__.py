"""Which tokens to recompute: one idea a file."""

from cacheblend_rag.errors import ConfigError
from cacheblend_rag.policies.base import SelectionPolicy
from cacheblend_rag.policies.hkvd import HKVD
from cacheblend_rag.policies.query_aware import QueryAware

_POLICIES: dict[str, SelectionPolicy] = {"hkvd": HKVD(), "query_aware": QueryAware()}


def policy_names() -> list[str]:
    """Names that ``BlendConfig.policy`` accepts."""
    return sorted(_POLICIES)


def get_policy(name: str) -> SelectionPolicy:
    """The policy of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in _POLICIES:
        raise ConfigError(f"unknown policy {name!r}: known are {', '.join(policy_names())}")
    return _POLICIES[name]


__all__ = ["SelectionPolicy", "get_policy", "policy_names"]
