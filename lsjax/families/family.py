"""What a family is: how its config.json reads, and how its checkpoint names its tensors."""

import dataclasses
from collections.abc import Callable

from lsjax.config import ModelConfig
from lsjax.families.fields import Fields


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a checkpoint: its name, and the parameters it holds.

    Parameters are laid out as checkpoints are, [out, in]; a fused tensor holds several, one
    below the other along its first axis.
    """

    name: str
    params: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Family:
    """Architectures that share their config fields and tensor names.

    Attributes:
      architectures: the names in config.json's `architectures`.
      parse: config.json -> ModelConfig.
      tensors: the tensors that a checkpoint of this model holds.
      ignored: names of tensors that carry nothing (buffers computed again from the config).
    """

    architectures: tuple[str, ...]
    parse: Callable[[Fields, str], ModelConfig]
    tensors: Callable[[ModelConfig], tuple[Tensor, ...]]
    ignored: tuple[str, ...] = ()


def with_bias(name: str, params: tuple[str, ...], bias: bool) -> list[Tensor]:
    """A projection's weight and, where it has one, its bias."""
    kinds = ("weight", "bias") if bias else ("weight",)
    return [Tensor(f"{name}.{k}", tuple(f"{p}/{k}" for p in params)) for k in kinds]
