"""The shape of a temporal ViT: names and numbers, checked against each other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

ATTENTIONS = ("joint", "divided", "factorized", "space")
POOLS = ("class", "mean", "attentive")
ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", "relu", "silu", "swiglu")
TEMPORAL_INDICES = ("frame", "token")
MAY_BE_0 = frozenset({"extra_tokens"})
TEMPORAL_DEPTH = 2


@dataclass(frozen=True)
class ViTConfig:
    """The shape of a temporal ViT. Raises ValueError where the numbers do not fit each other.

    `mlp_width` None becomes four times the width. `n_frames` and `frame_size` are what the temporal and the
    spatial positions are made for; clips of other sizes are taken too. `temporal_depth` None becomes
    TEMPORAL_DEPTH where the attention is factorized; no other scheme has temporal blocks. `extra_tokens` stand
    between class token and patches; `pre_norm` is a norm before the first block. `temporal_index` numbers the rows
    of the temporal embedding: by frame, or by token as the reference implementation does. `feature_norm` shifts and
    scales what is classified.
    """

    num_classes: int
    frame_size: int = 224
    patch_size: int = 16
    n_frames: int = 8
    tubelet_size: int = 1
    width: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_width: int | None = None
    norm_eps: float = 1e-6
    activation: str = "gelu"
    qkv_bias: bool = True
    attention: str = "joint"
    num_channels: int = 3
    pool: str = "class"
    temporal_depth: int | None = None
    extra_tokens: int = 0
    pre_norm: bool = False
    temporal_index: str = "frame"
    feature_norm: bool = False

    def __post_init__(self) -> None:
        if self.mlp_width is None:
            object.__setattr__(self, "mlp_width", 4 * self.width)
        if self.temporal_depth is None and self.attention == "factorized":
            object.__setattr__(self, "temporal_depth", TEMPORAL_DEPTH)
        for field in fields(self):
            _check_value(field.name, getattr(self, field.name), str(field.type))
        for name, divisor in (
            ("frame_size", "patch_size"),
            ("n_frames", "tubelet_size"),
            ("width", "num_heads"),
        ):
            _check_multiple(name, getattr(self, name), divisor, getattr(self, divisor))
        _check_known("activation", self.activation, ACTIVATIONS)
        _check_known("attention", self.attention, ATTENTIONS)
        _check_known("pool", self.pool, POOLS)
        _check_known("temporal_index", self.temporal_index, TEMPORAL_INDICES)
        if self.temporal_index == "token" and self.attention != "joint":
            raise ValueError(
                f"temporal_index token: attention {self.attention} does not know it; use attention joint"
            )
        if self.attention == "space" and self.tubelet_size > 1:
            raise ValueError(
                f"tubelet_size {self.tubelet_size} sees the order of frames, and attention space must not; "
                "use tubelet_size 1, or another attention"
            )
        if self.temporal_depth is not None and self.attention != "factorized":
            raise ValueError(
                f"temporal_depth {self.temporal_depth}: attention {self.attention} has no temporal blocks; "
                "leave it out, or use attention factorized"
            )

    @property
    def grid(self) -> int:
        """Patches along one side of a frame."""
        return self.frame_size // self.patch_size

    @property
    def patches_per_frame(self) -> int:
        """P."""
        return self.grid**2

    @property
    def hidden_width(self) -> int:
        """Width inside the MLP of a block, `mlp_width` once resolved."""
        assert self.mlp_width is not None
        return self.mlp_width

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `card.json` holds them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ViTConfig:
        """The inverse of `to_dict`. Raises ValueError for unknown or missing keys and for bad values."""
        known = [field.name for field in fields(cls)]
        unknown = [key for key in values if key not in known]
        if unknown:
            raise ValueError(f"unknown keys {', '.join(map(repr, unknown))}; known are {', '.join(known)}")
        if "num_classes" not in values:
            raise ValueError("the key 'num_classes' is missing")
        return cls(**values)


def _check_value(name: str, value: object, annotation: str) -> None:
    if value is None and annotation.endswith("| None"):
        return
    least = 0 if name in MAY_BE_0 else 1
    if annotation.startswith("int") and (type(value) is not int or value < least):
        raise ValueError(f"{name} is {value!r}; it must be a whole number, {least} or more")
    if annotation == "float" and not (isinstance(value, int | float) and value > 0):
        raise ValueError(f"{name} is {value!r}; it must be a number above 0")
    if annotation == "bool" and not isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}; it must be true or false")
    if annotation == "str" and not isinstance(value, str):
        raise ValueError(f"{name} is {value!r}; it must be a name")


def _check_multiple(name: str, value: int, divisor_name: str, divisor: int) -> None:
    if value % divisor:
        below = value // divisor * divisor
        nearest = f"{below} or {below + divisor}" if below else f"{divisor}"
        raise ValueError(f"{name} {value} is not a multiple of {divisor_name} {divisor}; use {nearest}")


def _check_known(name: str, value: str, known: Iterable[str]) -> None:
    if value not in known:
        raise ValueError(f"{name} {value!r} is not known; use one of {', '.join(known)}")
