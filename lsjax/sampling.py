"""Choosing the next token."""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from lsjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
      temperature: 0 takes the likeliest token; above, scores are divided by it.
      top_k: draw among the k likeliest only; 0 for all.
      top_p: draw among the fewest likeliest whose probabilities reach top_p; 1 for all.
      seed: draws are a function of seed, row in the batch and step.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if not self.temperature >= 0:
            raise UserError(f"temperature must be 0 (greedy) or above, not {self.temperature}.")
        if self.top_k < 0:
            raise UserError(f"top_k must be 0 (all tokens) or above, not {self.top_k}.")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be above 0 and at most 1, not {self.top_p}.")

    def arrays(self) -> "Draw | None":
        """What the compiled loop takes; None for greedy, which needs no random numbers."""
        if self.temperature == 0:
            return None
        return Draw(
            temperature=np.float32(self.temperature),
            top_k=np.int32(self.top_k),
            top_p=np.float32(self.top_p),
            seed=np.uint32(self.seed % 2**32),
        )


@flax.struct.dataclass
class Draw:
    """Sampling as arrays, so that other settings do not compile anew."""

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    seed: jax.Array


def next_token(logits: jax.Array, draw: Draw | None, step: jax.Array) -> jax.Array:
    """[batch, vocab] float32 logits -> [batch] int32 ids.

    The filters apply in transformers' order: temperature, top_k, then top_p of what is left.
    """
    if draw is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    batch, vocab = logits.shape
    scores, ids = jax.lax.top_k(logits / draw.temperature, vocab)
    scores = jnp.where((draw.top_k == 0) | (jnp.arange(vocab) < draw.top_k), scores, -jnp.inf)
    probabilities = jax.nn.softmax(scores, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    scores = jnp.where(before < draw.top_p, scores, -jnp.inf)
    key = jax.random.fold_in(jax.random.key(draw.seed), step)
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(batch))
    rank = jax.vmap(jax.random.categorical)(keys, scores)
    return jnp.take_along_axis(ids, rank[:, None], axis=1)[:, 0].astype(jnp.int32)
