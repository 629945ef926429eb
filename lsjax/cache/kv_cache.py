"""The cache of a layer, and of a model.

Keys stand in it as they are attended to, already rotated to their positions. A quantised cache
also keeps the block of positions in progress in floats: a query attends to its own block's keys
as they are, and to those of earlier blocks as they were quantised. Near keys, which matter most,
cost no accuracy; and since blocks begin at multiples of a fixed size, an answer does not depend on
where the prompt was cut into chunks. Source of a float window beside a quantised cache: KIVI
(arXiv 2402.02750).
"""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from lsjax.cache.store import Store, empty_store
from lsjax.config import ModelConfig

CACHE_DTYPES = ("float32", "bfloat16", "int8", "int4")
_QUANTISED = ("int8", "int4")
# With half as many positions in a block, an int8 cache changed twice as many of a small model's
# predictions over 2,048 tokens.
BLOCK = 1024


@flax.struct.dataclass
class Recent:
    """The block of positions in progress, in floats; slot s holds the block's position s.

    Attributes:
      k, v: [batch, kv_heads, block, head_dim]. Each row's block is the one that its next
        position falls in; slots from that position on hold something older.
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
      k, v: all positions.
      recent: of a quantised cache, else None.
      stripe: how positions lie along the mesh's context axis, see Zigzag.
    """

    k: Store
    v: Store
    recent: Recent | None
    stripe: int = flax.struct.field(pytree_node=False, default=0)


KVCache = tuple[LayerCache, ...]


@dataclasses.dataclass(frozen=True)
class CacheSpec:
    """Everything that decides a cache's size.

    Attributes:
      batch: rows.
      capacity: tokens that a row can hold.
      dtype: one of CACHE_DTYPES.
      compute_dtype: of the keys and values that come, and of recent ones.
      stripe: how positions lie along the mesh's context axis, see Zigzag.
      block: positions of a quantised cache whose keys are attended to as floats by the queries
        among them.
    """

    batch: int
    capacity: int
    dtype: str
    compute_dtype: str
    stripe: int = 0
    block: int = BLOCK

    def nbytes(self, config: ModelConfig) -> int:
        """Bytes of the whole cache, over all devices but counted once."""
        layer = jax.eval_shape(lambda: empty_layer(config, self))
        return config.num_layers * sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(layer))


def empty_layer(config: ModelConfig, spec: CacheSpec, platform: str = "cpu") -> LayerCache:
    """One layer's, of zeros."""
    rows = (spec.batch, config.num_kv_heads)
    shape = (*rows, spec.capacity, config.head_dim)
    recent = None
    if spec.dtype in _QUANTISED:
        zeros = jnp.zeros((*rows, spec.block, config.head_dim), spec.compute_dtype)
        recent = Recent(k=zeros, v=zeros)
    store = empty_store(shape, spec.dtype, platform)
    return LayerCache(k=store, v=store, recent=recent, stripe=spec.stripe)


def empty_cache(config: ModelConfig, spec: CacheSpec, platform: str = "cpu") -> KVCache:
    """A cache of zeros; to be called under jit with the cache's shardings as out_shardings."""
    return tuple(empty_layer(config, spec, platform) for _ in range(config.num_layers))
