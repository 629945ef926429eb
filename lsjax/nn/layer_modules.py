"""The modules that run what a LayerKind describes, found by the description's type."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh

from lsjax.cache import KVCache, LayerCache, RecurrentState
from lsjax.config import MLP, DenseMLP, Recurrence
from lsjax.families.qwen3_5 import DeltaNet
from lsjax.families.qwen_moe import Experts
from lsjax.nn.delta_net import GatedDeltaNet
from lsjax.nn.experts import MixtureOfExperts, balance_loss
from lsjax.nn.gated_mlp import GatedMLP

_RECURRENCES = {DeltaNet: GatedDeltaNet}
_MLPS = {
    DenseMLP: lambda mlp, _: GatedMLP(mlp.width, mlp.bias),
    Experts: MixtureOfExperts,
}
_OWN_LOSSES = {Experts: balance_loss}


def recurrence_module(recurrence: Recurrence) -> type:
    """Returns the module of a recurrence.

    It is made of the recurrence, the ModelConfig and the mesh. See GatedDeltaNet for its arguments
    and results. In a decode step of several tokens it leaves the state as it was, with the tokens
    as its `draft`; its static method `keep_accepted` runs the first `counts` [batch] of them.
    """
    return _RECURRENCES[type(recurrence)]


def keep_accepted(cache: KVCache, counts: jax.Array) -> KVCache:
    """Keeps the first `counts` [batch] tokens of a decode step of several in recurrent layers."""

    def keep(layer: LayerCache | RecurrentState) -> LayerCache | RecurrentState:
        if not isinstance(layer, RecurrentState):
            return layer
        return recurrence_module(layer.recurrence).keep_accepted(layer, counts)

    return tuple(map(keep, cache))


def mlp_module(mlp: MLP, mesh: Mesh) -> nn.Module:
    """Creates the module of an MLP.

    It maps [batch, length, hidden] to the same shape, and is told whether these are the few tokens
    of a decode step. If it `takes_scaled`, its input in a decode step is Scaled.
    """
    return _MLPS[type(mlp)](mlp, mesh)


def own_loss(mlp: MLP) -> Callable[[MLP, Any, int], jax.Array] | None:
    """Returns the loss that an MLP adds in training, or None.

    It takes the MLP, the sums of its terms over all layers, and the number of tokens times that of
    layers. The module's method `loss_terms` gives a layer's terms for its input, a tree of arrays.
    """
    return _OWN_LOSSES.get(type(mlp))
