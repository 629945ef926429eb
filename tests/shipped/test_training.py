"""Training learns, and what it writes is a folder that loads."""

import numpy as np
import pytest

import lsjax
from lsjax.shipped.evaluation import held_out_passages
from lsjax.shipped.export import export
from lsjax.shipped.model import HF_CONFIGS
from lsjax.shipped.training import Phase, RecipeConfig, Stage, train

pytestmark = pytest.mark.runs_long


@pytest.mark.slow("that losses fall, resume and export is quick in tests/training")
def test_a_short_training_learns_and_exports_a_model(tmp_path):
    hf_config = HF_CONFIGS["rotary"]
    passages = held_out_passages(120, 4)
    phases = (
        Phase((Stage(24, 8, 128),), peak_rate=2e-3, warmup_steps=1),
        Phase((Stage(2, 4, 128),), peak_rate=1e-4, warmup_steps=1, yarn_factors=(1, 4)),
    )
    folder = tmp_path / "model"
    export(hf_config, train(hf_config, RecipeConfig(phases=phases)), folder)
    lm = lsjax.load(folder)
    ids = [lm.tokenizer.encode(p.prompt) for p in passages]
    untrained = np.log(lm.config.vocab_size)
    assert np.mean(lm.token_nll(ids)) < 0.8 * untrained
