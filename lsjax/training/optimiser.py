"""AdamW under a schedule of learning rates."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import optax

SCHEDULES = ("cosine", "linear", "constant")


@dataclasses.dataclass(frozen=True)
class Optimisation:
    """How steps are taken.

    Attributes:
      steps: how many.
      learning_rate: the highest, reached after the warm-up.
      warmup: steps over which it rises from 0.
      schedule: after them it falls to 0 at the last step as a cosine or a line, or is constant.
      weight_decay: of matrices; norms and biases have none.
      clip: gradients longer than this, all together, are shortened to it; 0 for never.
      b2: AdamW's memory of squared gradients.
    """

    steps: int
    learning_rate: float
    warmup: int
    schedule: str = "cosine"
    weight_decay: float = 0.1
    clip: float = 1.0
    b2: float = 0.95


def learning_rates(o: Optimisation) -> Callable[[Any], Any]:
    """Number of the step, from 0 -> its learning rate."""
    rise = optax.linear_schedule(0.0, o.learning_rate, o.warmup)
    rest = max(o.steps - o.warmup, 1)
    after = {
        "cosine": optax.cosine_decay_schedule(o.learning_rate, rest),
        "linear": optax.linear_schedule(o.learning_rate, 0.0, rest),
        "constant": optax.constant_schedule(o.learning_rate),
    }[o.schedule]
    return optax.join_schedules([rise, after], [o.warmup])


def optimiser(o: Optimisation) -> optax.GradientTransformation:
    """AdamW after clipping."""
    adamw = optax.adamw(
        learning_rates(o),
        b2=o.b2,
        weight_decay=o.weight_decay,
        mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
    )
    return optax.chain(optax.clip_by_global_norm(o.clip), adamw) if o.clip else adamw
