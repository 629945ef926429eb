"""Asks a model RULER's kinds of question about texts of given lengths."""

import dataclasses
import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from lsjax.documents import ChatFrame, chat_frame
from lsjax.evals.cells import Cells
from lsjax.evals.ruler.tasks import TASKS, Case
from lsjax.inference.sparsity import Sparsity
from lsjax.runtime.errors import UserError
from lsjax.runtime.html import grid
from lsjax.tokenizer import Tokenizer

if TYPE_CHECKING:
    from lsjax.language_model import LanguageModel

# Tokens by which a prompt may be shorter than asked for; prompts of like lengths share programs.
_SLACK = 16


@dataclasses.dataclass(frozen=True)
class Prompts:
    """A case as a model reads it.

    Attributes:
      document: ids that all prompts begin with, with one beginning-of-text id if the model has one.
      questions: ids that follow, one sequence per question.
    """

    document: tuple[int, ...]
    questions: tuple[tuple[int, ...], ...]

    def __len__(self) -> int:
        """The number of tokens of the longest prompt."""
        return len(self.document) + max(map(len, self.questions))


@dataclasses.dataclass(frozen=True)
class Table:
    """Mean scores by task and length.

    Attributes:
      tasks: names of the tasks.
      lengths: prompt lengths in tokens.
      scores: [len(tasks)][len(lengths)] mean scores from 0 to 1.
    """

    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    scores: tuple[tuple[float, ...], ...]

    def _repr_html_(self) -> str:
        """Shows the scores in a notebook, a row per task and a column per length."""
        rows = zip(self.tasks, self.scores, strict=True)
        return grid(
            ("task", *(f"{length:,}" for length in self.lengths)),
            ((task, *(f"{score:.0%}" for score in row)) for task, row in rows),
        )


def measure(
    model: "LanguageModel",
    tasks: Sequence[str],
    lengths: Sequence[int],
    cases: int,
    *,
    cells: Cells | None = None,
    progress: Callable[[int], object] | None = None,
    on_sparsity: Callable[[int, Sparsity], object] | None = None,
) -> Table:
    """Measures a model, with its chat template if it has one.

    A text is read once for all questions about it. Answers are greedy, even past the trained
    length.

    Args:
      model: the model to measure.
      tasks: names of tasks, from TASKS.
      lengths: prompt lengths in tokens; a prompt has that many tokens or a few less.
      cases: texts per task and length.
      cells: keeps the score of each text; those that it has are not asked for again.
      progress: called with the number of texts done.
      on_sparsity: called with the length and what a text attended to as it was read, if that was
        not everything.

    Raises:
      UserError: a length is too short for a task.
    """
    cells = Cells() if cells is None else cells
    for length in lengths:
        for task in tasks:
            for index in range(cases):
                (name,) = names = [_name(task, length, index)]
                if cells.missing(names):
                    score, sparsity = _score(model, task, length, f"{task} {index}")
                    cells.add({name: score})
                    if on_sparsity and sparsity:
                        on_sparsity(length, sparsity)
                if progress:
                    progress(1)
    scores = [
        [[cells.values[_name(task, length, i)] for i in range(cases)] for length in lengths]
        for task in tasks
    ]
    means = np.mean(scores, axis=2).tolist()
    return Table(tuple(tasks), tuple(lengths), tuple(map(tuple, means)))


def case_of(tokenizer: Tokenizer, task: str, length: int, seed: str) -> tuple[Case, Prompts]:
    """Makes a case whose longest prompt has `length` tokens, or a few less.

    Raises:
      UserError: no case is that short.
    """
    fill, best = length, None
    for _ in range(12):
        case = TASKS[task].make(random.Random(seed), fill)
        prompts = prompts_of(tokenizer, case)
        if len(prompts) <= length and (best is None or len(prompts) > len(best[1])):
            best = case, prompts
        if length - _SLACK <= len(prompts) <= length:
            break
        fill = max(int(fill * (length - _SLACK / 2) / len(prompts)), 1)
    if best is None:
        raise UserError(f"a text for {task} does not fit {length} tokens; ask for more.")
    return best


def prompts_of(tokenizer: Tokenizer, case: Case) -> Prompts:
    """Renders a case in the tokenizer's chat template, if there is one, and encodes it."""
    if tokenizer.chat_template is None:
        frame = ChatFrame(case.text, "\n\n", "\n")
    else:
        frame = chat_frame(tokenizer, case.text)
    document = tuple(tokenizer.encode(frame.document, add_special_tokens=False))
    # Some templates write the tokens that every text begins with, others leave them out.
    if document[: len(tokenizer.prefix)] != tokenizer.prefix:
        document = (*tokenizer.prefix, *document)
    questions = tuple(
        tuple(tokenizer.encode(frame.ask(q.text) + q.begin, add_special_tokens=False))
        for q in case.questions
    )
    return Prompts(document, questions)


def _name(task: str, length: int, index: int) -> str:
    return f"{task}, {length} tokens, text {index}"


def _score(
    model: "LanguageModel", task: str, length: int, seed: str
) -> tuple[float, Sparsity | None]:
    """Returns the mean score of the questions about one text, and what the text attended to."""
    case, prompts = case_of(model.tokenizer, task, length, seed)
    tokens = TASKS[task].answer_tokens
    whole = [(*prompts.document, *question) for question in prompts.questions]
    document = None
    if model.options.compression is None and len(whole) > 1:
        longest = max(map(len, prompts.questions))
        document = model.read(
            prompts.document, reserve=longest + tokens, allow_untrained_length=True
        )
        whole = list(prompts.questions)
    answers = model.generate(
        whole,
        tokens,
        # With a document, the room is the document's and the questions'.
        max_input_length=None if document else length,
        allow_untrained_length=True,
        document=document,
    )
    scores = [q.score(a.text) for q, a in zip(case.questions, answers, strict=True)]
    read = answers[0].stats if document is None else document
    return float(np.mean(scores)), read.sparsity
