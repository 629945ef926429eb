"""Linear projection, token embedding and RMS norm."""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from lsjax.distributed.sharding import TOKENS_SPEC, parameter_spec
from lsjax.nn.matmul import matmul


class Scaled(NamedTuple):
    """Activations as values and a factor, by which Linear multiplies its product.

    Attributes:
      values: [batch, length, features].
      factor: [batch, length, 1] float32.
    """

    values: jax.Array
    factor: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape


class Linear(nn.Module):
    """Computes x @ weight.T + bias, with weight [out, in] as in checkpoints.

    If the weight is int8, its scale is beside it; see int8_weights.

    Attributes:
      features: number of output features.
      axes: logical names of the weight's axes; see lsjax.distributed.sharding.
      use_bias: whether there is a bias.
    """

    features: int
    axes: tuple[str, str]
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array | Scaled) -> jax.Array:
        x, factor = x if isinstance(x, Scaled) else (x, None)
        init = nn.with_partitioning(nn.initializers.normal(0.02), self.axes)
        weight = self.param("weight", init, (self.features, x.shape[-1]), x.dtype)
        y = matmul(x, weight, self.get_variable("params", "scale"))
        if factor is not None:
            y = y * factor
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
        self.scale = self.get_variable("params", "scale")  # of an int8 table; else None

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Looks up [batch, length] token ids, giving [batch, length, features]."""
        table = parameter_spec(self.mesh, ("vocab", "embed"), self.weight.shape)
        rows = table[0] if isinstance(table[0], tuple) else (table[0],)
        # Each device looks up its own rows. XLA would all-gather the whole table first.
        found = jax.shard_map(
            functools.partial(sharded_embedding_lookup, axes=rows, dtype=self.dtype),
            mesh=self.mesh,
            in_specs=(table, PartitionSpec(table[0]), TOKENS_SPEC),
            out_specs=TOKENS_SPEC,
            check_vma=False,
        )
        return found(self.weight, self.scale, tokens)

    def logits(self, x: jax.Array) -> jax.Array:
        """Returns [batch, length, vocab_size] float32 logits of x [batch, length, features]."""
        if not self.normalized:
            return matmul(x, self.weight, self.scale)
        norm = jnp.linalg.norm(self.weight.astype(jnp.float32), axis=-1)
        if self.scale is not None:
            return matmul(x, self.weight, 1 / norm)  # the scale cancels
        return matmul(x, self.weight) / norm


def sharded_embedding_lookup(
    part: jax.Array,
    scale: jax.Array | None,
    tokens: jax.Array,
    axes: tuple[str, ...],
    dtype: jnp.dtype,
) -> jax.Array:
    """Looks up [batch, length] tokens in a table that is sharded by rows; called under shard_map.

    Each device contributes the rows of its shard `part`, times their `scale` if they are int8; psum
    over the mesh `axes` combines them. The result is of `dtype`.
    """
    at = tokens - jax.lax.axis_index(axes) * part.shape[0]
    here = (at >= 0) & (at < part.shape[0])
    if scale is None:
        rows = jax.lax.platform_dependent(part, at, cpu=_rows_on_cpu, default=lambda x, at: x[at])
    elif at.size == 1:
        # XLA on a TPU would slice a single row, and would copy the whole int8 table to do so.
        pair = jax.lax.optimization_barrier(part[jnp.concatenate([at, at], axis=1)])
        rows = pair[:, :1] * scale[at][..., None]
    else:
        rows = part[at] * scale[at][..., None]
    return jax.lax.psum(jnp.where(here[..., None], rows, 0).astype(dtype), axes)


def _rows_on_cpu(table: jax.Array, at: jax.Array) -> jax.Array:
    # XLA on a CPU widens bfloat16 rows, or the whole table, outside of a loop, if it may.
    table, at = jax.lax.optimization_barrier((table, at))
    return table[at]


class RMSNorm(nn.Module):
    """Computes x / rms(x) * weight over the last axis, with the mean in float32.

    Source: arXiv 1910.07467; casts are in the order of transformers' LlamaRMSNorm.

    Attributes:
      epsilon: added to the mean of the squares.
      zero_centered: whether to multiply by 1 + weight, in float32 as transformers' Qwen3_5RMSNorm.
    """

    epsilon: float
    zero_centered: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, for_linear: bool = False) -> jax.Array | Scaled:
        """Normalizes [..., features], or leaves the factor 1 / rms(x) to Linear.

        With a few tokens, products that do not wait for the factor make shorter chains of kernels.
        """
        init = nn.initializers.zeros if self.zero_centered else nn.initializers.ones
        shape = (x.shape[-1],)
        weight = self.param("weight", nn.with_partitioning(init, (None,)), shape, x.dtype)
        if self.zero_centered:
            weight = 1 + weight.astype(jnp.float32)
        y = x.astype(jnp.float32)
        if for_linear:
            # Without the barrier XLA makes one kernel of the mean and the values.
            squares = jnp.square(jax.lax.optimization_barrier(x).astype(jnp.float32))
            return Scaled((y * weight).astype(x.dtype), self._factor(squares))
        y = y * self._factor(y * y)
        if self.zero_centered:
            return (y * weight).astype(x.dtype)
        return weight * y.astype(x.dtype)

    def _factor(self, squares: jax.Array) -> jax.Array:
        return jax.lax.rsqrt(jnp.mean(squares, axis=-1, keepdims=True) + self.epsilon)
