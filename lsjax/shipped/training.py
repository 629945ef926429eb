"""The recipe that trains the shipped models.

Answers and repeated keys count most in the loss. Passages grow up to the trained length.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from lsjax.checkpoint.atomic_directory import check_free
from lsjax.config import ModelConfig, RopeScaling
from lsjax.distributed.sharding import make_mesh
from lsjax.evals.passkey import make_passage
from lsjax.families import parse_config
from lsjax.nn.parameters import random_parameters
from lsjax.positions.rotary import RotaryTables, rotary_tables
from lsjax.runtime.progress import step_bar
from lsjax.shipped.export import export
from lsjax.shipped.model import ANSWER_TOKENS, HF_CONFIGS, TRAINED_LENGTH, weighted
from lsjax.training.batch import Batch
from lsjax.training.optimizer import OptimizerConfig, make_optimizer
from lsjax.training.packing import first_tokens
from lsjax.training.pose import gapped_positions
from lsjax.training.step import Trainer


@dataclasses.dataclass(frozen=True)
class Stage:
    """Steps of training that share a batch shape.

    Attributes:
      steps: number of steps.
      batch: passages per step.
      length: tokens per passage, including its answer and the end token.
    """

    steps: int
    batch: int
    length: int


@dataclasses.dataclass(frozen=True)
class Phase:
    """Stages that share one learning-rate schedule: a warm-up, then a cosine to zero.

    Attributes:
      stages: the stages, in order.
      peak_rate: learning rate after the warm-up.
      warmup_steps: steps of the warm-up.
      yarn_factors: YaRN factors that the steps cycle through; 1 is no scaling. Each step spreads
        its positions over up to the length that its factor serves. With ALiBi nothing is rotated,
        so all steps are alike.
    """

    stages: tuple[Stage, ...]
    peak_rate: float
    warmup_steps: int
    yarn_factors: tuple[int, ...] = (1,)


@dataclasses.dataclass(frozen=True)
class RecipeConfig:
    """How a shipped model is trained.

    Attributes:
      seed: random seed for the parameters and the passages.
      phases: the training phases. The first one teaches finding the key, the second one finding it
        under any YaRN factor. The text never grows past the trained length; the second phase
        teaches the model not to rely on angles that differ under YaRN.
      most_mentions: most times that a passage states its key. The model learns to predict each
        repetition, which teaches copying much sooner than the answer alone.
      weight_decay, b2: parameters of AdamW, see OptimizerConfig.
      answer_weight: weight of the answer's digits, the end token and the digits of each repeated
        key.
      other_weight: weight of all other tokens.
    """

    seed: int = 0
    phases: tuple[Phase, ...] = (
        Phase(
            # Copying is learned sooner in short passages, where there is little else to attend to.
            (
                Stage(150, 48, 96),
                Stage(150, 32, 128),
                Stage(300, 16, 256),
                Stage(800, 16, TRAINED_LENGTH),
            ),
            peak_rate=2e-3,
            warmup_steps=50,
        ),
        Phase((Stage(500, 16, TRAINED_LENGTH),), 1e-3, 50, (1, 2, 4, 8, 16, 32)),
    )
    most_mentions: int = 4
    weight_decay: float = 0.01
    b2: float = 0.98
    answer_weight: float = 5.0
    other_weight: float = 0.1


RECIPES = {"passkey": "rotary", "passkey_alibi": "alibi"}


def make(recipe: str, folder: str, settings: RecipeConfig) -> None:
    """Trains a shipped model and writes its folder.

    Args:
      recipe: one of RECIPES.
      folder: the folder to create.
      settings: how the model is trained.

    Raises:
      UserError: the folder already holds something.
    """
    check_free(folder)
    hf_config = HF_CONFIGS[RECIPES[recipe]]
    export(hf_config, train(hf_config, settings), folder)


def train(hf_config: dict[str, Any], settings: RecipeConfig) -> dict:
    """Trains one of HF_CONFIGS from random parameters, and returns the trained parameters."""
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
    settings: RecipeConfig,
    batches: Iterator[Batch],
) -> dict:
    steps = sum(stage.steps for stage in phase.stages)
    optimizer = OptimizerConfig(
        steps,
        phase.peak_rate,
        phase.warmup_steps,
        weight_decay=settings.weight_decay,
        b2=settings.b2,
    )
    trainer = Trainer(config, make_mesh(""), make_optimizer(optimizer), "float32")
    state = trainer.init(params)
    tables = {factor: _tables(config, factor) for factor in phase.yarn_factors}
    factors, rng = itertools.cycle(phase.yarn_factors), np.random.default_rng(settings.seed)
    with step_bar(steps, 0) as bar:
        for batch, factor in zip(itertools.islice(batches, steps), factors, strict=False):
            rows, length = batch.tokens.shape
            # Positions reach as far as in the longest text that the factor serves.
            span = length + (factor - 1) * TRAINED_LENGTH
            batch = batch.replace(positions=gapped_positions(rng, rows, length, span))
            step = jax.tree.map(lambda x: x[None], batch)
            state, metrics = trainer.step(state, step, tables[factor])
            bar.set_postfix_str(f"{length} tokens, loss {metrics.loss:.4f}", refresh=False)
            bar.update()
    return state.params


def _tables(config: ModelConfig, factor: int) -> RotaryTables:
    """Returns tables with YaRN's frequencies, but without its attention factor.

    That factor sharpens attention for the many tokens of a long text. These texts are short, and a
    model trained on them with the factor would learn to rely on it.
    """
    if factor > 1:
        scaling = RopeScaling("yarn", float(factor), TRAINED_LENGTH, attention_factor=1.0)
        config = dataclasses.replace(config, rope_scaling=scaling)
    return rotary_tables(config, [TRAINED_LENGTH])


def _batches(settings: RecipeConfig) -> Iterator[Batch]:
    """Yields the [batch, length] batch of each step; a passage's last token has no target."""
    stages = [stage for phase in settings.phases for stage in phase.stages]
    for i, stage in enumerate(s for s in stages for _ in range(s.steps)):
        passages = [
            make_passage(
                f"t{settings.seed} {i} {row}",
                stage.length - ANSWER_TOKENS,
                most_mentions=settings.most_mentions,
            )
            for row in range(stage.batch)
        ]
        weights = settings.answer_weight, settings.other_weight
        rows = [weighted(passage, *weights) for passage in passages]
        yield first_tokens(rows, stage.batch, stage.length)
