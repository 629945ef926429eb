"""Training: what a passage tells again counts most, and passages grow up to the trained length."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from lsjax.config import ModelConfig, RopeScaling
from lsjax.families import parse_config
from lsjax.nn.decoder import Decoder
from lsjax.nn.parameters import random_parameters
from lsjax.positions.rotary import RotaryTables, rotary_tables
from lsjax.sharding import make_mesh, parse_mesh
from lsjax.shipped.model import ANSWER_TOKENS, HF_CONFIG, TRAINED_LENGTH, tokens_of
from lsjax.shipped.passages import Passage, make_passage, statement


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of training.

    Attributes:
      steps: how many.
      batch: passages a step.
      length: tokens a passage, its answer and end included.
    """

    steps: int
    batch: int
    length: int


@dataclasses.dataclass(frozen=True)
class Phase:
    """Stages under one learning rate: a warm-up, then a cosine to zero.

    Attributes:
      stages: one after the other.
      peak_rate: learning rate after the warm-up.
      warmup: steps.
      yarn_factors: the steps take these factors of YaRN in turn; 1 is no scaling.
    """

    stages: tuple[Stage, ...]
    peak_rate: float
    warmup: int
    yarn_factors: tuple[int, ...] = (1,)


@dataclasses.dataclass(frozen=True)
class Settings:
    """How the model is trained.

    Attributes:
      seed: of the parameters and the passages.
      phases: first finding the key, then finding it whatever YaRN's factor. The text never grows
        past the trained length; what the second phase learns is not to lean on frequencies that
        YaRN changes.
      most_mentions: a passage tells its key up to this many times. Each time after the first is
        there to be foreseen, which teaches copying much sooner than the answer alone.
      weight_decay: AdamW's.
      answer_weight: a token of the answer or of a key told again counts this much,
      other_weight: and any other token this much.
    """

    seed: int = 0
    phases: tuple[Phase, ...] = (
        Phase(
            # Copying is learned sooner where there is little else to look at.
            (
                Stage(150, 48, 96),
                Stage(150, 32, 128),
                Stage(300, 16, 256),
                Stage(800, 16, TRAINED_LENGTH),
            ),
            peak_rate=2e-3,
            warmup=50,
        ),
        Phase((Stage(500, 16, TRAINED_LENGTH),), 1e-3, 50, (1, 2, 4, 8, 16, 32)),
    )
    most_mentions: int = 4
    weight_decay: float = 0.01
    answer_weight: float = 5.0
    other_weight: float = 0.1


def train(settings: Settings) -> dict:
    """Trains from random parameters and returns the tree of trained ones."""
    config = parse_config(HF_CONFIG)
    params = random_parameters(config, make_mesh(parse_mesh("")), "float32", settings.seed)
    batches = _batches(settings)
    for phase in settings.phases:
        params = _train_phase(config, params, phase, settings, batches)
    return params


def _train_phase(
    config: ModelConfig,
    params: dict,
    phase: Phase,
    settings: Settings,
    batches: Iterator[tuple[np.ndarray, np.ndarray]],
) -> dict:
    decoder = Decoder(config, make_mesh(parse_mesh("")), jnp.float32)
    steps = sum(stage.steps for stage in phase.stages)
    rate = optax.warmup_cosine_decay_schedule(0.0, phase.peak_rate, phase.warmup, steps)
    optimiser = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(rate, b2=0.98, weight_decay=settings.weight_decay),
    )

    def loss_of(params: dict, tokens: jax.Array, weights: jax.Array, tables: RotaryTables):
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        positions = jnp.broadcast_to(jnp.arange(inputs.shape[1]), inputs.shape)
        hidden, _ = decoder.apply({"params": params}, inputs, positions, tables, None)
        logits = decoder.apply({"params": params}, hidden, method="logits")
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        answer_loss = losses[:, -ANSWER_TOKENS:].mean()
        return (losses * weights).sum() / weights.sum(), answer_loss

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, tokens, weights, tables):
        (_, answer_loss), grads = jax.value_and_grad(loss_of, has_aux=True)(
            params, tokens, weights, tables
        )
        updates, state = optimiser.update(grads, state, params)
        return optax.apply_updates(params, updates), state, answer_loss

    state = optimiser.init(params)
    tables = itertools.cycle([_tables(config, factor) for factor in phase.yarn_factors])
    progress = tqdm(itertools.islice(batches, steps), total=steps, unit="step", mininterval=5)
    for i, ((tokens, weights), scaled) in enumerate(zip(progress, tables, strict=False)):
        params, state, answer_loss = step(params, state, tokens, weights, scaled)
        if i % 50 == 0:
            progress.set_postfix(tokens=tokens.shape[1], answer_loss=f"{answer_loss:.4f}")
    return params


def _tables(config: ModelConfig, factor: int) -> RotaryTables:
    """YaRN's frequencies without its attention factor.

    That factor makes attention sharper for the many tokens of a long text, which these texts are
    not; a model trained with it would come to count on it.
    """
    if factor > 1:
        scaling = RopeScaling("yarn", float(factor), TRAINED_LENGTH, attention_factor=1.0)
        config = dataclasses.replace(config, rope_scaling=scaling)
    return rotary_tables(config, [TRAINED_LENGTH])


def _batches(settings: Settings) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """[batch, length] int32 tokens and the [batch, length - 1] float32 weights of the next ones."""
    stages = [stage for phase in settings.phases for stage in phase.stages]
    for i, stage in enumerate(s for s in stages for _ in range(s.steps)):
        rows = [
            make_passage(
                f"t{settings.seed} {i} {row}",
                stage.length - ANSWER_TOKENS,
                most_mentions=settings.most_mentions,
            )
            for row in range(stage.batch)
        ]
        yield (
            np.stack([tokens_of(passage) for passage in rows]),
            np.stack([_weights(passage, settings) for passage in rows]),
        )


def _weights(passage: Passage, settings: Settings) -> np.ndarray:
    """What each token after the first counts."""
    text, told = f"{passage.prompt} {passage.answer}", statement(passage.answer)
    weights = np.full(len(text), settings.other_weight, np.float32)
    at = text.find(told)
    while (at := text.find(told, at + 1)) >= 0:
        digits = at + told.index(passage.answer)
        weights[digits - 1 : digits - 1 + len(passage.answer)] = settings.answer_weight
    weights[-len(passage.answer) - 1 :] = settings.answer_weight
    return weights
