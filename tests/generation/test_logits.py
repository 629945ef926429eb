"""LanguageModel.logits: all positions, whatever the chunk."""

import numpy as np
import pytest


@pytest.mark.parametrize("chunk", [1, 7, 50, 64])
def test_chunks_do_not_show(model, chunk):
    lm = model("glm4")
    ids = np.random.default_rng(0).integers(0, lm.config.vocab_size, (2, 50))
    whole = lm.logits(ids, chunk_size=50)
    assert whole.shape == (2, 50, lm.config.vocab_size) and whole.dtype == np.float32
    np.testing.assert_allclose(lm.logits(ids, chunk_size=chunk), whole, atol=5e-5, rtol=0)
