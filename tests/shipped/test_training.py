"""Training learns, and what it writes is a folder that loads."""

import numpy as np
import pytest

import lsjax
from lsjax.shipped.evaluation import held_out_passages
from lsjax.shipped.export import export
from lsjax.shipped.model import HF_CONFIGS
from lsjax.shipped.training import Phase, Settings, Stage, gapped_positions, train


@pytest.mark.parametrize("positions", HF_CONFIGS)
def test_a_short_training_learns_and_exports_a_model(positions, tmp_path):
    hf_config = HF_CONFIGS[positions]
    passages = held_out_passages(120, 4)
    phases = (
        Phase((Stage(40, 16, 128),), peak_rate=2e-3, warmup=1),
        Phase((Stage(3, 4, 128),), peak_rate=1e-4, warmup=1, yarn_factors=(1, 4)),
    )
    export(hf_config, train(hf_config, Settings(phases=phases)), tmp_path)
    lm = lsjax.load(tmp_path)
    ids = [lm.tokenizer.encode(p.prompt) for p in passages]
    untrained = np.log(lm.config.vocab_size)
    assert np.mean(lm.losses(ids)) < 0.8 * untrained


@pytest.mark.parametrize("factor", [1, 4])
def test_positions_have_one_gap_within_what_the_factor_serves(factor):
    positions = gapped_positions(np.random.default_rng(0), 200, 511, factor)
    steps = np.diff(positions, axis=1)
    assert np.all(positions[:, 0] == 0) and np.all(steps >= 1)
    assert np.all((steps > 1).sum(axis=1) <= 1)
    assert positions.max() < 512 * factor
    assert factor == 1 or positions.max() > 0.9 * 512 * factor
