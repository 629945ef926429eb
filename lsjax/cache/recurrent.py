"""The state of a recurrent layer: constant in size, beside the KV caches of the other layers."""

import math
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from lsjax.config import Recurrence
from lsjax.distributed.sequence_layout import Zigzag
from lsjax.distributed.sharding import STATE_AXES, put_on_mesh


@flax.struct.dataclass
class RecurrentState:
    """What a recurrence keeps of all tokens so far.

    It cannot be rolled back: every token is run once, in order. So a decode step of several tokens,
    of which some may be refused, leaves it as it was, with the tokens beside it.

    Attributes:
      arrays: its arrays by name, as Recurrence.state has them, with an axis of rows before all.
      recurrence: the recurrence.
      zigzag: layout of positions along the mesh's context axis, in which prefill chunks come.
      draft: tokens of a decode step of several, [batch, length, heads, ...]; else None.
    """

    arrays: dict[str, jax.Array]
    recurrence: Recurrence = flax.struct.field(pytree_node=False)
    zigzag: Zigzag = flax.struct.field(pytree_node=False)
    draft: Any = None

    @property
    def block(self) -> None:
        return None

    def partition_specs(self) -> "RecurrentState":
        arrays = {name: _spec(x.heads) for name, x in self.recurrence.state.items()}
        draft = jax.tree.map(lambda _: _spec(1), self.draft)
        return self.replace(arrays=arrays, draft=draft)


def _spec(heads: int) -> PartitionSpec:
    """Returns the partition spec of an array with `heads` axes between those of rows and heads."""
    return PartitionSpec("data", *(None,) * heads, STATE_AXES)


def empty_state(recurrence: Recurrence, batch: int, dtype: str, zigzag: Zigzag) -> RecurrentState:
    """Creates the state before the first token; `dtype` is that of the activations."""
    arrays = {
        name: jnp.zeros((batch, *x.shape), x.dtype or dtype) for name, x in recurrence.state.items()
    }
    return RecurrentState(arrays, recurrence, zigzag)


States = tuple[RecurrentState, ...]


def states_of(cache: Sequence[Any]) -> States:
    """Returns the states of the recurrent layers among the layers of a cache."""
    return tuple(layer for layer in cache if isinstance(layer, RecurrentState))


def with_states(cache: Sequence[Any], states: States) -> tuple[Any, ...]:
    """Puts `states` in place of those that `states_of` returned."""
    left = iter(states)
    return tuple(next(left) if isinstance(x, RecurrentState) else x for x in cache)


def snapshot(states: States) -> np.ndarray:
    """Returns the bytes of the first row of states, whose heads are in the checkpoint's order."""
    rows = [np.asarray(x)[0] for x in jax.tree.leaves(states)]
    return np.concatenate([np.ascontiguousarray(x).view(np.uint8).ravel() for x in rows])


def snapshot_bytes(states: States) -> int:
    """Returns the size of a snapshot of states, of which shapes and dtypes are given."""
    return sum(math.prod(x.shape[1:]) * x.dtype.itemsize for x in jax.tree.leaves(states))


def from_snapshot(states: States, content: np.ndarray) -> States:
    """Returns states with a snapshot in every row; shapes and shardings of `states` are given."""
    arrays, begin = [], 0
    for x in jax.tree.leaves(states):
        end = begin + math.prod(x.shape[1:]) * x.dtype.itemsize
        row = content[begin:end].view(x.dtype).reshape(x.shape[1:])
        arrays.append(put_on_mesh(np.broadcast_to(row, x.shape), x.sharding))
        begin = end
    return jax.tree.unflatten(jax.tree.structure(states), arrays)
