"""What a quantized KV cache costs: loss and most likely tokens beside those of a float cache."""

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from lsjax.distributed.multihost import to_host
from lsjax.inference.scoring import prompt_logits

if TYPE_CHECKING:
    from lsjax.language_model import LanguageModel


@dataclasses.dataclass(frozen=True)
class Scores:
    """A model's prediction of each token of a text after the first.

    Attributes:
      losses: [length - 1] negative log-likelihood of each token, in nats.
      top: [length - 1] id of the most likely token in each place.
    """

    losses: list[float]
    top: list[int]


@dataclasses.dataclass(frozen=True)
class Difference:
    """How one model's scores differ from another's.

    Attributes:
      loss: mean loss, in nats.
      change: relative change of the mean loss.
      per_token: mean absolute difference of a token's loss, in nats.
      agreement: share of places where the most likely token is the same.
    """

    loss: float
    change: float
    per_token: float
    agreement: float


def scores(model: "LanguageModel", token_ids: list[int]) -> Scores:
    """Computes a model's scores of a text, which it reads over its own cache chunk by chunk."""
    ids, at, found = np.asarray(token_ids, np.int32), 1, []
    for logits in prompt_logits(model.engine, model.params, token_ids, None):
        targets = ids[at : at + logits.shape[1]]
        found.append(to_host(_losses_and_top(logits[0, : len(targets)], targets)))
        at += len(targets)
    losses, top = np.concatenate(found, axis=1)
    return Scores(losses.round(6).tolist(), top.astype(int).tolist())


def difference(found: Scores, reference: Scores) -> Difference:
    """Compares a model's scores with the reference's, of the same text."""
    losses, others = np.array(found.losses), np.array(reference.losses)
    return Difference(
        loss=float(losses.mean()),
        change=float(losses.mean() / others.mean() - 1),
        per_token=float(np.abs(losses - others).mean()),
        agreement=float(np.mean(np.array(found.top) == np.array(reference.top))),
    )


@jax.jit
def _losses_and_top(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """[length, vocab] logits and [length] ids -> [2, length] losses and most likely ids."""
    chosen = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    losses = jax.nn.logsumexp(logits, axis=-1) - chosen
    # float32 holds every id of a vocabulary below 2**24 exactly.
    return jnp.stack([losses, jnp.argmax(logits, axis=-1).astype(jnp.float32)])
