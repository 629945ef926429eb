"""What compiles, and what must not compile again."""

import numpy as np


def test_prompts_of_100_and_of_10000_tokens_share_their_programs(model):
    lm = model("qwen2_tied", chunk=512)
    prompts = [np.arange(n) % lm.config.vocab_size for n in (10_000, 100)]
    options = {"max_input_length": 10_000, "allow_untrained_length": True}
    first = lm.generate(prompts[:1], 20, **options)[0].stats
    second = lm.generate(prompts[1:], 20, **options)[0].stats
    assert first.compilations == 3  # prefill, first token, decode
    assert second.compilations == 0


def test_other_sampling_does_not_compile_again(model):
    from lsjax import Sampling

    lm = model("qwen2_tied", chunk=16)
    lm.generate([[1, 2, 3]], 20, sampling=Sampling(temperature=0.5, seed=1))
    other = Sampling(temperature=1.5, top_k=3, top_p=0.5, seed=2)
    assert lm.generate([[4, 5]], 20, sampling=other)[0].stats.compilations == 0
