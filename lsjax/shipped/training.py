"""Training: what a passage tells again counts most, and passages grow up to the trained length."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any

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
from lsjax.sharding import make_mesh
from lsjax.shipped.model import ANSWER_TOKENS, TRAINED_LENGTH, tokens_of
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
      yarn_factors: the steps take these factors of YaRN in turn, and with a factor the distances
        that it serves; 1 is no scaling. With ALiBi nothing is rotated, and all steps are alike.
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
        past the trained length; what the second phase learns is not to lean on angles that
        differ under YaRN.
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


def train(hf_config: dict[str, Any], settings: Settings) -> dict:
    """Trains one of HF_CONFIGS from random parameters and returns the tree of trained ones."""
    config = parse_config(hf_config)
    params = random_parameters(config, make_mesh(""), "float32", settings.seed)
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
    decoder = Decoder(config, make_mesh(""), jnp.float32)
    steps = sum(stage.steps for stage in phase.stages)
    rate = optax.warmup_cosine_decay_schedule(0.0, phase.peak_rate, phase.warmup, steps)
    optimiser = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(rate, b2=0.98, weight_decay=settings.weight_decay),
    )

    def loss_of(params, tokens, positions, weights, tables):
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        hidden, _ = decoder.apply({"params": params}, inputs, positions, tables, None)
        logits = decoder.apply({"params": params}, hidden, method="logits")
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        answer_loss = losses[:, -ANSWER_TOKENS:].mean()
        return (losses * weights).sum() / weights.sum(), answer_loss

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, tokens, positions, weights, tables):
        (_, answer_loss), grads = jax.value_and_grad(loss_of, has_aux=True)(
            params, tokens, positions, weights, tables
        )
        updates, state = optimiser.update(grads, state, params)
        return optax.apply_updates(params, updates), state, answer_loss

    state = optimiser.init(params)
    tables = {factor: _tables(config, factor) for factor in phase.yarn_factors}
    factors, rng = itertools.cycle(phase.yarn_factors), np.random.default_rng(settings.seed)
    progress = tqdm(itertools.islice(batches, steps), total=steps, unit="step", mininterval=5)
    for i, ((tokens, weights), factor) in enumerate(zip(progress, factors, strict=False)):
        positions = gapped_positions(rng, tokens.shape[0], tokens.shape[1] - 1, factor)
        params, state, answer_loss = step(params, state, tokens, positions, weights, tables[factor])
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


def gapped_positions(rng: np.random.Generator, batch: int, length: int, factor: int) -> np.ndarray:
    """[batch, length] int32: from 0 on, with one gap in each row.

    The gap is of up to the tokens that YaRN's factor adds to the trained length: what stands
    before it and what stands after it are as far apart as in a long text. Without gaps the last
    digit of a key is misread at some distances, whose angles a short text does not have.
    Source: PoSE (arXiv 2309.10400).
    """
    start = rng.integers(1, length, (batch, 1))
    gap = rng.integers(0, (factor - 1) * TRAINED_LENGTH, (batch, 1), endpoint=True)
    at = np.arange(length, dtype=np.int32)
    return at + np.where(at >= start, gap, 0).astype(np.int32)


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
