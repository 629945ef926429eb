"""Training: what a passage tells again counts most, and passages grow up to the trained length."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from lsjax.checkpoint.new_folder import check_free
from lsjax.config import ModelConfig, RopeScaling
from lsjax.families import parse_config
from lsjax.nn.parameters import random_parameters
from lsjax.positions.rotary import RotaryTables, rotary_tables
from lsjax.progress import step_bar
from lsjax.sharding import make_mesh
from lsjax.shipped.export import export
from lsjax.shipped.model import ANSWER_TOKENS, HF_CONFIGS, TRAINED_LENGTH
from lsjax.shipped.passages import make_passage
from lsjax.shipped.weights import weighted
from lsjax.training.batch import Batch
from lsjax.training.gaps import gapped_positions
from lsjax.training.optimiser import Optimisation, optimiser
from lsjax.training.packing import first_tokens
from lsjax.training.step import Trainer


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
      weight_decay, b2: AdamW's.
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
    b2: float = 0.98
    answer_weight: float = 5.0
    other_weight: float = 0.1


RECIPES = {"passkey": "rotary", "passkey_alibi": "alibi"}


def make(recipe: str, folder: str, settings: Settings) -> None:
    """Trains a shipped model and writes its folder.

    Args:
      recipe: one of RECIPES.
      folder: the folder to make.
      settings: how the model is trained.

    Raises:
      UserError: the folder is taken.
    """
    check_free(folder)
    hf_config = HF_CONFIGS[RECIPES[recipe]]
    export(hf_config, train(hf_config, settings), folder)


def train(hf_config: dict[str, Any], settings: Settings) -> dict:
    """Trains one of HF_CONFIGS from random parameters and returns the tree of trained ones."""
    config = parse_config(hf_config)
    params = random_parameters(config, make_mesh(""), "float32", settings.seed)
    batches = _batches(settings)
    for phase in settings.phases:
        params = _train_phase(config, params, phase, settings, batches)
    return params


def _train_phase(
    config: ModelConfig, params: dict, phase: Phase, settings: Settings, batches: Iterator[Batch]
) -> dict:
    steps = sum(stage.steps for stage in phase.stages)
    optimisation = Optimisation(
        steps, phase.peak_rate, phase.warmup, weight_decay=settings.weight_decay, b2=settings.b2
    )
    trainer = Trainer(config, make_mesh(""), optimiser(optimisation), "float32")
    state = trainer.init(params)
    tables = {factor: _tables(config, factor) for factor in phase.yarn_factors}
    factors, rng = itertools.cycle(phase.yarn_factors), np.random.default_rng(settings.seed)
    with step_bar(steps, 0) as bar:
        for batch, factor in zip(itertools.islice(batches, steps), factors, strict=False):
            rows, length = batch.tokens.shape
            # As far apart as in the longest text that the factor serves.
            span = length + (factor - 1) * TRAINED_LENGTH
            batch = batch.replace(positions=gapped_positions(rng, rows, length, span))
            step = jax.tree.map(lambda x: x[None], batch)
            state, metrics = trainer.step(state, step, tables[factor])
            bar.set_postfix_str(f"{length} tokens, loss {metrics.loss:.4f}", refresh=False)
            bar.update()
    return state.params


def _tables(config: ModelConfig, factor: int) -> RotaryTables:
    """YaRN's frequencies without its attention factor.

    That factor makes attention sharper for the many tokens of a long text, which these texts are
    not; a model trained with it would come to count on it.
    """
    if factor > 1:
        scaling = RopeScaling("yarn", float(factor), TRAINED_LENGTH, attention_factor=1.0)
        config = dataclasses.replace(config, rope_scaling=scaling)
    return rotary_tables(config, [TRAINED_LENGTH])


def _batches(settings: Settings) -> Iterator[Batch]:
    """[batch, length] of each step; the last token of a passage has no target."""
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
