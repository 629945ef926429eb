"""The mesh, and the one table from what an array's axes mean to the mesh axes they lie on.

Mesh axes: `data` (rows of a batch), `context` (the sequence), `model` (heads and hidden). One
device is a mesh of size one: there is one code path.
"""

import math
from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from lsjax.cache import (
    CacheSpec,
    CompressedCache,
    KVCache,
    LayerCache,
    WindowCache,
    empty_layer,
)
from lsjax.config import ModelConfig
from lsjax.errors import UserError

AXES = ("data", "context", "model")

# What a parameter's axis means -> the mesh axis it is split over.
PARAMETER_AXES = {
    "heads": "model",
    "kv_heads": "model",
    "mlp": "model",
    "vocab": "model",
    "embed": None,
    None: None,
}

CACHE = PartitionSpec("data", "model", "context")
RECENT = PartitionSpec("data", "model")
QUERIES = PartitionSpec("data", None, "model", None)
TOKENS = PartitionSpec("data")
# Of a prefill chunk, whose tokens are dealt out to the context axis.
CHUNK_QUERIES = PartitionSpec("data", "context", "model", None)
CHUNK = PartitionSpec("data", "context")
HEADS = PartitionSpec("model")


def parse_mesh(mesh: str | Mapping[str, int]) -> dict[str, int]:
    """`context=4,model=2`, or the same as a mapping -> {"data": 1, "context": 4, "model": 2}.

    Raises:
      UserError: an unknown axis, or a size that is not a positive whole number.
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
    """A mesh over the first devices of this machine (or of all hosts).

    Args:
      sizes: devices along each axis, see parse_mesh; 1 for an axis that is not named.

    Raises:
      UserError: an unknown axis, or fewer devices than the mesh needs.
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
    """A mesh that has sizes, in the order of AXES, but no devices."""
    return AbstractMesh(sizes, AXES, (AxisType.Auto,) * len(AXES))


def check_fits_mesh(config: ModelConfig, sizes: Mapping[str, int]) -> None:
    """Refuses a mesh that does not divide the model.

    Args:
      config: the model.
      sizes: devices by axis, a mesh's shape.

    Raises:
      UserError: naming the sizes that do not divide.
    """
    for what, size in (
        ("KV heads", config.num_kv_heads),
        ("query heads", config.num_heads),
        ("MLP channels", config.intermediate_size),
        ("vocabulary entries", config.vocab_size),
    ):
        if size % sizes["model"]:
            raise UserError(
                f"the model's {size} {what} cannot be split over model={sizes['model']}; choose a "
                f"size of model that divides {size}."
            )


def sharding(mesh: Mesh, spec: PartitionSpec) -> NamedSharding:
    return NamedSharding(mesh, spec)


def place(x: np.ndarray, where: NamedSharding) -> jax.Array:
    """An array that every process has, on the devices; each puts down its own part."""
    return jax.make_array_from_callback(x.shape, where, lambda part: x[part])


def without(spec: PartitionSpec, axis: str) -> PartitionSpec:
    """The same, but whole along a mesh axis."""

    def left(entry: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        if isinstance(entry, tuple):
            return tuple(name for name in entry if name != axis)
        return None if entry == axis else entry

    return PartitionSpec(*map(left, spec))


def parameter_spec(
    mesh: Mesh, axes: tuple[str | None, ...], shape: tuple[int, ...]
) -> PartitionSpec:
    """Where a parameter lies.

    Over context a matrix is split by its rows, as far as they divide: checkpoints lie row by row,
    so that what a device holds of it is read in one piece.

    Args:
      mesh: the devices.
      axes: what the parameter's axes mean.
      shape: its shape.
    """
    split = [PARAMETER_AXES[a] for a in axes]
    rows = tuple(a for a in (split[0], "context") if a)
    if len(shape) > 1 and shape[0] % math.prod(mesh.shape[a] for a in rows) == 0:
        split[0] = rows
    return PartitionSpec(*split)


def layer_cache_spec(cache: LayerCache) -> LayerCache:
    """The specs of one layer's cache, in its own structure."""
    k, v = (jax.tree.map(lambda _: CACHE, store) for store in (cache.k, cache.v))
    return cache.replace(k=k, v=v, recent=jax.tree.map(lambda _: RECENT, cache.recent))


def compressed_cache_spec(cache: CompressedCache) -> CompressedCache:
    """The specs of one layer's compressed cache, in its own structure."""

    def of_window(window: WindowCache) -> WindowCache:
        k, v = (jax.tree.map(lambda _: CACHE, store) for store in (window.k, window.v))
        if window.dropped is None:
            return window.replace(k=k, v=v)
        dropped = window.dropped.replace(k=RECENT, v=RECENT, count=TOKENS)
        return window.replace(k=k, v=v, dropped=dropped, oldest=(RECENT, RECENT))

    whole = cache.whole and layer_cache_spec(cache.whole)
    return cache.replace(whole=whole, windows=tuple(map(of_window, cache.windows)))


def cache_shardings(config: ModelConfig, mesh: Mesh, dtype: str, stripe: int) -> KVCache:
    """The shardings of a whole cache."""
    spec = CacheSpec(1, 1, dtype, "float32", stripe)
    layer = layer_cache_spec(jax.eval_shape(lambda: empty_layer(config, spec)))
    return (jax.tree.map(lambda spec: sharding(mesh, spec), layer),) * config.num_layers
