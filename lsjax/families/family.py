"""Defines a model family: how to parse its config.json, and how its checkpoints name tensors."""

import dataclasses
from collections.abc import Callable

from lsjax.config import ModelConfig
from lsjax.families.fields import Fields


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A checkpoint tensor: its name and the paths of the parameters that it holds.

    Parameters have the layout of checkpoints, [out, in]. A fused tensor holds several parameters,
    concatenated along its first axis. Several tensors may be stacked to one parameter.

    Attributes:
      name: name of the tensor.
      params: paths of its parameters, in the order in which it holds them.
      index: index along the first axis of its parameters, which stack tensors; None if they do not.
    """

    name: str
    params: tuple[str, ...]
    index: int | None = None


@dataclasses.dataclass(frozen=True)
class Family:
    """Architectures that share their config fields and tensor names.

    Attributes:
      architectures: names in config.json's `architectures`.
      parse: (fields of config.json, architecture) -> ModelConfig.
      tensors: ModelConfig -> the tensors that a checkpoint of this model holds.
      ignored: names of tensors that are not needed (buffers that the config determines).
    """

    architectures: tuple[str, ...]
    parse: Callable[[Fields, str], ModelConfig]
    tensors: Callable[[ModelConfig], tuple[Tensor, ...]]
    ignored: tuple[str, ...] = ()


def with_bias(name: str, params: tuple[str, ...], bias: bool) -> list[Tensor]:
    """Returns a projection's weight tensor and, if `bias` is true, its bias tensor."""
    kinds = ("weight", "bias") if bias else ("weight",)
    return [Tensor(f"{name}.{k}", tuple(f"{p}/{k}" for p in params)) for k in kinds]
