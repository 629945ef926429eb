"""The modules that run what a LayerKind describes, found by the description's type."""

import jax

from lsjax.cache import KVCache, LayerCache, RecurrentState
from lsjax.config import Recurrence
from lsjax.families.qwen3_5 import DeltaNet
from lsjax.nn.delta_net import GatedDeltaNet

_RECURRENCES = {DeltaNet: GatedDeltaNet}


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
