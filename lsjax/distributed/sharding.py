"""The device mesh, and the table of mesh axes that parameter axes are sharded over.

Mesh axes: `data` (rows of a batch), `context` (the sequence), `model` (heads, MLP channels and
vocabulary). A single device is a mesh of size one, so there is one code path.
"""

import math
from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from lsjax.config import ModelConfig
from lsjax.runtime.errors import UserError

AXES = ("data", "context", "model")

# Logical axis of a parameter -> mesh axis that it is sharded over.
PARAMETER_AXES = {
    "heads": "model",
    "kv_heads": "model",
    "mlp": "model",  # the channels of an MLP, or its parts
    "vocab": "model",
    "embed": None,
    None: None,
}

CACHE_SPEC = PartitionSpec("data", "model", "context")
FLOAT_TAIL_SPEC = PartitionSpec("data", "model")
QUERIES_SPEC = PartitionSpec("data", None, "model", None)
TOKENS_SPEC = PartitionSpec("data")
# For prefill chunks, whose tokens are sharded over the context axis.
CHUNK_QUERIES_SPEC = PartitionSpec("data", "context", "model", None)
CHUNK_SPEC = PartitionSpec("data", "context")
HEADS_SPEC = PartitionSpec("model")
# Axes that share the heads of a recurrence, which is sequential.
STATE_AXES = ("model", "context")


def parse_mesh(mesh: str | Mapping[str, int]) -> dict[str, int]:
    """Parses `context=4,model=2`, or a mapping, into {"data": 1, "context": 4, "model": 2}.

    Raises:
      UserError: an axis is unknown or given twice, or a size is not a positive integer.
    """
    text = mesh if isinstance(mesh, str) else ",".join(f"{a}={n}" for a, n in mesh.items())
    sizes = dict.fromkeys(AXES, 1)
    seen = set()
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, _, size = (s.strip() for s in part.partition("="))
        if name not in AXES:
            raise UserError(
                f"mesh axis {name!r} is not known; use {', '.join(AXES)} as in context=4,model=2."
            )
        if name in seen:
            raise UserError(f"mesh axis {name!r} is given twice in {text!r}; give it once.")
        if not size.isdecimal() or len(size) > 9 or int(size) < 1:
            raise UserError(
                f"mesh axis {name!r} needs a size of at least 1, as in {name}=2, not {size!r}."
            )
        seen.add(name)
        sizes[name] = int(size)
    return sizes


def make_mesh(sizes: str | Mapping[str, int]) -> Mesh:
    """Creates a mesh over the first devices of this machine (or of all hosts).

    Args:
      sizes: number of devices along each axis, see parse_mesh; 1 for an axis that is not named.

    Raises:
      UserError: the sizes are invalid, there are fewer devices than the mesh needs, or the mesh
        leaves out devices of several processes.
    """
    sizes = parse_mesh(sizes)
    count = 1
    for size in sizes.values():
        count *= size
    devices = jax.devices()
    if count > len(devices):
        asked = ",".join(f"{a}={s}" for a, s in sizes.items() if s > 1)
        more = f", or set JAX_NUM_CPU_DEVICES={count}" if devices[0].platform == "cpu" else ""
        raise UserError(
            f"the mesh {asked} needs {count} devices, but {len(devices)} {devices[0].platform} "
            f"device{'s are' if len(devices) > 1 else ' is'} here; ask for a smaller mesh{more}."
        )
    if jax.process_count() > 1 and count < len(devices):
        raise UserError(
            f"the mesh has {count} of the {len(devices)} devices that {jax.process_count()} "
            "processes bring; give every device a place, as in "
            f"context={len(devices)}, or start fewer processes."
        )
    return jax.make_mesh(
        tuple(sizes[a] for a in AXES), AXES, (AxisType.Auto,) * len(AXES), devices=devices[:count]
    )


def abstract_mesh(sizes: tuple[int, int, int]) -> AbstractMesh:
    """Creates a mesh with sizes, in the order of AXES, but without devices."""
    return AbstractMesh(sizes, AXES, (AxisType.Auto,) * len(AXES))


def check_fits_mesh(config: ModelConfig, sizes: Mapping[str, int]) -> None:
    """Checks that the mesh's model axis divides the model.

    Args:
      config: model configuration.
      sizes: shape of the mesh, number of devices by axis.

    Raises:
      UserError: a size of the model is not divisible; the message names it, and a mesh of as many
        devices that divides the model.
    """
    shards = sizes["model"] * sizes.get("context", 1)
    for what, size in (part for x in config.recurrences for part in x.split.items()):
        if size % shards:
            raise UserError(
                f"the {size} {what} of the model's recurrent layers cannot be split over context x "
                f"model = {shards}; make it a divisor of {size}, and split rows over data."
            )
    split = {"KV heads": config.num_kv_heads, "query heads": config.num_heads}
    for what, size in (part for mlp in config.mlps for part in mlp.split.items()):
        split[what] = math.gcd(size, split.get(what, 0))
    split["vocabulary entries"] = config.vocab_size
    model = math.gcd(sizes["model"], *split.values())
    for what, size in split.items():
        if size % sizes["model"]:
            context = sizes.get("context", 1) * (sizes["model"] // model)
            others = {**sizes, "context": context, "model": model}
            instead = ",".join(f"{a}={others[a]}" for a in AXES if others.get(a, 1) > 1)
            raise UserError(
                f"the model's {size} {what} cannot be split over model={sizes['model']}; use "
                f"{instead}, which gives the other devices a part of the sequence each."
            )


def sharding(mesh: Mesh, spec: PartitionSpec) -> NamedSharding:
    return NamedSharding(mesh, spec)


def put_on_mesh(x: np.ndarray, where: NamedSharding) -> jax.Array:
    """Puts an array that every process has on the mesh; each process transfers its own shards."""
    return jax.make_array_from_callback(x.shape, where, lambda part: x[part])


def drop_axis(spec: PartitionSpec, axis: str) -> PartitionSpec:
    """Returns the spec of an array that is not sharded over the mesh axis `axis`."""

    def left(entry: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        if isinstance(entry, tuple):
            return tuple(name for name in entry if name != axis)
        return None if entry == axis else entry

    return PartitionSpec(*map(left, spec))


def parameter_spec(
    mesh: Mesh, axes: tuple[str | None, ...], shape: tuple[int, ...]
) -> PartitionSpec:
    """Returns the partition spec of a parameter.

    The rows of a matrix are also sharded over the context axis, if they divide evenly. Checkpoints
    are stored row by row, so each device's shard is read in one piece.

    Args:
      mesh: device mesh.
      axes: logical axes of the parameter, keys of PARAMETER_AXES.
      shape: shape of the parameter.
    """
    split = [PARAMETER_AXES[a] for a in axes]
    rows = tuple(a for a in (split[0], "context") if a)
    if len(shape) > 1 and shape[0] % math.prod(mesh.shape[a] for a in rows) == 0:
        split[0] = rows
    return PartitionSpec(*split)
