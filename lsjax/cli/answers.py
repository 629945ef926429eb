"""Prints the answers of a batch as they come."""

from lsjax.cli.program import say
from lsjax.inference.completion import Completion
from lsjax.inference.generate import Run
from lsjax.inference.request import Request
from lsjax.inference.stop_strings import TextStream
from lsjax.language_model import LanguageModel


def print_answers(model: LanguageModel, request: Request, run: Run) -> list[Completion]:
    """Prints a single row as it is generated, several rows at the end; returns the answers."""
    single = len(request.numbers) == 1
    text = TextStream(model.tokenizer, request.stop)
    for new in run:
        if single:
            say(text.push(new[0]), end="")
    completions = run.completions()
    if single:
        say(text.flush())
    else:
        for completion in completions:
            say(f"--- {completion.prompt_tokens:,} tokens:\n{completion.text}")
    return completions
