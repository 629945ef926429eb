"""RULER's kinds of task: what is asked stands in the text, and what is right is scored so."""

import collections
import dataclasses
import json
import random
import re
from types import SimpleNamespace

import pytest
from helpers.gguf_files import GOLDEN
from helpers.programs import run
from hypothesis import given, settings
from hypothesis import strategies as st

from lsjax.evals.cells import Cells
from lsjax.evals.ruler import TASKS, Table, measure
from lsjax.evals.ruler.measure import case_of, prompts_of
from lsjax.evals.ruler.tasks import Case, Question
from lsjax.inference.sparsity import Sparsity
from lsjax.runtime.errors import UserError
from lsjax.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer(GOLDEN / "tokenizer" / "byte_level_json")
SEEDS, FILLS = st.integers(0, 10**6), st.integers(1, 3000)
few = settings(max_examples=25, deadline=None)


def make(task, seed, fill):
    return TASKS[task].make(random.Random(seed), fill)


@few
@given(st.sampled_from(list(TASKS)), SEEDS, FILLS)
def test_answers_are_in_the_text_and_score_by_their_share(task, seed, fill):
    case = make(task, seed, fill)
    assert case == make(task, seed, fill)
    for question in case.questions:
        answers = question.answers
        assert len(set(answers)) == len(answers)
        assert all(re.search(rf"\b{answer}\b", case.text) for answer in answers)
        assert question.score(", ".join(reversed(answers)) + ".") == 1
        assert question.score(f"It is {answers[0]}.") == pytest.approx(1 / len(answers))
        assert question.score("") == question.score(f"x{answers[0]}") == 0


@few
@given(st.sampled_from([t for t in TASKS if "needle" in t]), SEEDS, FILLS)
def test_needles_tell_each_key_its_own_numbers(task, seed, fill):
    case, told = make(task, seed, fill), collections.defaultdict(list)
    for key, number in re.findall(r"magic numbers for (\w+) is: (\d+)\.", case.text):
        told[key].append(number)
    assert len(case.questions) == len(told)
    for question in case.questions:
        (key,) = (key for key in told if f" {key} " in question.text)
        assert sorted(question.answers) == sorted(told[key])
    assert {len(q.answers) for q in case.questions} == {4 if "value" in task else 1}


@few
@given(SEEDS, FILLS)
def test_variables_have_the_value_that_their_chain_begins_with(seed, fill):
    case, values = make("variable tracking", seed, fill), {}
    for name, value in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", case.text):
        values[name] = values.get(value, value)
    for question in case.questions:
        (value,) = re.findall(r"\d+", question.text)
        assert set(question.answers) == {name for name, v in values.items() if v == value}
        assert len(question.answers) == 5


@few
@given(SEEDS, FILLS)
def test_frequent_words_come_most_often(seed, fill):
    case = make("frequent words", seed, fill)
    counted = collections.Counter(case.text.partition("\n")[2].split()).most_common(4)
    assert {word for word, _ in counted[:3]} == set(case.questions[0].answers)
    assert counted[2][1] > counted[3][1]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("chat_template", [None, "<s>[{{ messages[0].content }}]"])
def test_prompts_have_the_length_asked_for(task, chat_template):
    tokenizer = dataclasses.replace(TOKENIZER, chat_template=chat_template)
    case, prompts = case_of(tokenizer, task, 1500, "seed")
    assert 1450 <= len(prompts) <= 1500
    whole = tokenizer.decode(prompts.document + prompts.questions[0])
    assert whole.endswith(case.questions[0].begin)
    with pytest.raises(UserError, match="does not fit 10 tokens"):
        case_of(tokenizer, task, 10, "seed")


@pytest.mark.parametrize("template", [None, "[{{ messages[0].content }}]", "with"])
def test_prompts_begin_with_one_token_that_begins_a_text(template):
    begin = 602
    if template == "with":
        template = (
            TOKENIZER.decode([begin], skip_special_tokens=False) + "{{ messages[0].content }}"
        )
    tokenizer = dataclasses.replace(TOKENIZER, chat_template=template, prefix=(begin,))
    case = Case("A text.", (Question("Why?", "Because", ("x",)),))
    prompts = prompts_of(tokenizer, case)
    whole = (*prompts.document, *prompts.questions[0])
    assert whole[0] == begin and whole.count(begin) == 1


class Perfect:
    """A model that reads all answers, but for those after a number of texts."""

    tokenizer = TOKENIZER
    options = SimpleNamespace(compression=None)
    sparsity = Sparsity(0.5, 10, 0)

    def __init__(self, texts):
        self.texts, self.reserves = texts, []

    def read(self, ids, reserve, **_):
        self.reserves.append(reserve)
        return SimpleNamespace(ids=ids, sparsity=self.sparsity)

    def generate(self, prompts, tokens, document=None, **_):
        self.texts -= 1
        if self.texts < 0:
            raise KeyboardInterrupt
        begin = () if document is None else document.ids
        whole = [self.tokenizer.decode((*begin, *prompt)) for prompt in prompts]
        stats = SimpleNamespace(sparsity=self.sparsity)
        return [SimpleNamespace(text=text, stats=stats) for text in whole]


def test_a_table_is_measured_cell_by_cell():
    cells, tasks = Cells(), ["single needle", "variable tracking"]
    with pytest.raises(KeyboardInterrupt):
        measure(Perfect(3), tasks, [900, 1200], 2, cells=cells)
    assert len(cells.values) == 3
    model, counted, attended = Perfect(5), [], []
    table = measure(
        *(model, tasks, [900, 1200], 2),
        cells=cells,
        progress=counted.append,
        on_sparsity=lambda length, found: attended.append(length),
    )
    assert table == Table(tuple(tasks), (900, 1200), ((1.0, 1.0), (1.0, 1.0)))
    assert sum(counted) == 8 and attended == [900] + 4 * [1200]
    assert model.texts == 0 and len(model.reserves) == 3  # several questions over one text
    cells.add({name: 0.0 for name in list(cells.values)[:1]})
    assert measure(Perfect(0), tasks, [900], 2, cells=cells).scores == ((0.5,), (1.0,))


@pytest.mark.slow("tasks, scores and cells are tested with a stand-in for the model")
def test_the_program_measures_the_shipped_model(tmp_path):
    files = ["--output_json", tmp_path / "ruler.json", "--plot", tmp_path / "ruler.png"]
    asked = ["--lengths", "900", "--texts_per_cell", 1, "--rope_scaling", "auto"]
    tasks = ["--tasks", "single needle,multi-key needle"]
    done = run("eval_ruler.py", *asked, *tasks, *files)
    assert done.returncode == 0, done.stderr
    assert "multi-key needle" in done.stdout and "900" in done.stdout
    assert len(json.loads((tmp_path / "ruler.json").read_text())["cells"]) == 2
    assert (tmp_path / "ruler.png").read_bytes().startswith(b"\x89PNG")
