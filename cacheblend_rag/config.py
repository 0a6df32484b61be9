"""The settings of a blend, validated."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Final, Literal, get_args

from cacheblend_rag.errors import ConfigError
from cacheblend_rag.validation import is_layer_range, is_number, is_whole

Mode = Literal["auto", "blend", "off"]

AUTO: Final = "auto"
DEFAULT_RATIO = 0.15


@dataclasses.dataclass(frozen=True)
class BlendConfig:
    """How a prompt with known chunks is blended.

    Attributes:
        recompute_ratio: Share of the matched tokens whose KV is recomputed, in [0, 1]. 0 is full reuse, 1 is exactly
            plain prefill. ``"auto"``: as many as the policy finds to matter, see ``cacheblend_rag.budget``.
        ratio_range: With ``"auto"``, the least and the greatest share, ``0 <= least <= greatest <= 1``.
        check_layers: Layers (0-based, ascending) at which fresh KV is compared with cached. At several, ``hkvd`` and
            ``hkvd_kv`` filter gradually (CacheBlend, section 4.3); ``hybrid`` takes the last.
        question_layers: First layer and end (exclusive) of the layers where the question's attention counts, for
            ``query_aware`` and ``hybrid``. None: what the model's profile says (see ``cacheblend_rag.model_profile``),
            or the last half without one.
        policy: Name of the selection policy, see ``cacheblend_rag.policies``.
        forced_tokens: The first so many tokens of each run of a chunk are recomputed, whatever the policy chooses, as
            far as ``recompute_ratio`` pays for them.
        min_reused_tokens: With ``mode="auto"``, prompts that would reuse fewer tokens than this, besides as many as the
            policy computes to choose, are prefilled plainly.
        mode: ``"auto"`` blends where it pays, ``"blend"`` wherever a chunk is known, ``"off"`` never.

    Raises:
        ConfigError: a value is out of its range.
    """

    recompute_ratio: float | Literal["auto"] = DEFAULT_RATIO
    ratio_range: tuple[float, float] = (0.05, 0.5)
    check_layers: tuple[int, ...] = (1,)
    question_layers: tuple[int, int] | None = None
    policy: str = "query_aware"
    forced_tokens: int = 0
    min_reused_tokens: int = 512
    mode: Mode = "auto"

    def __post_init__(self) -> None:
        ratio = self.recompute_ratio
        if ratio != AUTO and not (is_number(ratio) and 0 <= ratio <= 1):
            raise ConfigError(f'recompute_ratio must be a number in [0, 1] or "auto", not {ratio!r}')
        bounds = self.ratio_range
        if not isinstance(bounds, list | tuple) or len(bounds) != 2 or not all(map(is_number, bounds)):
            raise ConfigError(f"ratio_range must be two numbers in [0, 1], not {bounds!r}")
        if not 0 <= bounds[0] <= bounds[1] <= 1:
            raise ConfigError(f"ratio_range must be in [0, 1], the lower number first, not {bounds!r}")
        object.__setattr__(self, "ratio_range", tuple(bounds))
        layers = tuple(self.check_layers)
        if not layers or any(not is_whole(n) or n < 0 for n in layers):
            raise ConfigError(f"check_layers must be layer numbers from 0, at least one, not {self.check_layers!r}")
        if sorted(set(layers)) != list(layers):
            raise ConfigError(f"check_layers must be ascending without repeats, not {self.check_layers!r}")
        object.__setattr__(self, "check_layers", layers)
        if self.question_layers is not None:
            if not is_layer_range(self.question_layers):
                raise ConfigError(
                    "question_layers must be None, or the first layer and the end of a range, two whole numbers such "
                    f"as (8, 16), not {self.question_layers!r}"
                )
            object.__setattr__(self, "question_layers", tuple(self.question_layers))
        for name in ("forced_tokens", "min_reused_tokens"):
            value = getattr(self, name)
            if not is_whole(value) or value < 0:
                raise ConfigError(f"{name} must be a whole number of tokens from 0, not {value!r}")
        if self.mode not in get_args(Mode):
            raise ConfigError(f"mode must be one of {', '.join(get_args(Mode))}, not {self.mode!r}")

        from cacheblend_rag.policies import get_policy  # here: policies need BlendConfig

        get_policy(self.policy)

    def check_layer_numbers(self, num_layers: int) -> None:
        """Check what can be checked once a model is known.

        Args:
            num_layers: Decoder layers of the model.

        Raises:
            ConfigError: a layer that the model doesn't have.
        """
        if self.check_layers[-1] >= num_layers:
            raise ConfigError(f"check_layers {self.check_layers} must be below {num_layers}, the layers of this model")
        if self.question_layers is not None and self.question_layers[1] > num_layers:
            raise ConfigError(
                f"question_layers {self.question_layers} must end at {num_layers}, the layers of this model, or before"
            )

    def or_question_layers(self, layers: tuple[int, int] | None) -> BlendConfig:
        """This config, with a model's own ``question_layers`` where none are set."""
        if self.question_layers is not None or layers is None:
            return self
        return dataclasses.replace(self, question_layers=layers)

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON; :meth:`with_overrides` takes them."""
        fields = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}

    def with_overrides(self, overrides: Mapping[str, Any] | None) -> BlendConfig:
        """This config with some fields replaced.

        Raises:
            ConfigError: an unknown field or a bad value.
        """
        if not overrides:
            return self
        names = [field.name for field in dataclasses.fields(self)]
        for name in overrides:
            if name not in names:
                raise ConfigError(f"unknown blend setting {name!r}: known are {', '.join(names)}")
        return dataclasses.replace(self, **overrides)
