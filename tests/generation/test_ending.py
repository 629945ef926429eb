"""Where an answer ends, and what a completion says of it."""

import pytest

from lsjax import UserError
from lsjax.inference.engine import Engine


def test_an_answer_ends_with_its_first_end_of_sequence(model):
    free = model("qwen3").generate([[1, 2, 3]], 60)[0].token_ids
    eos = free[20]
    cut = free[: free.index(eos) + 1]
    lm = model("qwen3", eos=(eos,))
    stopped = lm.generate([[1, 2, 3]], 60)[0]
    assert (stopped.token_ids, stopped.finish_reason) == (cut, "stop")
    assert stopped.stats.decode_steps == len(cut) - 1  # it stops within a segment
    ignored = lm.generate([[1, 2, 3]], 60, ignore_eos=True)[0]
    assert (ignored.token_ids, ignored.finish_reason) == (free, "length")


@pytest.mark.parametrize("prompts", [([1, 2, 3], [9, 8]), ([9, 8], [1, 2, 3])], ids=str)
def test_a_row_goes_on_when_its_neighbour_has_ended(model, prompts):
    free = [c.token_ids for c in model("qwen3").generate(prompts, 40)]
    ends = prompts.index([1, 2, 3])
    eos = next(t for t in free[ends] if t not in free[1 - ends])
    both = model("qwen3", eos=(eos,)).generate(prompts, 40)
    assert both[ends].finish_reason == "stop" and both[ends].token_ids[-1] == eos
    assert both[1 - ends].token_ids == free[1 - ends]
    assert both[ends].stats.decode_steps == 39


@pytest.mark.parametrize("drafted", [0, 3])
def test_decode_stops_once_the_last_row_of_a_batch_has_ended(model, drafted):
    prompts = [[1, 2, 3], [9, 8], [5]]
    free = [c.token_ids for c in model("qwen3").generate(prompts, 20)]
    eos = tuple({row[at] for row, at in zip(free, (2, 4, 6), strict=True)})
    lengths = [next(i + 1 for i, t in enumerate(row) if t in eos) for row in free]
    lm = model("qwen3", eos=eos)
    found = lm.generate(prompts, 20, prompt_lookup_num_tokens=drafted)
    assert [len(c.token_ids) for c in found] == lengths
    assert found[0].stats.decode_steps <= max(lengths) - 1 <= 6


@pytest.mark.parametrize("length", [1, 2, 16, 17, 18, 33])
def test_exactly_as_many_tokens_as_asked(model, length):
    completion = model("qwen3").generate([[1, 2, 3]], length)[0]
    assert len(completion.token_ids) == length
    assert completion.stats.generated_tokens == length
    assert completion.stats.decode_steps == length - 1
    assert completion.prompt_tokens == 3


def test_what_cannot_be_served_is_refused(model):
    lm = model("qwen3")
    trained = lm.config.max_position_embeddings
    for arguments, words in (
        (dict(prompts=[[]]), "prompt 0 is empty"),
        (dict(prompts=[]), "no prompt"),
        (dict(prompts=[[1] * 20], max_input_length=10), "20 tokens, but max_input_length is 10"),
        (dict(prompts=[[1]], max_output_length=0), "max_output_length must be at least 1"),
        (dict(prompts=[[1]], max_output_length=-3), "max_output_length must be at least 1"),
        (dict(prompts=[[1]], max_input_length=-1), "max_input_length must be at least 1"),
        (dict(prompts=[[1]], max_batch_size=0), "max_batch_size must be at least 1"),
        (dict(prompts=[[10**6]]), "outside the model's vocabulary"),
        (dict(prompts=[[1] * trained], max_output_length=1), "set rope_scaling"),
    ):
        with pytest.raises(UserError, match=words):
            lm.generate(**{"max_output_length": 4} | arguments)


def test_segments_dispatched_ahead_change_no_answer_and_a_stopped_stream_loses_nothing(
    model, monkeypatch
):
    lm = model("qwen3", segment=4)
    usual = [c.token_ids for c in lm.generate([[1, 2, 3], [9, 8]], 11)]
    eos = usual[0][6]
    cut = usual[0][: usual[0].index(eos) + 1]
    monkeypatch.setattr(Engine, "dispatches_ahead", True)
    assert [c.token_ids for c in lm.generate([[1, 2, 3], [9, 8]], 11)] == usual
    assert model("qwen3", segment=4, eos=(eos,)).generate([[1, 2, 3]], 11)[0].token_ids == cut
    dispatched, decode = [], Engine.decode
    monkeypatch.setattr(Engine, "decode", lambda *a, **b: dispatched.append(0) or decode(*a, **b))
    (request,) = lm.requests([(1, 2, 3)], 11)
    stream = iter(lm.start(request))
    first, second = next(stream)[0], next(stream)[0]
    assert tuple(first + second) == usual[0][:5]
    assert len(dispatched) == 2  # the next segment runs while these are read
    stream.close()
    assert lm.generate([[1, 2, 3]], 11)[0].token_ids == usual[0]
