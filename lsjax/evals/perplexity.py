"""Loss by position: shows whether tokens far into a text are still predicted well."""

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from lsjax.inference.scoring import decoded_nll, prompt_nll
from lsjax.inference.sparsity import Sparsity, combine
from lsjax.runtime.errors import UserError

if TYPE_CHECKING:
    from lsjax.language_model import LanguageModel


@dataclasses.dataclass(frozen=True)
class Curve:
    """Loss over the positions of a text.

    Attributes:
      ends: last position of each stretch, in tokens.
      losses: mean loss of each stretch's tokens, in nats.
      perplexity: exp of the mean loss over all tokens.
      density: what prompts attended to, relative to full attention; see Sparsity.
    """

    ends: tuple[int, ...]
    losses: tuple[float, ...]
    perplexity: float
    density: float = 1.0


def loss_curve(
    model: "LanguageModel",
    token_ids: list[int],
    length: int,
    prompt_length: int = 0,
    stretches: int = 32,
    windows: int = 4,
) -> Curve:
    """Computes the loss of each next token, averaged over stretches of positions.

    Args:
      model: the model to measure.
      token_ids: a text of at least `length` tokens.
      length: tokens that the model reads.
      prompt_length: tokens of the prompt. Later tokens are decoded one by one, and only their
        losses count, from the second one on. 0: the prompt is the whole text, and all count.
      stretches: largest number of points on the curve.
      windows: largest number of windows of `length` tokens, one after the other in the text, that
        the average is over.

    Raises:
      UserError: the text is too short.
    """
    windows = min(len(token_ids) // length, windows)
    if windows == 0 or length < 2:
        raise UserError(
            f"the text has {len(token_ids)} tokens, too few for a length of {length}; give a "
            "longer text or a length of 2 up to that number."
        )
    texts = [token_ids[i * length : (i + 1) * length] for i in range(windows)]
    sparsity: list[Sparsity] = []
    nll, parts = (decoded_nll, prompt_length) if prompt_length else (prompt_nll, None)
    rows = [nll(model.engine, model.params, [text], parts, sparsity.append)[0] for text in texts]
    losses = np.mean(rows, axis=0)
    parts = np.array_split(losses, min(stretches, len(losses)))
    begin = length - 1 - len(losses)
    return Curve(
        ends=tuple(int(e) for e in begin + np.cumsum([len(p) for p in parts])),
        losses=tuple(float(p.mean()) for p in parts),
        perplexity=float(np.exp(losses.mean())),
        density=combine(sparsity).density if sparsity else 1.0,
    )
