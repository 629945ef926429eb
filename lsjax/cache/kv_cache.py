"""The KV cache of a layer and of a model.

Keys are stored in the form that queries attend to, already rotated by position. A quantized cache
also keeps the current block of positions in floats: a query attends to the float keys of its own
block, and to the quantized keys of earlier blocks. So the nearest keys, which matter most, lose no
accuracy. Blocks start at multiples of a fixed size, so outputs do not depend on how the prompt is
split into prefill chunks. Source of a float window beside a quantized cache: KIVI
(arXiv 2402.02750).
"""

import dataclasses
import math

import flax.struct
import jax
import jax.numpy as jnp

from lsjax.cache.store import KVArray, empty_kv_array
from lsjax.config import ModelConfig
from lsjax.distributed.sequence_layout import CAPACITY_MULTIPLE, ONE_DEVICE, Zigzag

CACHE_DTYPES = ("float32", "bfloat16", "int8", "int4")
_QUANTIZED = ("int8", "int4")
# With blocks of half this size, an int8 cache changed twice as many of a small model's predictions
# over 2,048 tokens.
BLOCK = 1024
MAX_DECODE_QUERIES = 16  # tokens of a decode step: the last one, and drafts of prompt lookup


@flax.struct.dataclass
class FloatTail:
    """The current block of positions in floats; slot s holds the s-th position of the block.

    Attributes:
      k, v: [batch, kv_heads, block, head_dim]. Each row's block is the one that contains its next
        position; slots from that position on are stale.
    """

    k: jax.Array
    v: jax.Array

    @property
    def block(self) -> int:
        return self.k.shape[2]


@flax.struct.dataclass
class LayerCache:
    """Keys and values of one layer.

    Attributes:
      k, v: keys and values of all positions. In a layer with a sliding window they roll: position
        p is kept at p modulo the capacity.
      float_tail: current block in floats, if the cache is quantized; else None.
      zigzag: layout of positions along the mesh's context axis.
    """

    k: KVArray
    v: KVArray
    float_tail: FloatTail | None
    zigzag: Zigzag = flax.struct.field(pytree_node=False, default=ONE_DEVICE)


KVCache = tuple[LayerCache, ...]


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
      chunk: tokens of a prefill chunk, which the cache of a layer with a sliding window has room
        for beside the window; 0 if that layer is to keep all positions, too.
    """

    batch: int
    capacity: int
    dtype: str
    compute_dtype: str
    zigzag: Zigzag = ONE_DEVICE
    block: int = BLOCK
    chunk: int = 0

    def capacity_of(self, window: int | None) -> int:
        """Returns the capacity of a layer: all positions, or a rolling window and a chunk.

        A prefill chunk never wraps around the end of a rolling cache, whose capacity is a multiple
        of the chunk.
        """
        if window is None or not self.chunk:
            return self.capacity
        multiple = math.lcm(self.chunk, CAPACITY_MULTIPLE * self.zigzag.devices)
        needed = window + max(self.chunk, MAX_DECODE_QUERIES)
        return min(self.capacity, -(-needed // multiple) * multiple)

    def nbytes(self, config: ModelConfig) -> int:
        """Returns the bytes of the whole cache, with replicated arrays counted once."""
        cache = jax.eval_shape(lambda: empty_cache(config, self))
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))


def empty_layer(
    config: ModelConfig, spec: CacheSpec, platform: str = "cpu", window: int | None = None
) -> LayerCache:
    """Creates the cache of one layer, filled with zeros; `window` is its sliding window."""
    rows = (spec.batch, config.num_kv_heads)
    shape = (*rows, spec.capacity_of(window), config.head_dim)
    float_tail = None
    if spec.dtype in _QUANTIZED:
        zeros = jnp.zeros((*rows, spec.block, config.head_dim), spec.compute_dtype)
        float_tail = FloatTail(k=zeros, v=zeros)
    store = empty_kv_array(shape, spec.dtype, platform)
    return LayerCache(k=store, v=store, float_tail=float_tail, zigzag=spec.zigzag)


def empty_cache(config: ModelConfig, spec: CacheSpec, platform: str = "cpu") -> KVCache:
    """Creates a cache of zeros. Call it under jit with the cache's shardings as out_shardings."""
    return tuple(empty_layer(config, spec, platform, window) for window in config.windows)
