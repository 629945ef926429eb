"""The KV cache of a whole model: what decides its size, and how it is created."""

import collections
import dataclasses
import functools
import math
from typing import Protocol

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lsjax.attention.blockwise import MAX_DECODE_QUERIES
from lsjax.attention.kv_array import KVArray, empty_kv_array
from lsjax.attention.sparse.rule import TILE, SparsePrefill
from lsjax.cache.float_tail import BLOCK, FloatBlock, FloatTail
from lsjax.cache.full import FullCache
from lsjax.cache.protocol import KVCache, LayerCache
from lsjax.cache.recurrent import RecurrentState, empty_state
from lsjax.cache.rolling import RollingCache
from lsjax.cache.sparse import BlockMeans, Counts, SparseCache
from lsjax.config import LayerKind, ModelConfig
from lsjax.distributed.sequence_layout import CAPACITY_MULTIPLE, ONE_DEVICE, Zigzag
from lsjax.distributed.sharding import sharding

CACHE_DTYPES = ("float32", "bfloat16", "int8", "int4")
_QUANTIZED = ("int8", "int4")


class CachePolicy(Protocol):
    """What layers keep, if not all that their queries see."""

    def empty_cache(self, config: ModelConfig, spec: "CacheSpec", platform: str) -> KVCache:
        """Creates the cache of each layer, filled with zeros."""


@dataclasses.dataclass(frozen=True)
class CacheSpec:
    """Everything that decides a cache's size.

    Attributes:
      batch: number of rows.
      capacity: number of tokens that a row can hold.
      dtype: format of the cache, one of CACHE_DTYPES.
      compute_dtype: dtype of incoming keys and values, and of the FloatTail.
      zigzag: layout of positions along the mesh's context axis.
      block: positions per block of a quantized cache; queries attend to their own block in floats.
      chunk: tokens of a prefill chunk at most; each starts at a multiple of as many. A rolling
        cache has room for them beside its window. 0 if chunks may start anywhere, so that no cache
        can roll.
      prompt_capacity: longest prompt that a row can hold, in tokens.
      policy: what layers keep; None if they keep all that their queries see.
      sparse: how prefill attends in layers without a sliding window, whose chunks start at fixed
        positions; None if to everything.
    """

    batch: int
    capacity: int
    dtype: str
    compute_dtype: str
    zigzag: Zigzag = ONE_DEVICE
    block: int = BLOCK
    chunk: int = 0
    prompt_capacity: int = 0
    policy: CachePolicy | None = None
    sparse: SparsePrefill | None = None

    def rolling_capacity(self, window: int) -> int:
        """Returns the capacity of a rolling cache: a window and a prefill chunk.

        A prefill chunk never wraps around the end of a rolling cache, whose capacity is a multiple
        of the chunk.
        """
        multiple = math.lcm(self.chunk or 1, CAPACITY_MULTIPLE * self.zigzag.devices)
        needed = window + max(self.chunk, MAX_DECODE_QUERIES)
        return -(-needed // multiple) * multiple

    @functools.lru_cache(maxsize=256)  # noqa: B019 (few, and planning asks for the same again)
    def nbytes(self, config: ModelConfig, mesh: Mesh | None = None, platform: str = "cpu") -> int:
        """Returns the bytes of the whole cache.

        They are the bytes per device if a mesh is given; else replicated arrays count once.
        """
        counts = [1] * config.num_layers
        if self.policy is None and self.sparse is None:  # one kind of layer, one size
            kinds = collections.Counter(config.layers)
            config, counts = dataclasses.replace(config, layers=tuple(kinds)), kinds.values()
        cache = jax.eval_shape(lambda: empty_cache(config, self, platform))

        return sum(n * layer_bytes(x, mesh) for n, x in zip(counts, cache, strict=True))


def layer_bytes(layer: LayerCache, mesh: Mesh | None) -> int:
    """Returns the bytes of a layer's cache, of which shapes and dtypes are given; see nbytes."""
    arrays, specs = map(jax.tree.leaves, (layer, layer.partition_specs()))
    total = 0
    for x, spec in zip(arrays, specs, strict=True):
        here = x.shape if mesh is None else sharding(mesh, spec).shard_shape(x.shape)
        total += math.prod(here) * x.dtype.itemsize
    return total


def empty_layer(
    config: ModelConfig, spec: CacheSpec, platform: str = "cpu", window: int | None = None
) -> LayerCache:
    """Creates a cache of all that a layer's queries see, filled with zeros.

    Args:
      config: model configuration.
      spec: spec of the cache; its policy is not asked.
      platform: cpu, gpu (or cuda) or tpu.
      window: sliding window of the layer in tokens, or None.
    """
    capacity, kind = spec.capacity, FullCache
    if window is not None and spec.chunk and spec.rolling_capacity(window) < capacity:
        capacity, kind = spec.rolling_capacity(window), RollingCache
    rows = (spec.batch, config.num_kv_heads)
    store = empty_kv_array((*rows, capacity, config.head_dim), spec.dtype, platform)
    if spec.sparse is not None and spec.chunk and window is None:
        cache = _empty_sparse(config, spec, spec.sparse, store)
    else:
        cache = kind(store, store, spec.zigzag, spec.chunk)
    if spec.dtype not in _QUANTIZED:
        return cache
    shape = (*rows, spec.block, config.head_dim)
    zeros = empty_kv_array(shape, spec.compute_dtype, platform).data
    return FloatTail(cache, FloatBlock(zeros, zeros))


def _empty_sparse(
    config: ModelConfig, spec: CacheSpec, rule: SparsePrefill, store: KVArray
) -> SparseCache:
    rows = (spec.batch, config.num_kv_heads)
    means = jnp.zeros((*rows, spec.capacity // TILE, config.head_dim), spec.compute_dtype)
    ints = jnp.zeros(rows[:1], jnp.int32)
    group = config.num_heads // config.num_kv_heads
    counts = Counts(jnp.zeros(rows, jnp.float32), jnp.zeros((*rows, group), jnp.float32), ints)
    return SparseCache(
        k=store,
        v=store,
        zigzag=spec.zigzag,
        chunk=spec.chunk,
        means=BlockMeans(means, means, ints),
        counts=counts,
        rule=rule,
    )


def empty_entry(
    config: ModelConfig, spec: CacheSpec, platform: str, kind: LayerKind
) -> LayerCache | RecurrentState:
    """Creates what a layer of a kind has in a model's cache; see `empty_layer`."""
    if kind.recurrence:
        return empty_state(kind.recurrence, spec.batch, spec.compute_dtype, spec.zigzag)
    return empty_layer(config, spec, platform, kind.window)


def empty_cache(config: ModelConfig, spec: CacheSpec, platform: str = "cpu") -> KVCache:
    """Creates a cache of zeros. Call it under jit, and shard it as its partition specs say."""
    if spec.policy is not None:
        return spec.policy.empty_cache(config, spec, platform)
    first = 0 if spec.sparse is None else spec.sparse.first_layers
    of_first, dense = config.attention_layers[:first], dataclasses.replace(spec, sparse=None)
    kinds = [(dense if i in of_first else spec, x) for i, x in enumerate(config.layers)]
    layers = {(spec, kind): empty_entry(config, spec, platform, kind) for spec, kind in set(kinds)}
    return tuple(layers[kind] for kind in kinds)


def cache_shapes(config: ModelConfig, mesh: Mesh, spec: CacheSpec, platform: str) -> KVCache:
    """Returns shapes, dtypes and shardings of a cache, in its structure."""
    cache = jax.eval_shape(lambda: empty_cache(config, spec, platform))
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding(mesh, where)),
        cache,
        tuple(layer.partition_specs() for layer in cache),
    )
