"""Sampling of the next token."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from lsjax.families.generation_config import NAME
from lsjax.positions.scaling import is_positive
from lsjax.runtime.errors import UserError

NOT_A_NUMBER = -1  # replaces the token of a row whose logits are not finite
_GREEDY_BELOW = 1e-5  # float32 logits divided by less leave only the most likely token
_LARGEST = 1e30  # bound on settings, which float32 can hold


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Sampling parameters.

    They are applied in the order of transformers: repetition_penalty, temperature, top_k, top_p,
    min_p.

    Attributes:
      temperature: divisor of the logits; 0 (or close to it) is greedy decoding.
      top_k: sample among the k most likely tokens; 0 allows all.
      top_p: sample among the fewest most likely tokens whose probabilities sum to at least top_p;
        1 allows all.
      seed: random seed. A draw depends only on the seed, the prompt's index in the call, the
        sample's index, and the step.
      min_p: sample among tokens at least min_p times as likely as the most likely one; 0 allows
        all.
      repetition_penalty: penalty on tokens that the prompt or the answer already contains:
        positive logits are divided by it and negative ones multiplied. It also applies to greedy
        decoding. 1 turns it off. Source: CTRL (arXiv 1909.05858).
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
        """Whether the most likely token is always chosen."""
        return self.temperature < _GREEDY_BELOW

    @property
    def penalized(self) -> bool:
        """Whether the repetition penalty has an effect."""
        return self.repetition_penalty != 1

    def arrays(self, numbers: Sequence[tuple[int, int]]) -> "Draw":
        """Converts the parameters to arrays for the compiled decode loop.

        Args:
          numbers: (prompt index, sample index) of each row.
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
    """Parameters of random sampling, as arrays so that changing them does not recompile.

    `numbers` is [batch, 2], see Sampling.arrays; the other fields are scalars, see Sampling.
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    seed: jax.Array
    numbers: jax.Array


@flax.struct.dataclass
class Draw:
    """Sampling parameters as arrays.

    Attributes:
      random: parameters of random sampling; None for greedy decoding.
      penalty: scalar repetition penalty, or None.
    """

    random: Random | None = None
    penalty: jax.Array | None = None


def next_token(
    logits: jax.Array, draw: Draw, step: jax.Array, seen: jax.Array | None = None
) -> jax.Array:
    """Chooses the next token of each row.

    Args:
      logits: [batch, vocab] float32.
      draw: sampling parameters.
      step: number of tokens chosen before.
      seen: [batch, vocab] whether the row already contains a token; None without a penalty.

    Returns:
      [batch] int32 ids; NOT_A_NUMBER in a row whose logits are not finite.
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
    """Returns the most likely token: [..., vocab] logits -> [...] int32 ids, or NOT_A_NUMBER."""
    found = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jnp.where(_finite(logits), found, NOT_A_NUMBER)


def _finite(logits: jax.Array) -> jax.Array:
    """Returns whether the largest logit is finite; it is nan if any logit is."""
    return jnp.isfinite(jnp.max(logits, axis=-1))


_DRAWN = ("temperature", "top_k", "top_p", "min_p")


def suggested_sampling(raw: Mapping[str, Any]) -> Sampling:
    """Returns the sampling that generation_config.json suggests; greedy unless do_sample is true.

    Raises:
      UserError: a field is not a number, or out of range.
    """
    names = (*_DRAWN, "repetition_penalty") if raw.get("do_sample") else ("repetition_penalty",)
    values: dict[str, Any] = {"temperature": 1.0} if raw.get("do_sample") else {}
    for name in names:
        value = raw.get(name)
        if value is None:
            continue
        whole = name != "top_k" or isinstance(value, int)
        if not whole or not (is_positive(value) or (value == 0 and not isinstance(value, bool))):
            raise UserError(f"{NAME} field {name!r} must be a number from 0, not {value!r}.")
        values[name] = value if name == "top_k" else float(value)
    try:
        return Sampling(**values)
    except UserError as error:
        raise UserError(f"{NAME}: {error}") from None
