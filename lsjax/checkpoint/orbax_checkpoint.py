"""Reading and writing the parameters of a converted folder, which Orbax keeps."""

import dataclasses
import math
import os
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import orbax.checkpoint.experimental.v1 as ocp

from lsjax.checkpoint.settle import settled
from lsjax.checkpoint.stored import Stored
from lsjax.errors import UserError
from lsjax.nn.parameters import flatten, unflatten

PARAMS = "params"

# Arrays are compressed in pieces of this size, so that a device which holds a shard need not read
# the whole array.
_CHUNK_BYTES = 2**20


@dataclasses.dataclass(frozen=True)
class OrbaxCheckpoint:
    """The parameters of a converted folder that the model reads.

    Attributes:
      stored: what each parameter is, by its path in the tree.
      unread: paths of the parameters that nothing reads.
    """

    stored: dict[str, Stored]
    unread: tuple[str, ...]

    def dtypes(self) -> dict[str, jnp.dtype]:
        """Parameter path -> the dtype that it is stored in."""
        return {path: stored.numpy_dtype for path, stored in self.stored.items()}

    def load(
        self, group: Sequence[Stored], abstract: dict[str, jax.ShapeDtypeStruct]
    ) -> dict[str, jax.Array]:
        """Some of the parameters by path, in their order and in the dtypes and shardings asked for.

        Raises:
          UserError: Orbax cannot read them.
        """
        wanted = unflatten({item.name: abstract[item.name] for item in group})
        values = flatten(_load(group[0].path, wanted))
        return settled({item.name: values[item.name] for item in group})


def is_orbax(folder: str) -> bool:
    """Whether a model folder was converted."""
    return os.path.isdir(os.path.join(folder, PARAMS))


def stored_parameters(folder: str) -> dict[str, Stored]:
    """The parameters of a converted folder by path, read from Orbax's metadata alone.

    Raises:
      UserError: Orbax cannot read it.
    """
    params = _params(folder)
    try:
        tree = ocp.metadata(params).metadata
        if tree is None:
            raise ValueError("its parameters are cut off")
        leaves = flatten(tree)
        return {
            path: Stored(
                path,
                params,
                tuple(leaf.shape),
                jnp.dtype(leaf.dtype).name,
                math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize,
            )
            for path, leaf in leaves.items()
        }
    except _UNREADABLE as error:
        raise _corrupt(params, error) from error


def open_orbax(folder: str, abstract: dict[str, jax.ShapeDtypeStruct]) -> OrbaxCheckpoint:
    """Checks a converted folder against the model, from Orbax's metadata.

    Raises:
      UserError: whatever keeps it from being read, naming the parameter.
    """
    found = stored_parameters(folder)
    for path, wanted in abstract.items():
        if path not in found:
            raise UserError(
                f"{os.path.join(folder, PARAMS)} lacks the parameter {path!r}; convert the model "
                "again."
            )
        found[path].check(wanted.shape)
    return OrbaxCheckpoint(
        {path: found[path] for path in abstract},
        tuple(path for path in found if path not in abstract),
    )


def save_all(folder: str, params: dict) -> None:
    """Writes a converted folder's parameters, from every process that holds some of them."""
    with _saving():
        ocp.save(_params(folder), params)


def save_part(folder: str, part: dict[str, jax.Array]) -> None:
    """Writes some of a converted folder's parameters; finish_saving makes them readable."""
    with _saving():
        ocp.partial.save(_params(folder), unflatten(part))


def finish_saving(folder: str) -> None:
    """Makes one checkpoint of all the parts that were saved."""
    ocp.partial.finalize(_params(folder))


def _params(folder: str) -> str:
    return os.path.abspath(os.path.join(folder, PARAMS))


def _saving() -> ocp.Context:
    context = ocp.Context()
    context.array.saving.storage_options.chunk_byte_size = _CHUNK_BYTES
    return context


# What Orbax raises for files that are missing, cut off or overwritten. Running out of memory is
# none of these.
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError)


def _corrupt(params: str, error: Exception) -> UserError:
    reason = str(error).strip().partition("\n")[0]
    return UserError(
        f"{params} cannot be read by Orbax, so it is damaged; convert the model again ({reason})."
    )


def _load(params: str, abstract: dict) -> dict:
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    try:
        with context:
            return ocp.load(params, abstract)
    except _UNREADABLE as error:
        raise _corrupt(params, error) from error
