"""Which tokens to recompute: one idea a file.

Other packages offer policies by entry points of the group ``cacheblend_rag.policies``: each has the name of a policy
and points to it. Every process finds those, vLLM's workers too. :func:`register_policy` is for this process only.
"""

from __future__ import annotations

import functools
import importlib.metadata

from cacheblend_rag.errors import ConfigError
from cacheblend_rag.policies.base import SelectionPolicy, top_positions
from cacheblend_rag.policies.chunk_heads import ChunkHeads
from cacheblend_rag.policies.hkvd import HKVD
from cacheblend_rag.policies.hybrid import Hybrid
from cacheblend_rag.policies.none import Nothing
from cacheblend_rag.policies.query_aware import QueryAware
from cacheblend_rag.policies.random import Random

ENTRY_POINTS = "cacheblend_rag.policies"
"""The group of entry points."""

_POLICIES: dict[str, SelectionPolicy] = {
    "chunk_heads": ChunkHeads(),
    "hkvd": HKVD(),
    "hkvd_kv": HKVD(keys=True),
    "hybrid": Hybrid(),
    "none": Nothing(),
    "query_aware": QueryAware(),
    "random": Random(),
}
_BUILT_IN = frozenset(_POLICIES)


def policy_names() -> list[str]:
    """Names that ``BlendConfig.policy`` accepts."""
    return sorted({*_POLICIES, *_installed()})


def get_policy(name: str) -> SelectionPolicy:
    """The policy of that name.

    Raises:
        ConfigError: there is none, or the package that offers it can't be used.
    """
    if name not in _POLICIES:
        _POLICIES[name] = _load(name)
    return _POLICIES[name]


def register_policy(name: str, policy: SelectionPolicy) -> None:
    """Make a policy known in this process.

    Args:
        name: What ``BlendConfig.policy`` calls it.
        policy: An object with what :class:`SelectionPolicy` asks for.

    Raises:
        ConfigError: the name is taken, or this is no policy.
    """
    if name in policy_names():
        raise ConfigError(f"there is a policy {name!r} already: choose another name")
    _check_policy(name, policy)
    _POLICIES[name] = policy


def is_built_in(name: str) -> bool:
    """Whether a policy is one of this package's own."""
    return name in _BUILT_IN


def _check_policy(name: str, policy: object) -> None:
    flags = (getattr(policy, name, None) for name in ("reads_question", "adapts"))
    methods = (getattr(policy, name, None) for name in ("select", "cost"))
    is_one = all(map(callable, methods)) and all(isinstance(flag, bool) for flag in flags)
    if not is_one or isinstance(policy, type):
        raise ConfigError(
            f"policy {name!r} must be an object with select(), cost(), reads_question and adapts, not {policy!r}"
        )


@functools.cache
def _installed() -> dict[str, list[importlib.metadata.EntryPoint]]:
    """What other packages offer, by name. They cannot take the names of this package's own."""
    found: dict[str, list[importlib.metadata.EntryPoint]] = {}
    for point in importlib.metadata.entry_points(group=ENTRY_POINTS):
        if point.name not in _BUILT_IN:
            found.setdefault(point.name, []).append(point)
    return found


def _load(name: str) -> SelectionPolicy:
    """The policy that another package offers under a name."""
    points = _installed().get(name, [])
    if not points:
        raise ConfigError(f"unknown policy {name!r}: known are {', '.join(policy_names())}")
    if len(points) > 1:
        raise ConfigError(f"policy {name!r} is offered by several packages: {', '.join(p.value for p in points)}")
    try:
        policy: SelectionPolicy = points[0].load()
    except Exception as error:  # whatever the other package does when it is imported
        reason = (str(error) or repr(error)).splitlines()[0]
        raise ConfigError(f"policy {name!r} ({points[0].value}) can't be loaded: {reason}") from error
    _check_policy(name, policy)
    return policy


__all__ = [
    "SelectionPolicy",
    "get_policy",
    "is_built_in",
    "policy_names",
    "register_policy",
    "top_positions",
]
