"""LanguageModel.logits: all positions, whatever the chunk."""

import numpy as np
import pytest

from lsjax.inference.engine import Engine


@pytest.mark.parametrize("chunk", [1, 7, 50, 64])
def test_chunks_do_not_show(model, chunk):
    lm = model("glm4")
    ids = np.random.default_rng(0).integers(0, lm.config.vocab_size, (2, 50))
    whole = lm.logits(ids, chunk_size=50)
    assert whole.shape == (2, 50, lm.config.vocab_size) and whole.dtype == np.float32
    np.testing.assert_allclose(lm.logits(ids, chunk_size=chunk), whole, atol=5e-5, rtol=0)


def test_a_chunk_that_begins_where_no_cache_expects_one_is_refused(model):
    lm = model("glm4", chunk=64)
    engine, tokens = Engine(lm.config, lm.options), np.zeros((1, 64), np.int32)
    with pytest.raises(ValueError, match="at most 64 tokens and starts at a multiple"):
        engine.score(lm.params, None, None, tokens, 32, [96])
    with pytest.raises(ValueError, match="65 tokens at 64"):
        engine.score(lm.params, None, None, np.zeros((1, 65), np.int32), 64, [129])
