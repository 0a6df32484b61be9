"""What a user sets: the connector's settings at start, and the overrides of one request."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, get_args

from cacheblend_rag.config import BlendConfig
from cacheblend_rag.errors import ConfigError
from cacheblend_rag.primer import DEFAULT_PRIMER
from cacheblend_rag.store.codecs import check_codec
from cacheblend_rag.validation import is_whole

OnUnsupported = Literal["refuse", "prefill"]
Action = Literal["generate", "warm", "evict", "describe", "report", "lookup", "list_keys", "evict_keys", "prefetch"]

PARAMS_KEY = "cacheblend"
"""Key of a request's ``kv_transfer_params`` under which overrides go in and stats come out."""

MOST_KEYS = 256
"""Most chunks that one request may name by their keys: looking them up takes the scheduler some milliseconds."""


@dataclasses.dataclass(frozen=True)
class ConnectorSettings:
    """``kv_connector_extra_config`` of the connector.

    Attributes:
        store: Directory of the chunk store; None: a temporary one, gone when the engine ends.
        memory_bytes: Most bytes of chunks kept in memory (in each worker).
        gpu_bytes: Most bytes of chunks kept in the GPU's memory too (in each worker), besides what vLLM plans for.
        max_bytes: Most bytes kept in the directory; None: no limit.
        namespace: Tenant.
        primer: Text that chunks are prefilled behind.
        codec: How chunk KV is kept, see ``store/codecs.py``.
        blend: Defaults of every request.
        on_unsupported: What to do with a model that can't be blended: ``"refuse"`` to start, or serve it by plain
            ``"prefill"``.
    """

    store: str | None = None
    memory_bytes: int = 1 << 30
    gpu_bytes: int = 0
    max_bytes: int | None = None
    namespace: str = "default"
    primer: str = DEFAULT_PRIMER
    codec: str = "raw"
    blend: BlendConfig = dataclasses.field(default_factory=BlendConfig)
    on_unsupported: OnUnsupported = "refuse"

    @classmethod
    def parse(cls, extra_config: Mapping[str, Any]) -> ConnectorSettings:
        """Validate ``kv_connector_extra_config``.

        Raises:
            ConfigError: an unknown or a bad setting.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        for name in extra_config:
            if name not in names:
                raise ConfigError(
                    f"unknown setting {name!r} in kv_connector_extra_config: known are {', '.join(names)}"
                )
        given = {name: value for name, value in extra_config.items() if value is not None}
        for name in ("store", "namespace", "primer"):
            if not isinstance(given.get(name, ""), str):
                raise ConfigError(f"{name} must be text, not {given[name]!r}")
        for name in ("memory_bytes", "gpu_bytes", "max_bytes"):
            if not is_whole(given.get(name, 0)) or given.get(name, 0) < 0:
                raise ConfigError(f"{name} must be a whole number of bytes from 0, not {given[name]!r}")
        check_codec(given.get("codec", "raw"))
        blend = given.get("blend", {})
        if not isinstance(blend, Mapping):
            raise ConfigError(f"blend must be an object of blend settings, not {blend!r}")
        given["blend"] = BlendConfig().with_overrides(blend)
        if given.get("on_unsupported", "refuse") not in get_args(OnUnsupported):
            raise ConfigError(
                f"on_unsupported must be one of {', '.join(get_args(OnUnsupported))}, not {given['on_unsupported']!r}"
            )
        return cls(**given)

    def to_extra_config(self) -> dict[str, Any]:
        """As plain values, for JSON; the inverse of :meth:`parse`."""
        return {**dataclasses.asdict(self), "blend": self.blend.to_dict()}


@dataclasses.dataclass(frozen=True)
class RequestParams:
    """What one request asks for, in ``kv_transfer_params={"cacheblend": {...}}``.

    Attributes:
        action: ``"generate"`` unless one of these is given: ``warm: true`` (the prompt is a chunk: prefill it behind
            the primer and store its KV), ``evict: true`` (the prompt is a chunk: forget it), ``describe: true`` (tell
            model, primer and settings), ``report: ID`` (tell the stats of an earlier request). Chunks by their keys:
            ``lookup: [KEY, ...]`` (which are stored), ``list_keys: CURSOR`` (all of the scope, see
            :meth:`ChunkStore.keys_since`), ``evict_keys: [KEY, ...]`` (forget them), ``prefetch: [KEY, ...]`` (bring
            them from disk to memory).
        blend: The request's settings.
        request_id: ``id``, a name by which ``report`` finds this request's stats; for ``report`` the one to tell.
        keys: Of ``lookup``, ``evict_keys`` and ``prefetch``; at most :data:`MOST_KEYS`.
        cursor: Of ``list_keys``.
        trace: ``trace: true``: tell what the blend measured and chose, besides the stats.
        uncounted: ``uncounted: true``: leave the request out of the metrics, but for faults. A guard asks so.
    """

    action: Action = "generate"
    blend: BlendConfig = dataclasses.field(default_factory=BlendConfig)
    request_id: str | None = None
    keys: tuple[str, ...] = ()
    cursor: int = 0
    trace: bool = False
    uncounted: bool = False

    @classmethod
    def parse(cls, params: object, defaults: BlendConfig, num_layers: int) -> RequestParams:
        """Validate a request's ``kv_transfer_params``; what others put there besides ours is left alone.

        Args:
            params: ``kv_transfer_params`` as it came in, or None.
            defaults: Settings that the request overrides. Its ``question_layers`` stand where a request leaves them to
                the model, with null.
            num_layers: Layers of the model, which has to have those that are named.

        Raises:
            ConfigError: an unknown or a bad setting.
        """
        ours = params.get(PARAMS_KEY) if isinstance(params, Mapping) else None
        if ours is None:
            ours = {}
        if not isinstance(ours, Mapping):
            raise ConfigError(f"kv_transfer_params.{PARAMS_KEY} must be an object of settings, not {ours!r}")
        settings = dict(ours)
        request_id = settings.pop("id", None)
        trace, uncounted = (settings.pop(name, False) for name in ("trace", "uncounted"))
        for name, value in (("trace", trace), ("uncounted", uncounted)):
            if not isinstance(value, bool):
                raise ConfigError(f"{name} must be true or false, not {value!r}")
        asked: list[Action] = []
        for action in ("warm", "evict", "describe"):
            value = settings.pop(action, False)
            if not isinstance(value, bool):
                raise ConfigError(f"{action} must be true or false, not {value!r}")
            if value:
                asked.append(action)
        if "report" in settings:
            asked.append("report")
            request_id = settings.pop("report")
        keys: tuple[str, ...] = ()
        for by_key in ("lookup", "evict_keys", "prefetch"):
            if by_key in settings:
                asked.append(by_key)
                keys = _parse_keys(by_key, settings.pop(by_key))
        cursor = settings.pop("list_keys", None)
        if cursor is not None:
            asked.append("list_keys")
            if not is_whole(cursor) or cursor < 0:
                raise ConfigError(f"list_keys must be a cursor, a whole number from 0, not {cursor!r}")
        if len(asked) > 1:
            raise ConfigError(f"ask for one thing at a time, not for {' and '.join(asked)}")
        if request_id is not None and (not isinstance(request_id, str) or not request_id):
            raise ConfigError(f"a request's id must be text, not {request_id!r}")
        try:
            blend = defaults.with_overrides(settings)
        except TypeError as error:  # a list where a number is wanted, and the like
            raise ConfigError(f"bad blend settings {settings!r}: {error}") from error
        blend = blend.or_question_layers(defaults.question_layers)
        blend.check_layer_numbers(num_layers)
        return cls(asked[0] if asked else "generate", blend, request_id, keys, cursor or 0, trace, uncounted)


def _parse_keys(action: str, value: object) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(key, str) for key in value):
        raise ConfigError(f"{action} must be a list of chunk keys, not {value!r}")
    if len(value) > MOST_KEYS:
        raise ConfigError(f"{action} takes at most {MOST_KEYS} chunk keys, not {len(value)}: ask several times")
    return tuple(value)
