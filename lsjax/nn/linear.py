"""Linear projection, token embedding and RMS norm."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lsjax.distributed.sharding import TOKENS_SPEC, parameter_spec
from lsjax.runtime.precision import einsum

# Numbers of vectors that a CPU multiplies as columns. A single vector is a special case.
CPU_COLUMN_BATCH = range(2, 33)


def matmul(x: jax.Array, weight: jax.Array) -> jax.Array:
    """Multiplies x [batch, length, in] by weight [out, in]: [batch, length, out] float32."""

    def rows(x: jax.Array, weight: jax.Array) -> jax.Array:
        return einsum("bli,oi->blo", x, weight)

    def columns(x: jax.Array, weight: jax.Array) -> jax.Array:
        # Without the barriers XLA would restore the row order.
        x = jax.lax.optimization_barrier(x.transpose(2, 0, 1))
        return jax.lax.optimization_barrier(einsum("oi,ibl->obl", weight, x)).transpose(1, 2, 0)

    if x.shape[0] * x.shape[1] not in CPU_COLUMN_BATCH:
        return rows(x, weight)
    # On a CPU, a few vectors cost little more than one if they are columns, and two to three times
    # as much if they are rows.
    return jax.lax.platform_dependent(x, weight, cpu=columns, default=rows)


class Linear(nn.Module):
    """Computes x @ weight.T + bias, with weight [out, in] as in checkpoints.

    Attributes:
      features: number of output features.
      axes: logical names of the weight's axes; see lsjax.distributed.sharding.
      use_bias: whether there is a bias.
    """

    features: int
    axes: tuple[str, str]
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.with_partitioning(nn.initializers.normal(0.02), self.axes)
        weight = self.param("weight", init, (self.features, x.shape[-1]), x.dtype)
        y = matmul(x, weight)
        if self.use_bias:
            zeros = nn.with_partitioning(nn.initializers.zeros, self.axes[:1])
            y = y + self.param("bias", zeros, (self.features,), x.dtype)
        return y.astype(x.dtype)


class Embedding(nn.Module):
    """Token embedding table, for lookup at the input and for logits at the output.

    Attributes:
      vocab_size, features, dtype: shape and dtype of the table.
      mesh: device mesh; see lsjax.distributed.sharding.
      normalized: whether logits use the table's rows scaled to unit length.
    """

    vocab_size: int
    features: int
    dtype: jnp.dtype
    mesh: Mesh
    normalized: bool = False

    def setup(self):
        init = nn.with_partitioning(nn.initializers.normal(0.02), ("vocab", "embed"))
        self.weight = self.param("weight", init, (self.vocab_size, self.features), self.dtype)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Looks up [batch, length] token ids, giving [batch, length, features]."""
        table = parameter_spec(self.mesh, ("vocab", "embed"), self.weight.shape)
        rows = table[0] if isinstance(table[0], tuple) else (table[0],)
        # Each device looks up its own rows. XLA would all-gather the whole table first.
        found = jax.shard_map(
            functools.partial(sharded_embedding_lookup, axes=rows),
            mesh=self.mesh,
            in_specs=(table, TOKENS_SPEC),
            out_specs=TOKENS_SPEC,
            check_vma=False,
        )
        return found(self.weight, tokens)

    def logits(self, x: jax.Array) -> jax.Array:
        """Returns [batch, length, vocab_size] float32 logits of x [batch, length, features]."""
        scores = matmul(x, self.weight)
        if self.normalized:
            scores /= jnp.linalg.norm(self.weight.astype(jnp.float32), axis=-1)
        return scores


def sharded_embedding_lookup(
    part: jax.Array, tokens: jax.Array, axes: tuple[str, ...]
) -> jax.Array:
    """Looks up [batch, length] tokens in a table that is sharded by rows; called under shard_map.

    Each device contributes the rows of its shard `part`; psum over the mesh `axes` combines them.
    """
    at = tokens - jax.lax.axis_index(axes) * part.shape[0]
    here = (at >= 0) & (at < part.shape[0])
    return jax.lax.psum(jnp.where(here[..., None], part[at], 0), axes)


class RMSNorm(nn.Module):
    """Computes x / rms(x) * weight over the last axis, with the mean in float32.

    Source: arXiv 1910.07467; casts are in the order of transformers' LlamaRMSNorm.
    """

    epsilon: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.with_partitioning(nn.initializers.ones, (None,))
        weight = self.param("weight", init, (x.shape[-1],), x.dtype)
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.epsilon)
        return weight * y.astype(x.dtype)
