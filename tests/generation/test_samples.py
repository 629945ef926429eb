"""Several answers to a prompt: they differ, and do not depend on what is answered beside them."""

import pytest

from lsjax import Sampling, UserError

WARM = Sampling(temperature=1.0, seed=3)
PROMPT = [1, 2, 3, 4, 5]


def answers(lm, prompts, output=12, sampling=WARM, **options):
    options |= {"sampling": sampling, "ignore_eos": True}
    return [c.token_ids for c in lm.generate(prompts, output, **options)]


@pytest.fixture(scope="module")
def alone():
    from helpers.golden_models import build

    return answers(build("qwen3"), [PROMPT] * 4, max_batch_size=1)


slow = pytest.mark.slow("two rows are quick")


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=slow)])
def test_prompts_draw_for_themselves_whatever_the_batch(model, alone, size):
    assert len(set(alone)) == 4
    assert answers(model("qwen3"), [PROMPT] * 4, max_batch_size=size) == alone


@pytest.mark.slow("a draw's key is of its row, and rows on meshes are quick, greedily")
def test_on_several_devices_too(model, alone):
    lm = model("qwen3", mesh="data=2,context=2,model=2")
    assert answers(lm, [PROMPT] * 4) == alone


def test_samples_of_a_prompt_that_is_read_once(model):
    """With a table of rotary angles for each row, and a cache in int8."""
    lm = model("qwen3_dynamic", kv="int8", layers=1)
    found = answers(lm, [PROMPT, PROMPT[:2]], num_samples=3)
    assert len(set(found)) == 6
    assert answers(lm, [PROMPT], num_samples=3) == found[:3]


@pytest.mark.slow("samples on a mesh, samples in a batch and rows of a data axis are tested alone")
def test_samples_of_a_prompt_on_a_data_axis(model):
    prompts = [PROMPT, PROMPT[:2]]
    one, two = (
        answers(model("qwen3_dynamic", kv="int8", mesh=mesh, layers=1), prompts, num_samples=3)
        for mesh in ("", "data=2")
    )
    assert one == two


def test_a_penalty_holds_for_what_prompt_and_answer_hold(model):
    """This model repeats one token for ever; penalised enough, each comes once."""
    lm, hard = model("qwen3"), Sampling(repetition_penalty=1e6)
    prompts = [PROMPT, [*PROMPT[::-1], 9]]
    for prompt, found in zip(prompts, answers(lm, prompts, 30, hard), strict=True):
        assert len(set(found) | set(prompt)) == len(found) + len(prompt)
    assert answers(lm, prompts, 30, Sampling()) != answers(lm, prompts, 30, hard)


def test_what_would_be_the_same_several_times_is_refused(model):
    lm = model("qwen3")
    for options in ({"num_samples": 2}, {"num_samples": 0}):
        with pytest.raises(UserError, match="num_samples"):
            lm.generate([PROMPT], 4, **options)
    with pytest.raises(UserError, match="repetition_penalty"):
        lm.generate(
            [PROMPT], 4, sampling=Sampling(repetition_penalty=2.0), prompt_lookup_num_tokens=2
        )


def test_a_list_of_ids_is_a_prompt_and_what_is_neither_is_refused(model):
    lm = model("qwen3")
    (one,) = lm.generate(PROMPT, 4)
    assert one.token_ids == lm.generate([PROMPT], 4)[0].token_ids
    for wrong in (7, [[1.5]], [[True]], {"prompt": PROMPT}, [None], b"text"):
        with pytest.raises(UserError, match="prompt"):
            lm.generate(wrong, 4)
    with pytest.raises(UserError, match="several lengths"):
        lm.logits([[1, 2], [3]])
    with pytest.raises(UserError, match="whole numbers"):
        lm.token_nll([[1.5, 2.0]])
