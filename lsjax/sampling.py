"""Choosing the next token."""

import dataclasses
import math
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from lsjax.errors import UserError

NOT_A_NUMBER = -1  # stands for a token where the model's scores are not finite
_GREEDY_BELOW = 1e-5  # dividing float32 scores by less leaves nothing but the likeliest
_LARGEST = 1e30  # of numbers that float32 holds


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. Filters apply in transformers' order, which is that of the attributes.

    Attributes:
      temperature: 0 (or next to it) takes the likeliest token; above, scores are divided by it.
      top_k: draw among the k likeliest only; 0 for all.
      top_p: draw among the fewest likeliest whose probabilities reach top_p; 1 for all.
      seed: draws are a function of the seed, the prompt's number in the request, the sample's
        number of that prompt, and the step.
      min_p: draw among those at least min_p times as likely as the likeliest; 0 for all.
      repetition_penalty: scores of tokens that prompt or answer hold already are divided by it
        where above 0, and multiplied by it where below; before anything else, and without a
        temperature too. 1 for none. Source: CTRL (arXiv 1909.05858).
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self):
        if not 0 <= self.temperature < math.inf:
            raise UserError(
                f"temperature must be 0 (greedy) or a number above, not {self.temperature}."
            )
        if self.top_k < 0:
            raise UserError(f"top_k must be 0 (all tokens) or above, not {self.top_k}.")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be above 0 and at most 1, not {self.top_p}.")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"min_p must be from 0 (all tokens) to 1, not {self.min_p}.")
        if not 0 < self.repetition_penalty < math.inf:
            raise UserError(
                f"repetition_penalty must be a number above 0 (1 for none), not "
                f"{self.repetition_penalty}."
            )

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.temperature < _GREEDY_BELOW

    @property
    def penalized(self) -> bool:
        """Whether it matters which tokens have stood before."""
        return self.repetition_penalty != 1

    def arrays(self, numbers: Sequence[tuple[int, int]]) -> "Draw":
        """What the compiled loop takes.

        Args:
          numbers: of each row's prompt in the request, and of the sample of that prompt.
        """
        random = None
        if not self.greedy:
            random = Random(
                temperature=np.float32(min(self.temperature, _LARGEST)),
                top_k=np.int32(min(self.top_k, 2**31 - 1)),
                top_p=np.float32(self.top_p),
                min_p=np.float32(self.min_p),
                seed=np.uint32(self.seed % 2**32),
                numbers=np.array(numbers, np.uint32),
            )
        penalty = np.float32(min(self.repetition_penalty, _LARGEST)) if self.penalized else None
        return Draw(random, penalty)


@flax.struct.dataclass
class Random:
    """Settings of random draws as arrays, so that others do not compile anew; `numbers` is
    [batch, 2], see Sampling.arrays."""

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    seed: jax.Array
    numbers: jax.Array


@flax.struct.dataclass
class Draw:
    """Sampling as arrays.

    Attributes:
      random: None for greedy, which needs no random numbers.
      penalty: of repetitions; None for none.
    """

    random: Random | None = None
    penalty: jax.Array | None = None


def next_token(
    logits: jax.Array, draw: Draw, step: jax.Array, seen: jax.Array | None = None
) -> jax.Array:
    """Chooses a token for each row.

    Args:
      logits: [batch, vocab] float32.
      draw: how.
      step: tokens that have been chosen before.
      seen: [batch, vocab] whether a token has stood before; None without a penalty.

    Returns:
      [batch] int32 ids; NOT_A_NUMBER where a row's scores are not finite.
    """
    if draw.penalty is not None:
        penalized = jnp.where(logits > 0, logits / draw.penalty, logits * draw.penalty)
        logits = jnp.where(seen, penalized, logits)
    if draw.random is None:
        return likeliest(logits)
    random, vocab = draw.random, logits.shape[-1]
    scores, ids = jax.lax.top_k(logits / random.temperature, vocab)
    scores = jnp.where((random.top_k == 0) | (jnp.arange(vocab) < random.top_k), scores, -jnp.inf)
    probabilities = jax.nn.softmax(scores, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    kept = (before < random.top_p) & (probabilities >= random.min_p * probabilities[:, :1])
    scores = jnp.where(kept, scores, -jnp.inf)
    key = jax.random.fold_in(jax.random.key(random.seed), step)
    fold = jax.vmap(lambda own: jax.random.fold_in(jax.random.fold_in(key, own[0]), own[1]))
    rank = jax.vmap(jax.random.categorical)(fold(random.numbers), scores)
    chosen = jnp.take_along_axis(ids, rank[:, None], axis=1)[:, 0].astype(jnp.int32)
    return jnp.where(_finite(logits), chosen, NOT_A_NUMBER)


def likeliest(logits: jax.Array) -> jax.Array:
    """[..., vocab] scores -> [...] int32 ids, or NOT_A_NUMBER."""
    found = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jnp.where(_finite(logits), found, NOT_A_NUMBER)


def _finite(logits: jax.Array) -> jax.Array:
    """Whether the highest score is a number; any nan makes it none."""
    return jnp.isfinite(jnp.max(logits, axis=-1))
