"""Reads and writes the parameters of a converted folder, which are an Orbax checkpoint."""

import dataclasses
import gc
import math
import os
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import orbax.checkpoint.experimental.v1 as ocp

from lsjax.checkpoint.tensor_info import TensorInfo
from lsjax.nn.int8_weights import scale_path
from lsjax.nn.parameters import flatten, unflatten
from lsjax.runtime.errors import UserError

PARAMS = "params"

# Arrays are compressed in chunks of this size, so that a device that holds one shard need not read
# the whole array.
_CHUNK_BYTES = 2**20


@dataclasses.dataclass(frozen=True)
class OrbaxCheckpoint:
    """The parameters in a converted folder that the model reads.

    Attributes:
      stored: parameter path -> its location, shape and dtype.
      unread: paths of the parameters that the model does not read.
    """

    stored: dict[str, TensorInfo]
    unread: tuple[str, ...]

    def dtypes(self) -> dict[str, jnp.dtype]:
        """Returns the stored dtype of each parameter, by path."""
        return {path: stored.numpy_dtype for path, stored in self.stored.items()}

    def load(
        self, group: Sequence[TensorInfo], abstract: dict[str, jax.ShapeDtypeStruct]
    ) -> dict[str, jax.Array]:
        """Loads some parameters by path, in the dtypes and shardings of `abstract`.

        They come in the order of `group`.

        Raises:
          UserError: Orbax cannot read them.
        """
        wanted = unflatten({item.name: abstract[item.name] for item in group})
        values = flatten(_load(group[0].path, wanted))
        return release_host_buffers({item.name: values[item.name] for item in group})


def is_orbax(folder: str) -> bool:
    """Returns whether a model folder is a converted folder."""
    return os.path.isdir(os.path.join(folder, PARAMS))


def holds_int8(folder: str) -> bool:
    """Returns whether a model folder is a converted folder whose matrices are in int8."""
    return is_orbax(folder) and scale_path("embed/weight") in stored_parameters(folder)


def stored_parameters(folder: str) -> dict[str, TensorInfo]:
    """Returns the parameters of a converted folder by path, reading only Orbax's metadata.

    Raises:
      UserError: Orbax cannot read the folder.
    """
    params = _params(folder)
    try:
        tree = ocp.metadata(params).metadata
        if tree is None:
            raise ValueError("its parameters are cut off")
        leaves = flatten(tree)
        return {
            path: TensorInfo(
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
    """Checks a converted folder against the model, reading only Orbax's metadata.

    Raises:
      UserError: the folder does not fit the model; names the parameter.
    """
    found = stored_parameters(folder)
    for path, wanted in abstract.items():
        if path not in found:
            raise UserError(
                f"{os.path.join(folder, PARAMS)} lacks the parameter {path!r}; convert the model "
                "again."
            )
        found[path].check(wanted)
    return OrbaxCheckpoint(
        {path: found[path] for path in abstract},
        tuple(path for path in found if path not in abstract),
    )


def save_all(folder: str, params: dict) -> None:
    """Writes a converted folder's parameters; every process that holds some of them calls this."""
    with _saving():
        ocp.save(_params(folder), params)


def save_part(folder: str, part: dict[str, jax.Array]) -> None:
    """Writes some parameters of a converted folder; finish_saving makes them readable."""
    with _saving():
        ocp.partial.save(_params(folder), unflatten(part))


def finish_saving(folder: str) -> None:
    """Combines all saved parts into one checkpoint."""
    ocp.partial.finalize(_params(folder))


def _params(folder: str) -> str:
    return os.path.abspath(os.path.join(folder, PARAMS))


def _saving() -> ocp.Context:
    context = ocp.Context()
    context.array.saving.storage_options.chunk_byte_size = _CHUNK_BYTES
    return context


# What Orbax raises for files that are missing, truncated or overwritten. Running out of memory
# raises none of these.
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


def release_host_buffers(params: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Returns the arrays once they are on their devices and their host buffers are freed.

    Orbax leaves those buffers in reference cycles, so they accumulate until the garbage collector
    runs. The collector does not see their size and runs too late.
    """
    jax.block_until_ready(params)
    gc.collect()
    return params
