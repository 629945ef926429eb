"""Projection, embedding and norm."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lsjax.precision import einsum
from lsjax.sharding import TOKENS, parameter_spec

# Vectors that a CPU multiplies as columns. A single one is a case of its own.
_COLUMNS = range(2, 33)


def _product(x: jax.Array, weight: jax.Array) -> jax.Array:
    """[batch, length, in] times a weight [out, in] -> [batch, length, out] float32."""

    def rows(x: jax.Array, weight: jax.Array) -> jax.Array:
        return einsum("bli,oi->blo", x, weight)

    def columns(x: jax.Array, weight: jax.Array) -> jax.Array:
        # XLA would have the order of rows again, but for the barriers.
        x = jax.lax.optimization_barrier(x.transpose(2, 0, 1))
        return jax.lax.optimization_barrier(einsum("oi,ibl->obl", weight, x)).transpose(1, 2, 0)

    if x.shape[0] * x.shape[1] not in _COLUMNS:
        return rows(x, weight)
    # A few vectors cost a CPU little more than one as columns, and two to three times as rows.
    return jax.lax.platform_dependent(x, weight, cpu=columns, default=rows)


class Linear(nn.Module):
    """x @ weight.T + bias, the weight laid out [out, in] as checkpoints have it.

    Attributes:
      features: out.
      axes: what the weight's axes mean, see lsjax.sharding.
      use_bias: whether there is a bias.
    """

    features: int
    axes: tuple[str, str]
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.with_partitioning(nn.initializers.normal(0.02), self.axes)
        weight = self.param("weight", init, (self.features, x.shape[-1]), x.dtype)
        y = _product(x, weight)
        if self.use_bias:
            zeros = nn.with_partitioning(nn.initializers.zeros, self.axes[:1])
            y = y + self.param("bias", zeros, (self.features,), x.dtype)
        return y.astype(x.dtype)


class Embedding(nn.Module):
    """A vector for each token of the vocabulary: looked up going in, a product going out.

    Attributes:
      vocab_size, features, dtype: of the table.
      mesh: see lsjax.sharding.
      normalised: scores are those of vectors of length one.
    """

    vocab_size: int
    features: int
    dtype: jnp.dtype
    mesh: Mesh
    normalised: bool = False

    def setup(self):
        init = nn.with_partitioning(nn.initializers.normal(0.02), ("vocab", "embed"))
        self.weight = self.param("weight", init, (self.vocab_size, self.features), self.dtype)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """[batch, length] ids -> [batch, length, features]."""
        table = parameter_spec(self.mesh, ("vocab", "embed"), self.weight.shape)
        rows = table[0] if isinstance(table[0], tuple) else (table[0],)
        # Each device finds those that it has. XLA would bring the whole table together first.
        found = jax.shard_map(
            functools.partial(found_here, axes=rows),
            mesh=self.mesh,
            in_specs=(table, TOKENS),
            out_specs=TOKENS,
            check_vma=False,
        )
        return found(self.weight, tokens)

    def logits(self, x: jax.Array) -> jax.Array:
        """[batch, length, features] -> [batch, length, vocab_size] float32."""
        scores = _product(x, self.weight)
        if self.normalised:
            scores /= jnp.linalg.norm(self.weight.astype(jnp.float32), axis=-1)
        return scores


def found_here(part: jax.Array, tokens: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Vectors of [batch, length] tokens, summed over the devices that have parts of the table."""
    at = tokens - jax.lax.axis_index(axes) * part.shape[0]
    here = (at >= 0) & (at < part.shape[0])
    return jax.lax.psum(jnp.where(here[..., None], part[at], 0), axes)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, the mean taken in float32.

    Source: arXiv 1910.07467; the order of casts is that of transformers' LlamaRMSNorm.
    """

    epsilon: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.with_partitioning(nn.initializers.ones, (None,))
        weight = self.param("weight", init, (x.shape[-1],), x.dtype)
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.epsilon)
        return weight * y.astype(x.dtype)
