"""AdamW with a learning-rate schedule."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import optax

SCHEDULES = ("cosine", "linear", "constant")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer and its schedule.

    Attributes:
      steps: total number of training steps.
      learning_rate: peak learning rate, reached after the warm-up.
      warmup_steps: steps over which the learning rate rises from 0 to its peak.
      schedule: "cosine" and "linear" fall to 0 over the steps after the warm-up; "constant" stays
        at the peak.
      weight_decay: weight decay of matrices; norms and biases have none.
      max_grad_norm: global norm that gradients are clipped to; 0 turns clipping off.
      b2: AdamW's decay rate for squared gradients.
    """

    steps: int
    learning_rate: float
    warmup_steps: int
    schedule: str = "cosine"
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    b2: float = 0.95


def learning_rates(o: OptimizerConfig) -> Callable[[Any], Any]:
    """Returns a function from the number of a step, counted from 0, to its learning rate."""
    rise = optax.linear_schedule(0.0, o.learning_rate, o.warmup_steps)
    rest = max(o.steps - o.warmup_steps, 1)
    after = {
        "cosine": optax.cosine_decay_schedule(o.learning_rate, rest),
        "linear": optax.linear_schedule(o.learning_rate, 0.0, rest),
        "constant": optax.constant_schedule(o.learning_rate),
    }[o.schedule]
    return optax.join_schedules([rise, after], [o.warmup_steps])


def make_optimizer(o: OptimizerConfig) -> optax.GradientTransformation:
    """Returns AdamW, applied after gradient clipping."""
    adamw = optax.adamw(
        learning_rates(o),
        b2=o.b2,
        weight_decay=o.weight_decay,
        mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
    )
    return (
        optax.chain(optax.clip_by_global_norm(o.max_grad_norm), adamw) if o.max_grad_norm else adamw
    )
