"""Defines a model family: how to parse its config.json, and how its checkpoints name tensors."""

import dataclasses
from collections.abc import Callable, Mapping

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
      ignored: beginnings of names of tensors that are not needed: buffers that the config
        determines, and other models beside this one.
      stacked: end of the name of a tensor that stacks others along its first axis -> ends of their
        names, with {} for the index; what has the same index is concatenated along its first axis.
        A checkpoint may hold it instead of them.
    """

    architectures: tuple[str, ...]
    parse: Callable[[Fields, str], ModelConfig]
    tensors: Callable[[ModelConfig], tuple[Tensor, ...]]
    ignored: tuple[str, ...] = ()
    stacked: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)


def with_bias(name: str, params: tuple[str, ...], bias: bool) -> list[Tensor]:
    """Returns a projection's weight tensor and, if `bias` is true, its bias tensor."""
    kinds = ("weight", "bias") if bias else ("weight",)
    return [Tensor(f"{name}.{k}", tuple(f"{p}/{k}" for p in params)) for k in kinds]
