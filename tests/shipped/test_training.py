"""Training learns, and what it writes is a folder that loads."""

import numpy as np

import lsjax
from lsjax.shipped.evaluation import held_out_passages
from lsjax.shipped.export import export
from lsjax.shipped.training import Phase, Settings, Stage, train


def test_a_short_training_learns_and_exports_a_model(tmp_path):
    passages = held_out_passages(120, 4)
    losses = []
    for steps in (2, 40):
        phases = (
            Phase((Stage(steps, 16, 128),), peak_rate=2e-3, warmup=1),
            Phase((Stage(3, 4, 128),), peak_rate=1e-4, warmup=1, yarn_factors=(1, 4)),
        )
        folder = tmp_path / str(steps)
        folder.mkdir()
        export(train(Settings(phases=phases)), folder)
        lm = lsjax.load(folder)
        ids = [lm.tokenizer.encode(p.prompt) for p in passages]
        losses.append(float(np.mean(lm.losses(ids))))
    assert losses[1] < 0.8 * losses[0]
