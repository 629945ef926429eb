"""Training: the answer's digits count most, and passages grow up to the trained length."""

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
from lsjax.shipped.passages import make_passage


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
      weight_decay: AdamW's.
      answer_weight: a token of the answer counts this much,
      other_weight: and any other token this much.
    """

    seed: int = 0
    phases: tuple[Phase, ...] = (
        Phase(
            # Copying the key is learned within a hundred steps where there is nothing else to
            # look at, and hardly at all in long passages from the start.
            (
                Stage(300, 64, 51),
                Stage(200, 32, 96),
                Stage(300, 32, 128),
                Stage(400, 16, 256),
                Stage(1000, 8, TRAINED_LENGTH),
            ),
            peak_rate=2e-3,
            warmup=50,
        ),
        Phase((Stage(500, 8, TRAINED_LENGTH),), 1e-3, 20, (1, 2, 4, 8, 16, 32)),
        Phase((Stage(900, 8, TRAINED_LENGTH),), 1e-3, 20, (1, 2, 4, 8, 16, 32)),
    )
    weight_decay: float = 0.01
    answer_weight: float = 5.0
    other_weight: float = 0.1


def train(settings: Settings) -> dict:
    """Trains from random parameters and returns the tree of trained ones."""
    config, mesh = parse_config(HF_CONFIG), make_mesh(parse_mesh(""))
    params = random_parameters(config, mesh, "float32", settings.seed)
    batches = _batches(settings)
    for phase in settings.phases:
        params = _train_phase(params, phase, settings, batches)
    return params


def _train_phase(
    params: dict, phase: Phase, settings: Settings, batches: Iterator[np.ndarray]
) -> dict:
    config = parse_config(HF_CONFIG)
    decoder = Decoder(config, make_mesh(parse_mesh("")), jnp.float32)
    steps = sum(stage.steps for stage in phase.stages)
    rate = optax.warmup_cosine_decay_schedule(0.0, phase.peak_rate, phase.warmup, steps)
    optimiser = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(rate, b2=0.98, weight_decay=settings.weight_decay),
    )

    def loss_of(params: dict, tokens: jax.Array, tables: RotaryTables):
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        positions = jnp.broadcast_to(jnp.arange(inputs.shape[1]), inputs.shape)
        hidden, _ = decoder.apply({"params": params}, inputs, positions, tables, None)
        logits = decoder.apply({"params": params}, hidden, method="logits")
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        is_answer = jnp.arange(inputs.shape[1]) >= inputs.shape[1] - ANSWER_TOKENS
        weights = jnp.where(is_answer, settings.answer_weight, settings.other_weight)
        answer_loss = losses[:, -ANSWER_TOKENS:].mean()
        return (losses * weights).sum() / (weights.sum() * len(tokens)), answer_loss

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, tokens, tables):
        (_, answer_loss), grads = jax.value_and_grad(loss_of, has_aux=True)(params, tokens, tables)
        updates, state = optimiser.update(grads, state, params)
        return optax.apply_updates(params, updates), state, answer_loss

    state = optimiser.init(params)
    tables = itertools.cycle([_tables(config, factor) for factor in phase.yarn_factors])
    progress = tqdm(itertools.islice(batches, steps), total=steps, unit="step", mininterval=5)
    for i, (tokens, scaled) in enumerate(zip(progress, tables, strict=False)):
        params, state, answer_loss = step(params, state, tokens, scaled)
        if i % 50 == 0:
            progress.set_postfix(tokens=tokens.shape[1], answer_loss=f"{answer_loss:.4f}")
    return params


def _tables(config: ModelConfig, factor: int) -> RotaryTables:
    if factor > 1:
        scaling = RopeScaling("yarn", float(factor), TRAINED_LENGTH)
        config = dataclasses.replace(config, rope_scaling=scaling)
    return rotary_tables(config, [TRAINED_LENGTH])


def _batches(settings: Settings) -> Iterator[np.ndarray]:
    """[batch, length] int32 for each step."""
    made = 0
    for stage in (stage for phase in settings.phases for stage in phase.stages):
        length = stage.length - ANSWER_TOKENS
        for _ in range(stage.steps):
            seeds = [f"train {settings.seed} {i}" for i in range(made, made + stage.batch)]
            made += stage.batch
            yield np.stack([tokens_of(make_passage(seed, length)) for seed in seeds])
